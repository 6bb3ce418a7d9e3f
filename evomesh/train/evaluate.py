"""Validation: every set under ``valid_folder``, token-weighted over all of it."""

from __future__ import annotations

import torch

from evomesh.data.build import ValidSet
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.grid import Grid
from evomesh.train.batches import to_device
from evomesh.train.step import documents_of
from evomesh.train.tally import Tally


@torch.no_grad()
def evaluate(model: LanguageModel, sets: list[ValidSet], grid: Grid, device: torch.device) -> dict[str, float]:
    """``val/{name}_loss``, ``_acc`` and ``_plex`` of each set; a set without a single target token is absent."""
    was_training = model.training
    model.eval()
    results: dict[str, float] = {}
    for valid in sets:
        tally = Tally([valid.name], device)
        for host_batch in valid.batches(grid.dp.rank, grid.dp.size):
            batch = to_device(host_batch, device)
            for index in range(len(batch.input_ids)):
                output = model.loss(
                    model(batch.input_ids[index], documents_of(batch, index)), batch.labels[index], 1.0, 0.0
                )
                tally.add(output, batch.labels[index], torch.zeros_like(batch.type_ids[index]))
        summary = tally.reduce(grid.dp).summary()
        if summary:
            results[f"val/{valid.name}_loss"] = summary["loss"]
            results[f"val/{valid.name}_acc"] = summary["acc"]
            results[f"val/{valid.name}_plex"] = summary["perplexity"]
    model.train(was_training)
    return results
