"""What is found out about a step, against autograd on each micro-batch alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, Config
from evomesh.layers.sequence_bounds import micro_batch_bounds
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.train import court as court_module
from evomesh.train.court import StepCourt
from evomesh.train.court_text import _document_line, describe_court
from evomesh.train.stages import ModelStages
from tests.unit.train.test_step import MODEL, batch_of, losses_of, stages_of

CONFIG = Config(model=MODEL)
MICRO_BATCHES = 3
NO_DATA: Any = SimpleNamespace()


def court_of(stages: ModelStages) -> StepCourt:
    optimizer = ZeroOptimizer(
        stages.parameters().items(), CONFIG.adam, CONFIG.hybrid_zero_optimizer, Grid(), stages.module
    )  # fmt: skip
    return StepCourt(CONFIG, stages, optimizer, Grid(), NO_DATA)


def alone(index: int) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients that one micro-batch gives the step, and what the first block returns, by autograd."""
    stages, batch = stages_of(), batch_of(MICRO_BATCHES)
    (model,) = stages.models
    seen: list[Tensor] = []
    block = model.get_submodule("layers.0")
    block.register_forward_hook(lambda _, __, output: seen.append(output))
    hidden = model(batch.tokens[index], micro_batch_bounds(batch, index))
    logits = model.logits(hidden)
    loss = torch.nn.functional.cross_entropy(
        logits, batch.labels[index], ignore_index=IGNORE, reduction="sum"
    )
    (loss / (batch.labels != IGNORE).sum()).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return grads, seen[0].detach()


def test_equals_autograd_on_each_micro_batch() -> None:
    stages = stages_of()
    before = {k: p.detach().clone() for k, p in stages.parameters().items()}
    row = court_of(stages).examine(7, batch_of(MICRO_BATCHES))
    found = {entry["micro_batch"]: entry for entry in row["micro_batches"]}
    assert len(found) == MICRO_BATCHES
    losses = losses_of(batch_of(MICRO_BATCHES))
    norms = []
    for index in range(MICRO_BATCHES):
        grads, _ = alone(index)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        norms.append(norm)
        assert found[index]["loss"] == pytest.approx(float(losses[index].mean()), rel=1e-12)  # fmt: skip
        assert found[index]["grad_norm"] == pytest.approx(norm, rel=1e-10)
        assert found[index]["targets"] == len(losses[index])
    # The layers are those of the most suspicious micro-batch.
    accused = row["micro_batches"][0]["micro_batch"]
    grads, activations = alone(accused)
    (layer,) = [one for one in row["layers"] if one["layer"] == "layers.0"]
    squares = [float(g.square().sum()) for k, g in grads.items() if k.startswith("layers.0.")]  # fmt: skip
    assert layer["grad_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-10)
    assert layer["activation_max"] == pytest.approx(float(activations.abs().max()))
    assert layer["activation_rms"] == pytest.approx(
        float(activations.square().mean().sqrt())
    )
    suspicions = [entry["suspicion"] for entry in row["micro_batches"]]
    assert suspicions == sorted(suspicions, reverse=True)
    others = sorted(norms[:accused] + norms[accused + 1 :])
    by_norm = norms[accused] / (sum(others) / 2)
    assert suspicions[0] == pytest.approx(by_norm) or suspicions[0] > by_norm
    # Nothing was updated, and no gradient is left behind.
    for name, parameter in stages.parameters().items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None or not parameter.grad.any()


def test_a_part_that_is_not_shown_whole_says_how_much_follows() -> None:
    document = {"file": "en/a.bin", "row": 7, "start": 10, "stop": 13, "ids": [1, 2, 3]}
    whole = "    en/a.bin:7 tokens 10..12: [1, 2, 3]"
    assert _document_line(document) == whole
    longer = {**document, "stop": 20}
    assert _document_line(longer) == whole.replace("12", "19") + " and 7 tokens more"


def test_nan_in_a_layer_is_found_where_it_begins() -> None:
    stages = stages_of()
    with torch.no_grad():
        stages.parameters()["layers.1.attention.wo.weight"][0, 0] = math.nan
    row = court_of(stages).examine(7, batch_of(MICRO_BATCHES))
    assert row["layers"][0]["layer"] == "layers.1"
    assert row["layers"][0]["not_finite"] > 0
    assert all(math.isnan(entry["loss"]) for entry in row["micro_batches"])
    text = "\n".join(describe_court(row))
    assert "layers.1: " in text and "not finite" in text


def test_of_many_micro_batches_those_with_the_highest_losses_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(court_module, "MOST_GRADIENTS", 1)
    row = court_of(stages_of()).examine(7, batch_of(MICRO_BATCHES))
    norms = {entry["loss"]: entry["grad_norm"] for entry in row["micro_batches"]}
    assert [loss for loss, norm in norms.items() if norm is not None] == [max(norms)]
    assert "not computed" in "\n".join(describe_court(row))
