"""Tokens per second of greedy decoding with a cache, against transformers.generate with the same weights.

Run: python benchmarks/generate.py [--shape 60M] [--batch 1 8] [--prompt 128] [--new 64] [--rounds 5] [--threads 2]
     [--device cuda] [--dtype bfloat16]

Both alternate within one run, so that other load slows both, each in a separate process; the figure to quote is the
median of the ratios of adjacent rounds. Both prefill the prompts and generate all tokens, without an end token; the
tokens are compared. transformers runs in inference mode with its SDPA attention and its own default cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from evomesh.checkpoint.huggingface.names import (
    NAME_MAPS,
    native_to_foreign,
    tensor_links,
)
from evomesh.config.schema import ModelConfig
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, initialize_weights
from evomesh.train.allocator import keep_freed_memory

SHAPES = {  # layers, hidden, heads, key/value heads, mlp, vocabulary
    "10M": (4, 256, 4, 4, 704, 16000),
    "60M": (8, 512, 8, 8, 1408, 32000),
    "200M": (12, 1024, 16, 4, 2816, 32000),
    "1.3B": (24, 2048, 16, 16, 5504, 32000),
}
Turn = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Options:
    """What is compared: ``prompt`` and ``new`` are tokens, ``dtype`` torch's name of one."""

    shape: str
    batches: tuple[int, ...]
    prompt: int
    new: int
    rounds: int
    threads: int
    device: str
    dtype: str

    @property
    def prompts(self) -> list[list[int]]:
        """As many as the largest batch has."""
        vocab = SHAPES[self.shape][-1]
        draw = torch.Generator().manual_seed(0)
        size = (max(self.batches), self.prompt)
        ids: list[list[int]] = torch.randint(vocab, size, generator=draw).tolist()
        return ids


@dataclass(frozen=True)
class Compared:
    """Attributes:
    size: prompts in the batch.
    ours, theirs: tokens per second.
    ratio: median over rounds of theirs' seconds by ours.
    same: answers that are equal to the last token.
    """

    size: int
    ours: float
    theirs: float
    ratio: float
    same: int


def model_config(options: Options) -> ModelConfig:
    layers, hidden, heads, kv_heads, mlp, vocab = SHAPES[options.shape]
    return ModelConfig(
        model_type="LLAMA2",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_attention_heads=kv_heads,
        mlp_ratio=mlp / hidden,
        multiple_of=1,
        vocab_size=vocab,
        dtype=options.dtype,  # type: ignore[arg-type]
        no_bias=True,
    )


def native(options: Options) -> LanguageModel:
    model = build_model(model_config(options))
    initialize_weights(model, seed=1)
    return model.eval().to(options.device)


def ours(options: Options) -> Callable[[list[list[int]]], Turn]:
    keep_freed_memory()
    model = native(options)
    sampling = SamplingParams(do_sample=False, max_new_tokens=options.new)

    def turn_of(prompts: list[list[int]]) -> Turn:
        def turn() -> list[list[int]]:
            return [answer for [answer] in generate_tokens(model, prompts, sampling)]

        return turn

    return turn_of


def theirs(options: Options) -> Callable[[list[list[int]]], Turn]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model_config(options)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.layer_norm_epsilon,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    ).eval()
    model.to(options.device, getattr(torch, options.dtype))
    weights, naming = dict(native(options).named_parameters()), NAME_MAPS["llama"]
    state = {}
    for link in tensor_links(config, naming):
        state |= zip(
            link.foreign,
            native_to_foreign(link, weights[link.native].detach(), config, naming),
            strict=True,
        )
    model.load_state_dict(state)
    settings = {
        "do_sample": False,
        "max_new_tokens": options.new,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def turn_of(prompts: list[list[int]]) -> Turn:
        ids = torch.tensor(prompts, device=options.device)

        def turn() -> list[list[int]]:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
            return rows

        return turn

    return turn_of


def serve(
    side: Callable[[Options], Callable[[list[list[int]]], Turn]],
    options: Options,
    pipe: Connection,
) -> None:
    """One side in its own process: generates, and answers with seconds and tokens, whenever a batch size comes."""
    torch.set_num_threads(options.threads)
    turn_of = side(options)
    while batch := pipe.recv():
        turn = turn_of(options.prompts[:batch])
        start = time.perf_counter()
        made = turn()  # its tokens are on the host, and so the device is done
        pipe.send((time.perf_counter() - start, made))


def compare(options: Options) -> Iterator[Compared]:
    """Both sides in turns, for each batch size; a first round warms up."""
    spawn, pipes = get_context("spawn"), []
    for side in (ours, theirs):
        pipe, other = spawn.Pipe()
        spawn.Process(target=serve, args=(side, options, other), daemon=True).start()
        pipes.append(pipe)
    for batch in options.batches:
        pairs = []
        for _ in range(options.rounds + 1):
            answers = []
            for pipe in pipes:
                pipe.send(batch)
                answers.append(pipe.recv())
            pairs.append([seconds for seconds, _ in answers])
        same = sum(a == b for a, b in zip(answers[0][1], answers[1][1], strict=True))
        our_seconds, their_seconds = zip(*pairs[1:], strict=True)
        yield Compared(
            size=batch,
            ours=batch * options.new / statistics.median(our_seconds),
            theirs=batch * options.new / statistics.median(their_seconds),
            ratio=statistics.median(b / a for a, b in pairs[1:]),
            same=same,
        )
    for pipe in pipes:
        pipe.send(0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to make for each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    options = Options(
        args.shape,
        tuple(args.batch),
        args.prompt,
        args.new,
        args.rounds,
        args.threads,
        args.device,
        args.dtype,
    )
    print(
        f"{args.shape}: prompts of {args.prompt} tokens, {args.new} new ones, {args.dtype} on {args.device}, "
        f"{args.threads} threads"
    )
    for found in compare(options):
        print(
            f"  batch {found.size}: evomesh {found.ours:.1f}, transformers {found.theirs:.1f} tokens/s; "
            f"median ratio {found.ratio:.2f}"
        )
        print(
            f"    the same tokens in {found.same} of {found.size} answers ({args.dtype})"
        )


if __name__ == "__main__":
    main()
