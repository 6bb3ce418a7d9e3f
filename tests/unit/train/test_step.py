"""One optimizer step and one validation, against means computed here from every token's own loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.data import DataConfig
from evomesh.config.schema import IGNORE, Config, LossConfig, ModelConfig, ScalerConfig
from evomesh.data.batch import Batch
from evomesh.data.build import build_valid_data
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import ModelStages, build_stages
from evomesh.train.step import StepOutput, seed_step, train_step
from evomesh.train.validate import validate
from tests.support.covers import covers
from tests.support.golden import write_folder
from tests.support.tolerances import ACCUMULATION, distance

CPU = torch.device("cpu")
VOCAB, LENGTH, DOCUMENTS = 256, 12, 6
SHAPE = dict(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    mlp_ratio=2.0,
    multiple_of=8,
    vocab_size=VOCAB,
)
MODEL = ModelConfig(model_type="LLAMA2", dtype="float64", no_bias=True, **SHAPE)  # type: ignore[arg-type]


def stages_of(model: ModelConfig = MODEL) -> ModelStages:
    stages = build_stages(Config(model=model), Grid(), MODES["mtp"], CPU)
    stages.initialize(3, Grid())
    with torch.no_grad():  # large enough for the tokens' losses to differ
        for parameter in stages.module.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return stages


def batch_of(micro_num: int) -> Batch:
    """The same six documents in ``micro_num`` micro-batches; the number of targets differs from one to the next."""
    ids = torch.randint(
        VOCAB, (DOCUMENTS * LENGTH + 1,), generator=torch.Generator().manual_seed(0)
    )
    inputs, labels = ids[:-1].clone(), ids[1:].clone()
    for document in range(DOCUMENTS):
        labels[document * LENGTH : document * LENGTH + 2 * document] = IGNORE
    bounds = torch.arange(
        0, DOCUMENTS * LENGTH // micro_num + 1, LENGTH, dtype=torch.int32
    )
    positions = torch.arange(LENGTH).repeat(DOCUMENTS)
    rows = [
        part.view(micro_num, -1)
        for part in (inputs, labels, positions, torch.zeros_like(inputs))
    ]
    return Batch(*rows, bounds.repeat(micro_num, 1), LENGTH)


def step(
    stages: ModelStages,
    batch: Batch,
    loss: LossConfig,
    scaler: ScalerConfig | None = None,
) -> StepOutput:
    config = Config()
    optimizer = ZeroOptimizer(
        stages.parameters().items(),
        config.adam,
        config.hybrid_zero_optimizer,
        Grid(),
        stages.module,
    )
    dtype = "float16" if scaler else "float64"
    with_scale = LossScaler(scaler or config.grad_scaler, dtype)
    output = train_step(
        batch,
        schedule=stages.schedule,
        optimizer=optimizer,
        scaler=with_scale,
        grid=Grid(),
        loss_config=loss,
        data_types=["en"],
        lr=1e-2,
        beta2=0.95,
    )
    assert output is not None
    return output


def token_losses(stages: ModelStages, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the losses of the targets of one document, from whole logits."""
    (model,) = stages.models
    with torch.no_grad():
        logits = model.logits(model(ids, single_sequence(len(ids))))
    return torch.nn.functional.cross_entropy(
        logits, labels, reduction="none", ignore_index=IGNORE
    )[labels != IGNORE]


def losses_of(batch: Batch) -> list[Tensor]:
    """Return the losses of each micro-batch's targets, before the step."""
    stages = stages_of()
    return [
        torch.cat(
            [
                token_losses(stages, *parts)
                for parts in zip(ids.split(LENGTH), labels.split(LENGTH), strict=True)
            ]
        )
        for ids, labels in zip(batch.tokens, batch.labels, strict=True)
    ]


@pytest.mark.parametrize("micro_num", [2, 6])
def test_many_micro_batches_are_one_large_batch(micro_num: int) -> None:
    one, many = stages_of(), stages_of()
    first, second = (
        step(one, batch_of(1), LossConfig()),
        step(many, batch_of(micro_num), LossConfig()),
    )
    assert second.loss == pytest.approx(first.loss, rel=ACCUMULATION)
    assert second.update.grad_norm == pytest.approx(
        first.update.grad_norm, rel=ACCUMULATION
    )
    for (name, a), b in zip(
        many.parameters().items(), one.parameters().values(), strict=True
    ):
        assert distance(a, b) <= ACCUMULATION, name


