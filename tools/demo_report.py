"""Compare the trained demo model with a unigram and a bigram model of the same data, then print a sample.

    python tools/demo_report.py FOLDER

The two count models are fitted on every training token, and the bigram's interpolation weight is chosen on the held-out
text itself, which favors the bigram. All three are scored on the same held-out targets. Exits with an error if the demo
model does not beat both, or if its training loss did not halve.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from evomesh.config.loader import load_config
from evomesh.config.schema import IGNORE
from evomesh.data.build import ValidationSet, build_train_data, build_valid_data

CONFIG = "configs/demo.py"
CHECKPOINTS = "llm_ckpts/demo"
# Tried for the interpolation with the unigram.
BIGRAM_WEIGHTS = (1, 3, 10, 30, 100, 300, 1000)


class TokenPairs(NamedTuple):
    """Tokens and the token that follows each of them."""

    previous: np.ndarray
    following: np.ndarray


def held_out_pairs(valid: ValidationSet) -> TokenPairs:
    """Return the inputs and targets of a validation set."""
    tokens = []
    targets = []
    for batch in valid.batches(0, 1):
        is_target = batch.labels != IGNORE
        tokens.append(batch.tokens[is_target].numpy())
        targets.append(batch.labels[is_target].numpy())
    return TokenPairs(np.concatenate(tokens), np.concatenate(targets))


def training_pairs(folder: Path) -> TokenPairs:
    """Return the pairs of neighbors in all documents below a folder."""
    previous = []
    following = []
    for path in sorted(folder.rglob("*.bin")):
        for line in path.open():
            tokens = json.loads(line)["tokens"]
            previous += tokens[:-1]
            following += tokens[1:]
    return TokenPairs(np.array(previous), np.array(following))


class CountModels:
    """Unigram (add-one) and bigram (interpolated with the unigram) models, fitted by counting."""

    def __init__(self, pairs: TokenPairs, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        counts = np.bincount(pairs.following, minlength=vocab_size) + 1
        self.unigram = counts / counts.sum()
        self.context_counts = np.bincount(pairs.previous, minlength=vocab_size)
        self.pair_ids, self.pair_counts = np.unique(
            self._ids(pairs), return_counts=True
        )

    def _ids(self, pairs: TokenPairs) -> np.ndarray:
        """Return one number for each pair."""
        return pairs.previous * self.vocab_size + pairs.following

    def losses(self, pairs: TokenPairs) -> tuple[float, float]:
        """Return the mean negative log-likelihood, in nats, of the unigram and of the bigram model."""
        # How often each pair occurs in the training data.
        ids = self._ids(pairs)
        index = np.searchsorted(self.pair_ids, ids).clip(max=len(self.pair_ids) - 1)
        is_known = self.pair_ids[index] == ids
        pair_counts = np.where(is_known, self.pair_counts[index], 0)

        unigram = self.unigram[pairs.following]
        context_counts = self.context_counts[pairs.previous]
        bigram_losses = []
        for weight in BIGRAM_WEIGHTS:
            bigram = (pair_counts + weight * unigram) / (context_counts + weight)
            bigram_losses.append(-np.log(bigram).mean())
        return float(-np.log(unigram).mean()), float(min(bigram_losses))


def read_metrics(run_folder: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return the metrics of all training steps and those of the last validation of a run."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if any(key.startswith("val/") for key in row)]
    return steps, validations[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    config = load_config(CONFIG).config
    run_folder = max(Path("RUN/demo").iterdir(), key=lambda path: path.stat().st_mtime)
    steps, validation = read_metrics(run_folder)
    vocab_size = config.model.vocab_size
    build_train_data(config.data, vocab_size)  # check the dataset before counting
    count_models = CountModels(training_pairs(folder / "train"), vocab_size)

    table = Table(title="held-out loss (nats per token, lower is better)")
    for column in ("set", "tokens", "this model", "bigram", "unigram"):
        table.add_column(column, justify="left" if column == "set" else "right")
    is_best = True
    for valid in build_valid_data(config.data, vocab_size):
        pairs = held_out_pairs(valid)
        unigram, bigram = count_models.losses(pairs)
        demo = validation[f"val/{valid.name}_loss"]
        is_best &= demo < min(unigram, bigram)
        losses = [f"{loss:.3f}" for loss in (demo, bigram, unigram)]
        table.add_row(valid.name, f"{len(pairs.following):,}", *losses)
    first = steps[0]["loss"]
    last = float(np.mean([row["loss"] for row in steps[-20:]]))
    console = Console()
    console.print(
        f"training loss: {first:.3f} at step 0, {last:.3f} over the last 20 of {len(steps)} steps"
    )
    console.print(table)
    if last >= first / 2 or not is_best:
        sys.exit("the demo did not learn as much as it should: see the table")
    prompt = 'def read_file(path):\n    """'
    command = [
        sys.executable,
        "-m",
        "evomesh",
        "generate",
        "--ckpt",
        CHECKPOINTS,
        "--prompt",
        prompt,
    ]
    subprocess.run(
        [*command, "--max-new-tokens", "80", "--temperature", "0.5", "--seed", "1"],
        check=True,
    )


if __name__ == "__main__":
    main()
