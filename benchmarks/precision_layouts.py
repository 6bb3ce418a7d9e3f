"""200 steps in bfloat16 and in float16, in six layouts of four processes: do the curves stay together?

Across layouts sums are rounded in another order, so that 16-bit runs part after some steps. They must not part by more
than two seeds do. Prints, for each layout, how far its loss is from that of pure data parallelism, beside how far
another seed is.

Run from the repository: OMP_NUM_THREADS=1 torchrun --nproc_per_node=4 benchmarks/precision_layouts.py [--steps 200]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from evomesh.config.schema import IGNORE, Config
from evomesh.data.batch import Batch
from evomesh.optim.scaler import LossScaler
from evomesh.parallel.build import build_grid
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_optimizer, build_stages
from evomesh.train.step import train_step

T, PACKS, VOCAB, WARMUP, RATE, WINDOW = 64, 4, 96, 20, 3e-3, 10
MODEL: dict[str, Any] = {
    "model_type": "LLAMA2",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_attention_heads": 2,
    "mlp_ratio": 2.0,
    "multiple_of": 32,
    "vocab_size": VOCAB,
    "no_bias": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1 2 of 4, fsdp": {"zero1": {"size": 2, "fsdp": True}},
    "mtp 2, zero1 off": {"tensor": {"size": 2, "mode": "mtp"}, "zero1": {"size": 1}},
    "msp 2": {"tensor": {"size": 2, "mode": "msp"}},
    "fsp 2": {"tensor": {"size": 2, "mode": "fsp"}},
    "isp 2, weights over 4": {
        "tensor": {"size": 2, "mode": "isp"},
        "weight": {"size": 4},
    },
    "1F1B 2, mtp 2": {"pipeline": {"size": 2}, "tensor": {"size": 2, "mode": "mtp"}},
}


def text(seed: int, step: int) -> torch.Tensor:
    """[PACKS, T + 1] ids of a language in which each pair of tokens makes one of four followers likely."""
    table = torch.randint(
        VOCAB, (VOCAB, VOCAB, 4), generator=torch.Generator().manual_seed(5)
    )
    draw = torch.Generator().manual_seed(1_000_003 * seed + step)
    rows = [torch.randint(VOCAB, (PACKS,), generator=draw) for _ in range(2)]
    choices = torch.randint(4, (T, PACKS), generator=draw)
    for choice in choices[:-1]:
        rows.append(table[rows[-2] % 8, rows[-1], choice])
    return torch.stack(rows, dim=1)


def batch(seed: int, step: int, grid: Grid) -> Batch:
    ids = text(seed, step)[grid.dp.rank :: grid.dp.size]
    positions = torch.arange(T).expand(len(ids), T)
    bounds = torch.tensor([0, T], dtype=torch.int32).expand(len(ids), 2)
    labels = ids[:, 1:].clone()
    labels[:, -1] = IGNORE
    return Batch(
        ids[:, :-1].contiguous(),
        labels,
        positions,
        torch.zeros_like(positions),
        bounds,
        T,
    )


def curve(layout: dict[str, Any], dtype: str, seed: int, steps: int) -> list[float]:
    """The losses of one run."""
    config = Config.model_validate(
        {"model": {**MODEL, "dtype": dtype}, "parallel": layout, "data": {"seq_len": T}}
    )
    grid = build_grid(config.parallel, dist.get_world_size(), dist.get_rank())
    stages = build_stages(
        config, grid, MODES[config.parallel.tensor.mode], torch.device("cpu")
    )
    stages.initialize(seed, grid)
    optimizer = build_optimizer(config, stages, grid)
    scaler = LossScaler(config.grad_scaler, config.model.dtype)
    losses = []
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / WARMUP)
        data = batch(seed, step, grid)
        output = train_step(
            data,
            schedule=stages.schedule,
            optimizer=optimizer,
            scaler=scaler,
            grid=grid,
            loss_config=config.loss,
            data_types=["x"],
            lr=rate,
            beta2=0.95,
        )
        assert output is not None
        losses.append(output.loss)
    return losses


def apart(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(mean, largest) distance of two curves, each smoothed over ``WINDOW`` steps."""
    means = [
        [statistics.fmean(x[i : i + WINDOW]) for i in range(0, len(x), WINDOW)]
        for x in (a, b)
    ]
    distances = [abs(x - y) for x, y in zip(*means, strict=True)]
    return statistics.fmean(distances), max(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    say = partial(print, flush=True) if dist.get_rank() == 0 else lambda *_: None
    started = time.monotonic()
    for dtype in ("bfloat16", "float16"):
        first = curve({}, dtype, 1, steps)
        other = apart(curve({}, dtype, 2, steps), first)
        say(
            f"| {dtype}: loss {first[0]:.3f} to {first[-1]:.3f} | mean distance | largest |"
        )
        say("| --- | --- | --- |")
        say(f"| data parallel 4, another seed | {other[0]:.4f} | {other[1]:.4f} |")
        for name, layout in LAYOUTS.items():
            found = apart(curve(layout, dtype, 1, steps), first)
            within = all(x <= y for x, y in zip(found, other, strict=True))
            say(
                f"| {name} | {found[0]:.4f} | {found[1]:.4f} |{'' if within else ' OUTSIDE'}"
            )
        say(f"\n{time.monotonic() - started:.0f} s\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
