"""Tokens per second of training steps on the CPU beside other programs, by how OpenMP's threads wait for each other.

Run: python benchmarks/busy_machine.py [--shape 10M] [--loops 0 4] [--seconds 15] [--rounds 2]

So many busy loops run beside the steps. Settings take turns within a round; each turn is a separate process, because
OpenMP reads the variables when it is loaded. The figure is the median over rounds, and the ratio that to the default of
OpenMP, without other load.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    "OpenMP's default": {},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def measure_here(shape_name: str, seconds: float) -> float:
    """Tokens per second of steps, after three to warm up."""
    import torch
    from train_step import SHAPES, our_step

    shape = SHAPES[shape_name]
    tokens = sum(shape.documents)
    ids = torch.randint(
        shape.vocab, (tokens,), generator=torch.Generator().manual_seed(0)
    )
    step = our_step(shape, shape.documents, ids, compiled=False)
    for _ in range(3):
        step()
    start = time.perf_counter()
    steps = 0
    while time.perf_counter() - start < seconds:
        step()
        steps += 1
    return steps * tokens / (time.perf_counter() - start)


def measure(setting: dict[str, str], loops: int, args: argparse.Namespace) -> float:
    """Tokens per second in a new process beside so many busy loops."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(loops)
    ]
    try:
        command = [sys.executable, __file__, "--here", "--shape", args.shape]
        done = subprocess.run(
            [*command, "--seconds", str(args.seconds)],
            check=True,
            cwd=Path(__file__).parent,
            env=kept | setting,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="10M")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(measure_here(args.shape, args.seconds))
        return
    print(
        f"{args.shape}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    )
    print(
        "| busy loops | threads wait by | tokens/s | ratio to the default without load |"
    )
    print("|---|---|---|---|", flush=True)
    reference = 0.0
    for loops in args.loops:
        speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(args.rounds):
            for name, setting in SETTINGS.items():
                speeds[name].append(measure(setting, loops, args))
        for name, found in speeds.items():
            speed = statistics.median(found)
            reference = reference or speed
            print(
                f"| {loops} | {name} | {speed:.0f} | {speed / reference:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