@covers("loss.reduction")
def test_reduction_weighs_tokens_or_micro_batches_equally() -> None:
    batch = batch_of(3)
    losses = losses_of(batch)
    assert len({len(part) for part in losses}) == 3
    per_token = step(stages_of(), batch, LossConfig()).loss
    per_micro_batch = step(stages_of(), batch, LossConfig(reduction="micro_batch")).loss
    assert per_token == pytest.approx(float(torch.cat(losses).mean()), rel=1e-12)
    assert per_micro_batch == pytest.approx(
        sum(float(part.mean()) for part in losses) / 3, rel=1e-12
    )
    assert abs(per_token - per_micro_batch) > 1e-3


def test_the_loss_scale_leaves_loss_and_norm_alone_and_an_overflow_leaves_the_weights() -> (
    None
):
    plain = step(stages_of(), batch_of(2), LossConfig())
    scaled = step(stages_of(), batch_of(2), LossConfig(), ScalerConfig())
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-12)
    assert scaled.update.grad_norm == pytest.approx(plain.update.grad_norm, rel=1e-12)
    stages = stages_of()
    with torch.no_grad():
        stages.parameters()["norm.weight"].fill_(math.inf)
    before = {
        name: parameter.detach().clone()
        for name, parameter in stages.parameters().items()
    }
    assert step(stages, batch_of(2), LossConfig()).update.check != "ok"
    assert all(
        torch.equal(parameter, before[name])
        for name, parameter in stages.parameters().items()
    )


def test_validation_is_the_mean_over_all_targets_of_a_set(tmp_path: Path) -> None:
    write_folder(tmp_path, documents=5)
    options: dict[str, Any] = dict(
        seq_len=64, micro_bsz=1, micro_num=3, valid_folder=str(tmp_path)
    )
    stages = stages_of()
    stages.module.train()
    found = validate(
        stages, build_valid_data(DataConfig(**options), VOCAB), Grid(), CPU
    )
    assert stages.module.training
    assert set(found) == {
        f"val/{name}_{figure}"
        for name in ("en", "code")
        for figure in ("loss", "acc", "plex")
    }
    for name in ("en", "code"):
        lines = (tmp_path / name / "data.bin").read_text().splitlines()
        documents = [torch.tensor(json.loads(line)["tokens"]) for line in lines]
        losses = torch.cat(
            [token_losses(stages, ids[:-1], ids[1:]) for ids in documents]
        )
        assert found[f"val/{name}_loss"] == pytest.approx(
            float(losses.mean()), rel=1e-12
        )
        assert found[f"val/{name}_plex"] == pytest.approx(
            math.exp(float(losses.mean())), rel=1e-12
        )


def test_an_interrupted_step_changes_nothing() -> None:
    stages, config = stages_of(), Config()
    optimizer = ZeroOptimizer(
        stages.parameters().items(),
        config.adam,
        config.hybrid_zero_optimizer,
        Grid(),
        stages.module,
    )
    before = {
        name: parameter.detach().clone()
        for name, parameter in stages.parameters().items()
    }
    asked: list[int] = []

    def stop_after_two(finished_micro_batches: int) -> bool:
        asked.append(finished_micro_batches)
        return finished_micro_batches == 2

    output = train_step(
        batch_of(6),
        schedule=stages.schedule,
        optimizer=optimizer,
        scaler=LossScaler(config.grad_scaler, "float64"),
        grid=Grid(),
        loss_config=LossConfig(),
        data_types=["en"],
        lr=1e-2,
        beta2=0.95,
        should_stop=stop_after_two,
    )
    assert output is None and asked == [1, 2]
    assert all(
        torch.equal(parameter, before[name])
        for name, parameter in stages.parameters().items()
    )
    assert all(parameter.grad is None for parameter in stages.parameters().values())


LARGEST_SEED = 2**32 - 1  # of the schema


@pytest.mark.parametrize(
    "seed", [0, 1, 1024, 18_446_634, 20240101, 2**31, LARGEST_SEED]
)
def test_every_seed_of_the_schema_seeds_every_step(seed: int) -> None:
    assert (
        Config.model_validate({"run": {"seed": seed}, "data": {"seed": seed}}).run.seed
        == seed
    )
    draws = set()
    for step in (0, 1, 10**7):
        for rank in (0, 1, 1023):
            seed_step(seed, step, rank)
            draws.add(float(torch.rand((), dtype=torch.float64)))
    assert len(draws) == 9, "two steps or ranks draw the same numbers"


def test_neighboring_seeds_draw_different_numbers() -> None:
    def draw(seed: int) -> float:
        seed_step(seed, 0, 0)
        return float(torch.rand((), dtype=torch.float64))

    around = [0, 1, 2, 20240100, 20240101, 20240102, LARGEST_SEED - 1, LARGEST_SEED]
    assert len({draw(seed) for seed in around}) == len(around)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63 - 1, 2**64])
@pytest.mark.parametrize("section", ["run", "data"])
def test_other_seeds_are_refused_by_name(section: str, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"{section}.seed"):
        Config.model_validate({section: {"seed": seed}})
