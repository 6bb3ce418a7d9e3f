"""Tokens per second of one training step (forward, backward, AdamW), against a transformers Llama of the same shape.

Run: python benchmarks/train_step.py [--shape 60M] [--compiled] [--packed] [--profile] [--rounds 7] [--threads 2]

Both alternate within one run, so that other load slows both, each in a separate process, so that they do not share
memory; the figure to quote is the median of the ratios of adjacent steps. Model FLOPs of a step are 6 (parameters
without embedding) tokens plus causal attention counted once, 6 layers hidden (sum of squared document lengths). The
peak is the best sustained rate of a float32 product, by torch.mm or oneDNN, measured before and after every pair of
steps because it depends on clock and load; the fraction is the median over pairs of a step's speed divided by the mean
of its two peaks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _product import Training, made_up

from evomesh.config.schema import ModelConfig
from evomesh.monitor.profile import SKIPPED, STEPS, WARM_UP, StepProfile
from evomesh.train.allocator import keep_freed_memory


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    mlp: int
    vocab: int
    documents: tuple[int, ...]  # lengths, packed into one sequence
    kv_heads: int | None = None  # None: as many as heads


SHAPES = {
    "10M": Shape(4, 256, 4, 704, 16000, (512,) * 4),
    "60M": Shape(8, 512, 8, 1408, 32000, (512,) * 4),
    "200M": Shape(12, 1024, 16, 2816, 32000, (512,) * 4),
}
# Rows, summed, columns.
PRODUCTS = ((2048, 2048, 2048), (2048, 512, 1408), (512, 512, 16000))
KEPT_UP = 0.3  # seconds
UNTIMED = 5  # steps, until compilation is done and the heap has grown to its final size
# --packed: 2048 tokens, cut to the shape's total.
RAGGED = (301, 23, 180, 64, 512, 7, 140, 285, 96, 33, 210, 197)


def ragged(total: int) -> tuple[int, ...]:
    lengths: list[int] = []
    for length in RAGGED:
        if sum(lengths) < total:
            lengths.append(min(length, total - sum(lengths)))
    return tuple(lengths)


def our_step(
    shape: Shape, lengths: tuple[int, ...], ids: torch.Tensor, compiled: bool
) -> Callable[[], float]:
    config = ModelConfig(
        model_type="LLAMA2",
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        num_attention_heads=shape.heads,
        mlp_ratio=shape.mlp / shape.hidden,
        multiple_of=1,
        dtype="float32",
        no_bias=True,
        compile=compiled,
    )
    training, batch = Training(config, torch.device("cpu")), made_up(ids[None], lengths)
    return lambda: training.step(batch).loss


def their_step(
    shape: Shape, lengths: tuple[int, ...], ids: torch.Tensor, compiled: bool
) -> Callable[[], float]:
    """Equal documents as a batch; ragged ones the way it packs them: position ids that restart, which make a mask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    inputs: dict[str, torch.Tensor]
    if len(set(lengths)) == 1:
        batch = ids.view(len(lengths), -1)
        inputs = {"input_ids": batch, "labels": batch.clone()}
    else:
        labels = ids[None].clone()
        labels[
            0, [sum(lengths[:i]) for i in range(len(lengths))]
        ] = -100  # no prediction across a bound
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        inputs = {"input_ids": ids[None], "labels": labels, "position_ids": positions}

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def serve(kind: str, args: argparse.Namespace, pipe: Connection) -> None:
    """One side in its own process: takes a step, and answers with its seconds, whenever it is asked to."""
    torch.set_num_threads(args.threads)
    shape, lengths = problem(args)
    ids = torch.randint(
        0, shape.vocab, (sum(lengths),), generator=torch.Generator().manual_seed(0)
    )
    if kind == "evomesh":
        keep_freed_memory()  # as `evomesh train` does
        step = our_step(shape, lengths, ids, args.compiled_ours)
    else:
        step = their_step(shape, lengths, ids, args.compiled)
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


def problem(args: argparse.Namespace) -> tuple[Shape, tuple[int, ...]]:
    shape = SHAPES[args.shape]
    return shape, ragged(sum(shape.documents)) if args.packed else shape.documents


