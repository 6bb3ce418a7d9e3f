"""Holds the trained demo model against a unigram and a bigram model of the same data, then prints a sample.

    python tools/demo_report.py FOLDER

The two counted models are fitted on every training token; the bigram's interpolation weight is chosen on the
held-out text itself, in its favour. All three are scored on the same held-out targets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from evomesh.config.loader import load_config
from evomesh.config.schema import IGNORE
from evomesh.data.build import ValidationSet, build_train_data, build_valid_data

CONFIG = "configs/demo.py"
CHECKPOINTS = "llm_ckpts/demo"
Pairs = tuple[np.ndarray, np.ndarray]  # a token and the one that follows it


def held_out_pairs(valid: ValidationSet) -> Pairs:
    tokens, targets = [], []
    for batch in valid.batches(0, 1):
        real = batch.labels != IGNORE
        tokens.append(batch.tokens[real].numpy())
        targets.append(batch.labels[real].numpy())
    return np.concatenate(tokens), np.concatenate(targets)


def training_pairs(folder: Path) -> Pairs:
    rows = [json.loads(line)["tokens"] for path in sorted(folder.rglob("*.bin")) for line in path.open()]
    lists = [row for row in rows if len(row) > 1]
    return np.concatenate([row[:-1] for row in lists]), np.concatenate([row[1:] for row in lists])


class Counted:
    """Unigram (add-one) and bigram (interpolated with it) models by counting."""

    def __init__(self, pairs: Pairs, vocab_size: int) -> None:
        previous, following = pairs
        self.vocab_size = vocab_size
        self.unigram = (np.bincount(following, minlength=vocab_size) + 1) / (len(following) + vocab_size)
        self.context = np.bincount(previous, minlength=vocab_size)
        self.keys, self.counts = np.unique(previous * vocab_size + following, return_counts=True)

    def losses(self, pairs: Pairs) -> tuple[float, float]:
        """Mean negative log-likelihood in nats of the unigram and of the bigram model."""
        previous, following = pairs
        key = previous * self.vocab_size + following
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        seen = np.where(self.keys[place] == key, self.counts[place], 0)
        base = self.unigram[following]
        bigrams = [
            -np.log((seen + weight * base) / (self.context[previous] + weight)).mean()
            for weight in (1, 3, 10, 30, 100, 300, 1000)
        ]
        return float(-np.log(base).mean()), float(min(bigrams))


def logged(run_folder: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """All training steps and the last validation of a run."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    return steps, next(row for row in reversed(rows) if any(key.startswith("val/") for key in row))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    config = load_config(CONFIG).config
    run_folder = max(Path("RUN/demo").iterdir(), key=lambda path: path.stat().st_mtime)
    steps, validation = logged(run_folder)
    vocab_size = config.model.vocab_size
    build_train_data(config.data, vocab_size)  # the dataset is checked before anything is counted
    counted = Counted(training_pairs(folder / "train"), vocab_size)

    table = Table(title="held-out loss (nats per token, lower is better)")
    for column in ("set", "tokens", "this model", "bigram", "unigram"):
        table.add_column(column, justify="left" if column == "set" else "right")
    beaten = True
    for valid in build_valid_data(config.data, vocab_size):
        pairs = held_out_pairs(valid)
        unigram, bigram = counted.losses(pairs)
        ours = validation[f"val/{valid.name}_loss"]
        beaten &= ours < min(unigram, bigram)
        table.add_row(valid.name, f"{len(pairs[0]):,}", f"{ours:.3f}", f"{bigram:.3f}", f"{unigram:.3f}")
    first, last = steps[0]["loss"], float(np.mean([row["loss"] for row in steps[-20:]]))
    console = Console()
    console.print(f"training loss: {first:.3f} at step 0, {last:.3f} over the last 20 of {len(steps)} steps")
    console.print(table)
    if last >= first / 2 or not beaten:
        sys.exit("the demo did not learn what it should: see the table")
    prompt = 'def read_file(path):\n    """'
    command = [sys.executable, "-m", "evomesh", "generate", "--ckpt", CHECKPOINTS, "--prompt", prompt]
    subprocess.run([*command, "--max-new-tokens", "80", "--temperature", "0.5", "--seed", "1"], check=True)


if __name__ == "__main__":
    main()
