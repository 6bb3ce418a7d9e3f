"""Tokens per second of 8 clients against one, through HTTP, on the same server; plus the time to the first token.

    python benchmarks/serve.py [--ckpt DIR --tokenizer T] [--clients 8] [--tokens 128] [--dtype bfloat16]

Without a checkpoint, a model with random weights of the size given by --hidden and --layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from evomesh.config.schema import ModelConfig
from evomesh.data.tokenizer import load_tokenizer
from evomesh.generate.engine import GenerationEngine
from evomesh.models.registry import build_model, initialize_weights
from evomesh.serve.app import create_app
from evomesh.serve.http_server import bind, create_server
from evomesh.serve.load import ModelOptions, load_service
from evomesh.serve.loop import EngineLoop
from evomesh.serve.service import GenerationService, ServedModel, ServiceLimits


@dataclass(frozen=True)
class RandomModel:
    """Sizes of a model with random weights, and torch's name of their dtype."""

    hidden: int
    layers: int
    vocab: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Compared:
    """Tokens per second of one client and of many in turn, and their median seconds to the first token."""

    clients: int
    one: float
    many: float
    wait_one: float
    wait_many: float


def random_service(sizes: RandomModel, slots: int, folder: Path) -> GenerationService:
    vocab = sizes.vocab
    config = ModelConfig(
        model_type="LLAMA2",
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.hidden // 64,
        num_kv_attention_heads=max(1, sizes.hidden // 192),
        mlp_ratio=8 / 3,
        vocab_size=vocab,
        no_bias=True,
        dtype=sizes.dtype,  # type: ignore[arg-type]
        max_position_embeddings=1024,
    )
    model = build_model(config).to("cuda" if torch.cuda.is_available() else "cpu")
    initialize_weights(model, seed=1)
    alphabet = {
        symbol: number
        for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    names = alphabet | {
        f"word{number}": number for number in range(len(alphabet), vocab)
    }
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    served = ServedModel(
        "model", "random", 0, load_tokenizer(folder), None, (), vocab, 1024
    )
    limits = ServiceLimits(1024, slots)
    engine = partial(
        GenerationEngine,
        model.eval(),
        slots=slots,
        context_length=limits.context_length,
    )
    return GenerationService(served, EngineLoop({"origin": engine}), limits)


@contextlib.contextmanager
def running(service: GenerationService) -> Iterator[str]:
    listening = bind("127.0.0.1", 0)
    server = create_server(create_app(service), service.engines.end_answers)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def ask(url: str, body: dict[str, object], found: list[tuple[int, float]]) -> None:
    """One streamed request: appends (tokens, seconds to the first)."""
    start, first, tokens = time.perf_counter(), 0.0, 0
    with httpx.stream(
        "POST", url + "/v1/completions", json=body, timeout=600
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                tokens = (json.loads(line[6:]).get("usage") or {}).get(
                    "completion_tokens", tokens
                )
    found.append((tokens, first))


def measure(url: str, clients: int, body: dict[str, object]) -> tuple[float, float]:
    """(tokens per second of all clients, median seconds to the first token)."""
    found: list[tuple[int, float]] = []
    threads = [
        threading.Thread(target=ask, args=(url, body, found)) for _ in range(clients)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - start
    return sum(tokens for tokens, _ in found) / spent, statistics.median(
        first for _, first in found
    )


def turns(
    service: GenerationService, clients: int, tokens: int, rounds: int
) -> Iterator[Compared]:
    """One client and many in turn, so that a slow moment of the machine meets both; the first request warms up."""
    body = {
        "model": service.model.name,
        "prompt": "def main(argv):\n    ",
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with running(service) as url:
        measure(url, 1, body)
        for _ in range(rounds):
            one, wait_one = measure(url, 1, body)
            many, wait_many = measure(url, clients, body)
            yield Compared(clients, one, many, wait_one, wait_many)


def compare(
    sizes: RandomModel, clients: int, tokens: int, rounds: int
) -> Iterator[Compared]:
    with tempfile.TemporaryDirectory() as folder:
        service = random_service(sizes, clients, Path(folder))
        yield from turns(service, clients, tokens, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt")
    parser.add_argument("--tokenizer")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.ckpt:
        options = ModelOptions(args.tokenizer, template="none", slots=args.clients)
        service = load_service(args.ckpt, device, options)
        found = turns(service, args.clients, args.tokens, args.rounds)
    else:
        sizes = RandomModel(args.hidden, args.layers, args.vocab, args.dtype)
        found = compare(sizes, args.clients, args.tokens, args.rounds)
    ratios = []
    for turn in found:
        ratios.append(turn.many / turn.one)
        print(
            f"1 client: {turn.one:7.1f} tokens/s, first after {turn.wait_one * 1000:5.0f} ms   "
            f"{turn.clients} clients: {turn.many:7.1f} tokens/s, first after {turn.wait_many * 1000:5.0f} ms   "
            f"ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(
        f"median ratio {statistics.median(ratios):.2f} on {device}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
