"""Update rules against AdamW: the time of a training step, and the loss after equally many tokens of the demo.

Run: python benchmarks/optimizers.py [--data DEMO_FOLDER] [--steps 300] [--rounds 15]

Time: steps of two rules alternate within one run on the demo's model and batch, so that other load slows both; the
figure to quote is the median of the ratios of adjacent steps. Loss: ``evomesh train configs/demo.py`` with each rule,
from the same weights over the same packs, and its last validation; without --data it is left out. Learning rates are
in the table RULES: the demo's own for AdamW and Muon, to which its update is scaled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _product import made_up

from evomesh.config.loader import load_config
from evomesh.config.schema import Config, LossConfig
from evomesh.optim.scaler import LossScaler
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_optimizer, build_stages
from evomesh.train.step import train_step

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.py"
# Name of a row: settings.
RULES: dict[str, list[str]] = {
    "AdamW": ["optimizer.type=adamw"],
    "Muon, bfloat16": ["optimizer.type=muon"],
    "Muon, float32": ["optimizer.type=muon", "optimizer.ns_dtype=float32"],
    "Lion": ["optimizer.type=lion", "adam.lr=4e-4", "lr_scheduler.eta_min=4e-5"],
    "Schedule-Free AdamW": [
        "optimizer.type=schedule_free",
        "lr_scheduler.eta_min=2e-3",
    ],
}
WARM_UP = 3  # steps


class RuleTraining:
    """The demo's model and one update rule, on made-up tokens."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stages = build_stages(config, Grid(), MODES["mtp"], torch.device("cpu"))
        self.stages.initialize(1, Grid())
        self.optimizer = build_optimizer(config, self.stages, Grid())
        self.scaler = LossScaler(config.grad_scaler, config.model.dtype)
        data = config.data
        shape = (data.micro_num, data.packed_length)
        ids = torch.randint(3, config.model.vocab_size, shape)
        self.batch = made_up(ids, (data.seq_len,) * data.micro_bsz)

    def seconds(self) -> float:
        """Return how long one step takes."""
        started = time.perf_counter()
        train_step(
            self.batch,
            schedule=self.stages.schedule,
            optimizer=self.optimizer,
            scaler=self.scaler,
            grid=Grid(),
            loss_config=LossConfig(),
            data_types=["en"],
            lr=1e-4,
            beta2=0.95,
        )
        return time.perf_counter() - started


def step_ratio(sets: list[str], rounds: int) -> float:
    """Return how many times as long as with AdamW a step takes."""
    reference = RuleTraining(load_config(str(DEMO)).config)
    other = RuleTraining(load_config(str(DEMO), sets).config)
    ratios = []
    for number in range(WARM_UP + rounds):
        ours = other.seconds()
        theirs = reference.seconds()
        if number >= WARM_UP:
            ratios.append(ours / theirs)
    return statistics.median(ratios)


def validation_losses(sets: list[str], data: Path, steps: int) -> dict[str, float]:
    """Train the demo for ``steps`` steps and return the losses of its validation sets."""
    settings = [
        f"data.total_steps={steps}",
        f"lr_scheduler.total_steps={steps}",
        f"data.valid_every={steps}",
        "ckpt.enable_save_ckpt=False",
        "ckpt.auto_resume=False",
        *sets,
    ]
    command = [sys.executable, "-m", "evomesh", "train", str(DEMO)]
    for setting in settings:
        command += ["--set", setting]
    environment = os.environ | {"DEMO_DATA": str(data), "PYTHONPATH": str(ROOT)}
    with TemporaryDirectory() as folder:
        subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True
        )
        (path,) = Path(folder).glob("RUN/*/*/metrics.jsonl")
        last: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    return {
        key.removeprefix("val/").removesuffix("_loss"): value
        for key, value in last.items()
        if key.startswith("val/") and key.endswith("_loss")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of tools/demo_data.py")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(
        f"| rule | time of a step / AdamW's | validation after {options.steps} steps |"
    )
    print("|---|---|---|")
    for name, sets in RULES.items():
        ratio = step_ratio(sets, options.rounds)
        words = ""
        if options.data is not None:
            found = validation_losses(sets, options.data.absolute(), options.steps)
            words = ", ".join(f"{key} {loss:.3f}" for key, loss in found.items())
        print(f"| {name} | {ratio:.2f} | {words} |", flush=True)


if __name__ == "__main__":
    main()
