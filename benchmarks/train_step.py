"""Tokens per second of one training step (forward, backward, AdamW), against a transformers Llama of the same shape.

Run: python benchmarks/train_step.py [--shape 60M] [--dtype float32|bfloat16] [--against theirs|float32|eager]
     [--compiled] [--packed] [--profile] [--rounds 7] [--threads 2]

Both alternate within one run, so that other load slows both, each in a separate process, so that they do not share
memory; the figure to quote is the median of the ratios of adjacent steps. Model FLOPs of a step are 6 (parameters
without embedding) tokens plus causal attention counted once, 6 layers hidden (sum of squared document lengths). The
peak is the best sustained rate of a product in the dtype of the step, by torch.mm or oneDNN, measured before and after
every pair of steps because it depends on clock and load; the fraction is the median over pairs of a step's speed
divided by the mean of its two peaks.

With --dtype bfloat16 both sides have weights of 16 bits; ours keeps float32 master weights and moments, as
`evomesh train` does, theirs has neither. With --against float32 or eager the other side is our own step, in float32 or
without compiled blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Side:
    """One of the two that are timed by turns: whose step, in which dtype, and whether it is compiled."""

    owner: str  # "evomesh" or "transformers"
    dtype: str
    compiled: bool

    def __str__(self) -> str:
        """Return its name in the table."""
        return f"{self.owner} {self.dtype}" + " compiled" * self.compiled


SHAPES = {
    "demo": Shape(4, 192, 6, 512, 4096, (512,) * 2, kv_heads=2),
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
    shape: Shape,
    lengths: tuple[int, ...],
    ids: torch.Tensor,
    compiled: bool,
    dtype: str = "float32",
) -> Callable[[], float]:
    config = ModelConfig(
        model_type="LLAMA2",
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        num_attention_heads=shape.heads,
        num_kv_attention_heads=shape.kv_heads,
        mlp_ratio=shape.mlp / shape.hidden,
        multiple_of=1,
        dtype=dtype,
        no_bias=True,
        compile=compiled,
    )
    training, batch = Training(config, torch.device("cpu")), made_up(ids[None], lengths)
    return lambda: training.step(batch).loss


def their_step(
    shape: Shape,
    lengths: tuple[int, ...],
    ids: torch.Tensor,
    compiled: bool,
    dtype: str = "float32",
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
        num_key_value_heads=shape.kv_heads or shape.heads,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).train()
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


def serve(side: Side, args: argparse.Namespace, pipe: Connection) -> None:
    """One side in its own process: takes a step, and answers with its seconds, whenever it is asked to."""
    torch.set_num_threads(args.threads)
    shape, lengths = problem(args)
    ids = torch.randint(
        0, shape.vocab, (sum(lengths),), generator=torch.Generator().manual_seed(0)
    )
    if side.owner == "evomesh":
        keep_freed_memory()  # as `evomesh train` does
        step = our_step(shape, lengths, ids, side.compiled, side.dtype)
    else:
        step = their_step(shape, lengths, ids, side.compiled, side.dtype)
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


def problem(args: argparse.Namespace) -> tuple[Shape, tuple[int, ...]]:
    shape = SHAPES[args.shape]
    return shape, ragged(sum(shape.documents)) if args.packed else shape.documents


def product_rates(dtype: str = "float32") -> list[float]:
    """FLOP/s of matrix products, kept up for a while, of the best of a few shapes: torch.mm, and oneDNN."""
    rates = []
    for multiply in (lambda a, b: torch.mm(a, b.T), one_dnn):
        best = 0.0
        for m, k, n in PRODUCTS:
            a, b = (torch.randn(r, k).to(getattr(torch, dtype)) for r in (m, n))
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--against",
        choices=("theirs", "float32", "eager"),
        default="theirs",
        help="the other side: transformers, or our own step in float32 or without compiled blocks",
    )
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


def both_sides(args: argparse.Namespace) -> tuple[Side, Side]:
    """What is measured, and what it is compared with."""
    ours = Side("evomesh", args.dtype, args.compiled_ours)
    if args.against == "theirs":
        return ours, Side("transformers", args.dtype, args.compiled)
    if args.against == "eager":
        return ours, replace(ours, compiled=False)
    return ours, replace(ours, dtype="float32")


def profile(args: argparse.Namespace) -> None:
    shape, lengths = problem(args)
    keep_freed_memory()
    ids = torch.randint(
        0, shape.vocab, (sum(lengths),), generator=torch.Generator().manual_seed(0)
    )
    step = our_step(shape, lengths, ids, args.compiled_ours, args.dtype)
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
    for side in both_sides(args):
        pipe, theirs = spawn.Pipe()
        worker = spawn.Process(target=serve, args=(side, args, theirs), daemon=True)
        worker.start()
        sides.append((worker, pipe))

    def step(pipe: Connection) -> float:
        pipe.send(True)
        return float(pipe.recv())

    for _, pipe in sides:
        for _ in range(UNTIMED):
            step(pipe)
    pairs, peaks = [], [product_rates(args.dtype)]
    for _ in range(args.rounds):
        pairs.append([step(pipe) for _, pipe in sides])
        peaks.append(product_rates(args.dtype))
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
        f"{args.shape}: {total} tokens in {len(lengths)} documents, {args.threads} threads"
    )
    for side, times in zip(both_sides(args), zip(*pairs, strict=True), strict=True):
        seconds = statistics.median(times)
        share = statistics.median(
            flops / own / peak for own, peak in zip(times, around, strict=True)
        )
        speed = flops / seconds / 1e9
        print(
            f"  {side!s:30s} {total / seconds:8.1f} tokens/s  {speed:6.1f} GFLOP/s  {share:.2f} of best"
        )
    ratio = statistics.median(b / a for a, b in pairs)
    mm, dnn = (statistics.median(rates) / 1e9 for rates in zip(*peaks, strict=True))
    print(f"  best {args.dtype} product: torch.mm {mm:.1f}, oneDNN {dnn:.1f} GFLOP/s")
    print(f"  median ratio of speeds {ratio:.3f}")


if __name__ == "__main__":
    main()