def product_rates() -> list[float]:
    """FLOP/s of float32 matrix products, kept up for a while, of the best of a few shapes: torch.mm, and oneDNN."""
    rates = []
    for multiply in (lambda a, b: torch.mm(a, b.T), one_dnn):
        best = 0.0
        for m, k, n in PRODUCTS:
            a, b = torch.randn(m, k), torch.randn(n, k)
            multiply(a, b)
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < KEPT_UP:
                multiply(a, b)
                count += 1
            best = max(best, 2 * m * k * n * count / (time.perf_counter() - start))
        rates.append(best)
    return rates


def one_dnn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out


def model_flops(shape: Shape, lengths: tuple[int, ...]) -> float:
    kv_width = shape.hidden * (shape.kv_heads or shape.heads) // shape.heads
    attention_weights = 2 * shape.hidden**2 + 2 * shape.hidden * kv_width
    block = attention_weights + 3 * shape.hidden * shape.mlp
    parameters = shape.layers * block + shape.hidden * shape.vocab
    attention = 6 * shape.layers * shape.hidden * sum(n * n for n in lengths)
    return 6.0 * parameters * sum(lengths) + attention


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="torch.compile on their side (the whole model)",
    )
    parser.add_argument(
        "--compiled-ours",
        action="store_true",
        help="torch.compile on our side (each block)",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="documents of unequal length in one sequence",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead: where the time of our step goes",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def profile(args: argparse.Namespace) -> None:
    shape, lengths = problem(args)
    keep_freed_memory()
    ids = torch.randint(
        0, shape.vocab, (sum(lengths),), generator=torch.Generator().manual_seed(0)
    )
    step = our_step(shape, lengths, ids, args.compiled_ours)
    for _ in range(UNTIMED):
        step()
    with TemporaryDirectory() as folder, StepProfile(Path(folder), "step") as profiled:
        for _ in range(SKIPPED + WARM_UP + STEPS):
            step()
            profiled.step()
        print((Path(folder) / "step.txt").read_text())


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.profile:
        profile(args)
        return
    spawn, sides = get_context("spawn"), []
    for kind in ("evomesh", "transformers"):
        pipe, theirs = spawn.Pipe()
        worker = spawn.Process(target=serve, args=(kind, args, theirs), daemon=True)
        worker.start()
        sides.append((worker, pipe))

    def step(pipe: Connection) -> float:
        pipe.send(True)
        return float(pipe.recv())

    for _, pipe in sides:
        for _ in range(UNTIMED):
            step(pipe)
    pairs, peaks = [], [product_rates()]
    for _ in range(args.rounds):
        pairs.append([step(pipe) for _, pipe in sides])
        peaks.append(product_rates())
    for worker, pipe in sides:
        pipe.send(False)
        worker.join()
    report(args, pairs, peaks)


def report(
    args: argparse.Namespace, pairs: list[list[float]], peaks: list[list[float]]
) -> None:
    """Print the table. ``pairs``: seconds of both steps; ``peaks``: FLOP/s of both products around and between them."""
    shape, lengths = problem(args)
    total, flops = sum(lengths), model_flops(shape, lengths)
    around = [(max(before) + max(behind)) / 2 for before, behind in pairwise(peaks)]
    print(
        f"{args.shape}: {total} tokens in {len(lengths)} documents, float32, {args.threads} threads"
    )
    names = (
        "evomesh" + args.compiled_ours * " compiled",
        "transformers" + args.compiled * " compiled",
    )
    for name, times in zip(names, zip(*pairs, strict=True), strict=True):
        seconds = statistics.median(times)
        share = statistics.median(
            flops / own / peak for own, peak in zip(times, around, strict=True)
        )
        speed = flops / seconds / 1e9
        print(
            f"  {name:22s} {total / seconds:8.1f} tokens/s  {speed:6.1f} GFLOP/s  {share:.2f} of best"
        )
    ratio = statistics.median(b / a for a, b in pairs)
    mm, dnn = (statistics.median(rates) / 1e9 for rates in zip(*peaks, strict=True))
    print(f"  best float32 product: torch.mm {mm:.1f}, oneDNN {dnn:.1f} GFLOP/s")
    print(f"  median ratio of speeds {ratio:.3f}")


if __name__ == "__main__":
    main()
