"""Validation: the token-weighted loss of every set under ``valid_folder``."""

from __future__ import annotations

import torch

from evomesh.data.batch import Batch
from evomesh.data.build import ValidationSet
from evomesh.layers.loss import LossOutput
from evomesh.parallel.grid import Grid
from evomesh.train.stages import ModelStages
from evomesh.train.tally import LossTally
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place


def validate(
    stages: ModelStages, sets: list[ValidationSet], grid: Grid, device: torch.device
) -> dict[str, float]:
    """Return ``val/{name}_loss``, ``_acc`` and ``_plex`` of each set; a set without target tokens is absent."""
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
    stages.module.train(was_training)
    return results


def _tally_batch(stages: ModelStages, batch: Batch, tally: LossTally) -> None:
    def add(index: int, output: LossOutput) -> None:
        tally.add(output, batch.labels[index], torch.zeros_like(batch.type_ids[index]))

    # Each batch counts as progress of this rank.
    with this_process().phase(Place.FORWARD_BACKWARD):
        stages.schedule.evaluate(batch, add)
