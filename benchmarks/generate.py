"""Tokens per second of greedy decoding with a cache, against transformers.generate with the same weights.

Run: python benchmarks/generate.py [--shape 60M] [--batch 1 8] [--prompt 128] [--new 64] [--rounds 5] [--threads 2]

Both alternate within one run, so that other load slows both, each in a separate process; the figure to quote is the
median of the ratios of adjacent rounds. Both prefill the prompts and generate all tokens, without an end token; the
tokens are compared. transformers runs in inference mode with its SDPA attention and its own default cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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
}
Turn = Callable[[], list[list[int]]]


def model_config(shape: str) -> ModelConfig:
    layers, hidden, heads, kv_heads, mlp, vocab = SHAPES[shape]
    return ModelConfig(
        model_type="LLAMA2",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_attention_heads=kv_heads,
        mlp_ratio=mlp / hidden,
        multiple_of=1,
        vocab_size=vocab,
        dtype="float32",
        no_bias=True,
    )


def native(config: ModelConfig) -> LanguageModel:
    model = build_model(config)
    initialize_weights(model, seed=1)
    return model.eval()


def ours(config: ModelConfig, prompts: list[list[int]], new: int) -> Turn:
    keep_freed_memory()
    model, sampling = (
        native(config),
        SamplingParams(do_sample=False, max_new_tokens=new),
    )
    return lambda: [answer for [answer] in generate_tokens(model, prompts, sampling)]


def theirs(config: ModelConfig, prompts: list[list[int]], new: int) -> Turn:
    from transformers import LlamaConfig, LlamaForCausalLM

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
    weights, naming = dict(native(config).named_parameters()), NAME_MAPS["llama"]
    state = {}
    for link in tensor_links(config, naming):
        state |= zip(
            link.foreign,
            native_to_foreign(link, weights[link.native].detach(), config, naming),
            strict=True,
        )
    model.load_state_dict(state)
    ids = torch.tensor(prompts)
    options = {
        "do_sample": False,
        "max_new_tokens": new,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def turn() -> list[list[int]]:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    return turn


def serve(
    side: Callable[[ModelConfig, list[list[int]], int], Turn],
    args: argparse.Namespace,
    pipe: Connection,
) -> None:
    """One side in its own process: generates, and answers with seconds and tokens, whenever a batch size comes."""
    torch.set_num_threads(args.threads)
    config = model_config(args.shape)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        config.vocab_size, (max(args.batch), args.prompt), generator=draw
    ).tolist()
    turns = {batch: side(config, prompts[:batch], args.new) for batch in args.batch}
    while batch := pipe.recv():
        start = time.perf_counter()
        made = turns[batch]()
        pipe.send((time.perf_counter() - start, made))


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
    return parser.parse_args()


def main() -> None:
    args = arguments()
    spawn, pipes = get_context("spawn"), []
    for side in (ours, theirs):
        pipe, other = spawn.Pipe()
        spawn.Process(target=serve, args=(side, args, other), daemon=True).start()
        pipes.append(pipe)
    print(
        f"{args.shape}: prompts of {args.prompt} tokens, {args.new} new ones, float32, {args.threads} threads"
    )
    for batch in args.batch:
        pairs = []
        for _ in range(args.rounds + 1):
            answers = []
            for pipe in pipes:
                pipe.send(batch)
                answers.append(pipe.recv())
            pairs.append([seconds for seconds, _ in answers])
            same = sum(
                a == b for a, b in zip(answers[0][1], answers[1][1], strict=True)
            )
        speeds = [
            batch * args.new / statistics.median(times)
            for times in zip(*pairs[1:], strict=True)
        ]
        # The first round warms up.
        ratio = statistics.median(b / a for a, b in pairs[1:])
        print(
            f"  batch {batch}: evomesh {speeds[0]:.1f}, transformers {speeds[1]:.1f} tokens/s; median ratio {ratio:.2f}"
        )
        print(f"    the same tokens in {same} of {batch} answers (float32)")
    for pipe in pipes:
        pipe.send(0)


if __name__ == "__main__":
    main()
