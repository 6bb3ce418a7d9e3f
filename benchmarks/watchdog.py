"""Measure what the watchdog's records cost: their number in a step, times the time of one, beside the step.

    python benchmarks/watchdog.py [--steps 40]

Trains the demo's model and a tiny one on synthetic tokens, on one process, and counts what a step records. A record is
timed alone: the share is a product, since the difference of two runs would be far below their noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from evomesh import load_config, run_training
from evomesh.watchdog.activity import Activity, Place

RECORDS = 20_000
MODELS = {
    "the demo's": ("num_layers=4, hidden_size=192, num_attention_heads=6", 512),
    "tiny": ("num_layers=2, hidden_size=32, num_attention_heads=2", 64),
}
CONFIG = """
JOB_NAME = "watched"
model_type = "LLAMA2"
model = dict({sizes}, vocab_size=4096, dtype="torch.float32")
data = dict(seq_len={length}, micro_bsz=2, micro_num=1, total_steps={steps}, train_folder=None)
lr_scheduler = dict(total_steps={steps})
ckpt = dict(enable_save_ckpt=False)
run_dir = "run"
"""


@contextmanager
def in_empty_folder() -> Iterator[None]:
    """Work in a temporary folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def seconds_of_a_record() -> float:
    """Time one frame, entered and left."""
    activity = Activity()
    with in_empty_folder():
        activity.open(Path.cwd(), 0)
        started = time.perf_counter()
        for number in range(RECORDS):
            activity.leave(activity.enter(Place.ALL_REDUCE, "dp", number, ""))
        passed = time.perf_counter() - started
        activity.close()
    return passed / RECORDS


def train_and_count(model: str, steps: int) -> tuple[float, float]:
    """Return the frames and the seconds of a step, the median of the second half of a run."""
    sizes, length = MODELS[model]
    entered = 0
    enter = Activity.enter

    def counting(self: Activity, *arguments: Any) -> bool:
        nonlocal entered
        entered += 1
        return enter(self, *arguments)

    with in_empty_folder(), patch.object(Activity, "enter", counting):
        text = CONFIG.format(sizes=sizes, length=length, steps=steps)
        Path("config.py").write_text(text)
        run_training(load_config("config.py"))
        lines = Path("run/metrics.jsonl").read_text().splitlines()
    rates = [
        json.loads(line)["tgs (tokens/gpu/second)"] for line in lines[steps // 2 :]
    ]
    return entered / steps, 2 * length / statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    one = seconds_of_a_record()
    table = Table("model", "step", "frames a step", "a frame", "share of a step")
    for model in MODELS:
        frames, step = train_and_count(model, steps)
        share = frames * one / step
        table.add_row(
            model,
            f"{step * 1e3:.1f} ms",
            f"{frames:.0f}",
            f"{one * 1e6:.1f} us",
            f"{share:.3%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
