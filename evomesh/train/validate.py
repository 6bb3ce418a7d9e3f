"""Validation: the token-weighted loss of every set under ``valid_folder``."""

from __future__ import annotations

import logging
import math

import torch

from evomesh.data.batch import Batch
from evomesh.data.build import ValidationSet
from evomesh.layers.loss import LossOutput
from evomesh.parallel.grid import Grid
from evomesh.quantities import counted
from evomesh.train.stages import ModelStages
from evomesh.train.tally import LossTally
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

logger = logging.getLogger(__name__)
LONG_BATCHES = 50  # of a rank: a validation of so many is announced


def validate(
    stages: ModelStages,
    sets: list[ValidationSet],
    grid: Grid,
    device: torch.device,
    announced_from: int = LONG_BATCHES,
) -> dict[str, float]:
    """Return ``val/{name}_loss``, ``_acc``, ``_plex`` and ``_bpb`` of each set; one without target tokens is absent.

    Bits per byte (``_bpb``) are of those sets whose fingerprints count the bytes.

    Args:
        announced_from: batches of a rank from which on the log says that a validation begins, and how long it is.
    """
    counts = {valid.name: valid.num_batches(grid.dp.size) for valid in sets}
    if sum(counts.values()) >= announced_from:
        logger.info("%s", announcement(counts, grid.dp.size))
    was_training = stages.module.training
    stages.module.eval()
    results: dict[str, float] = {}
    for valid in sets:
        tally = LossTally([valid.name], device)
        for host_batch in valid.batches(grid.dp.rank, grid.dp.size):
            batch = host_batch.to(device)
            _tally_batch(stages, batch, tally)
        # Sums first, then one mean: the loss does not depend on how many ranks share
        # the set.
        total = tally.reduce(grid.dp, grid.pp)
        summary = total.summary()
        if not summary:
            continue
        results[f"val/{valid.name}_loss"] = summary["loss"]
        results[f"val/{valid.name}_acc"] = summary["acc"]
        results[f"val/{valid.name}_plex"] = summary["perplexity"]
        if valid.text_bytes:
            # The nats of all targets, as bits, over what they spell: comparable between
            # tokenizers. A document's first token is no target, an eos spells nothing.
            nats = summary["loss"] * total.targets
            bits = nats / math.log(2)
            results[f"val/{valid.name}_bpb"] = bits / valid.text_bytes
    stages.module.train(was_training)
    return results


def announcement(counts: dict[str, int], dp_size: int) -> str:
    """Return the line that says how many batches of which sets each rank is about to read."""
    total = sum(counts.values())
    of_sets = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    ranks = "" if dp_size == 1 else f" on each of {dp_size} data-parallel ranks"
    return f"validating: {counted(total, 'batch')}{ranks} ({of_sets})"


def figures_of_average(averaged: dict[str, float]) -> dict[str, float]:
    """Return the results of the weights' moving average under their names: ``val/en.ema_loss`` for ``val/en_loss``."""
    figures: dict[str, float] = {}
    for key, value in averaged.items():
        name, _, measure = key.rpartition("_")
        figures[f"{name}.ema_{measure}"] = value
    return figures


def validation_figures(sets: list[ValidationSet]) -> list[str]:
    """Return the names of the figures that ``validate`` returns of these sets."""
    figures = []
    for valid in sets:
        kinds = ["loss", "acc", "plex", *(["bpb"] if valid.text_bytes else [])]
        figures += [f"val/{valid.name}_{kind}" for kind in kinds]
    return figures


def _tally_batch(stages: ModelStages, batch: Batch, tally: LossTally) -> None:
    def add(index: int, output: LossOutput) -> None:
        labels = batch.labels[index]
        one_type = torch.zeros_like(batch.type_ids[index])
        tally.add(output, labels, one_type)

    # Each batch counts as progress of this rank.
    with this_process().phase(Place.FORWARD_BACKWARD):
        stages.schedule.evaluate(batch, add)
