"""Scaling of the CPU training step with model size, sequence length, documents per pack, and steps.

Run: python benchmarks/growth.py [--threads 2] [--steps 5]

Each row runs in a separate process, a fresh interpreter: median seconds of a step (forward, backward, AdamW;
as in train_step.py), and the largest resident memory. Model FLOPs and the fraction of the best float32 product, as in
train_step.py. The first column of a table is what it varies; the rest is the 60M shape with 2048 tokens in 4 documents,
or in the last table the 10M shape with 256 tokens.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from train_step import SHAPES, UNTIMED, Shape, model_flops, our_step, product_rates

from evomesh.train.allocator import keep_freed_memory

TOKENS = 2048


def measure(shape: Shape, threads: int, steps: int, pipe: Connection) -> None:
    """Sends the seconds of each step, and the resident MiB after each."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    ids = torch.randint(
        0,
        shape.vocab,
        (sum(shape.documents),),
        generator=torch.Generator().manual_seed(0),
    )
    step = our_step(shape, shape.documents, ids, compiled=False)
    seconds, memory = [], []
    for _ in range(UNTIMED + steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    pipe.send((seconds, memory))


def row(
    shape: Shape, args: argparse.Namespace, steps: int | None = None
) -> tuple[list[float], list[float]]:
    spawn = get_context("spawn")
    pipe, theirs = spawn.Pipe()
    worker = spawn.Process(
        target=measure, args=(shape, args.threads, steps or args.steps, theirs)
    )
    worker.start()
    found: tuple[list[float], list[float]] = pipe.recv()
    worker.join()
    return found


def table(title: str, shapes: dict[str, Shape], args: argparse.Namespace) -> None:
    before = max(product_rates())
    print(
        f"\n{title:22s} {'s a step':>9s} {'tokens/s':>9s} {'GFLOP/s':>8s} {'of best':>8s} {'MiB':>6s}"
    )
    for name, shape in shapes.items():
        seconds, memory = row(shape, args)
        median = statistics.median(seconds[UNTIMED:])
        behind = max(product_rates())
        peak, before = (before + behind) / 2, behind
        speed, total = (
            model_flops(shape, shape.documents) / median,
            sum(shape.documents),
        )
        print(
            f"{name:22s} {median:9.3f} {total / median:9.0f} {speed / 1e9:8.0f} {speed / peak:8.2f} {memory[-1]:6.0f}",
            flush=True,
        )


def steps_table(args: argparse.Namespace) -> None:
    """One run of 1,000 small steps: neither seconds nor memory may grow."""
    seconds, memory = row(replace(SHAPES["10M"], documents=(64,) * 4), args, 1000)
    print(f"\n{'steps':22s} {'s a step':>9s} {'MiB':>6s}")
    for stop in (10, 30, 100, 300, 1000):
        print(
            f"{f'up to {stop}':22s} {statistics.median(seconds[stop // 3 : stop]):9.3f} {memory[stop - 1]:6.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = SHAPES["60M"]
    table("model size", dict(SHAPES), args)
    lengths = (128, 256, 512, 1024, 2048)
    table(
        "sequence length",
        {str(n): replace(base, documents=(n,) * (TOKENS // n)) for n in lengths},
        args,
    )
    table(
        "tokens a step",
        {
            str(n): replace(base, documents=(512,) * (n // 512))
            for n in (512, 1024, 4096)
        },
        args,
    )
    counts = (1, 2, 4, 16, 64, 256)
    table(
        "documents in a pack",
        {str(n): replace(base, documents=uneven(TOKENS, n)) for n in counts},
        args,
    )
    steps_table(args)


def uneven(total: int, count: int) -> tuple[int, ...]:
    """``count`` lengths of about the same size that add up to ``total``."""
    lengths = [
        total // count + (1 if i % 2 else -1) * (i % (total // count // 2 + 1)) // 2
        for i in range(count)
    ]
    lengths[-1] += total - sum(lengths)
    return tuple(lengths)


if __name__ == "__main__":
    main()
