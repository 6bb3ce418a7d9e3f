"""Passes over the data as steps, against counting them one by one."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import pytest

from evomesh.config.data import DataConfig
from evomesh.config.epochs import packs_left_out, resolve_epochs
from evomesh.config.loader import load_config
from evomesh.config.schema import CheckpointConfig, Config
from evomesh.data.packing.sampler import PackSampler, SamplerPosition
from evomesh.errors import UserError
from tests.support.covers import covers


def xtuner_steps(packs: int, dp: int, accumulation: int, epochs: int) -> int:
    """Count as mmengine does: each rank has its share of each pass, a step is every accumulation-th iteration."""
    iterations = sum(
        len(range(rank, packs // dp * dp, dp)) for _ in range(epochs) for rank in [0]
    )
    return sum(
        1 for iteration in range(iterations) if (iteration + 1) % accumulation == 0
    )


@covers("data.epochs")
@pytest.mark.parametrize(
    ("packs", "dp", "accumulation", "epochs"),
    [(59, 1, 4, 1), (59, 8, 4, 3), (7, 2, 3, 2), (15, 8, 1, 3)],
)
def test_xtuners_passes(packs: int, dp: int, accumulation: int, epochs: int) -> None:
    config = Config(
        data=DataConfig(epochs=epochs, micro_num=accumulation, order="xtuner")
    )
    assert resolve_epochs(config, packs, dp).data.total_steps == xtuner_steps(
        packs, dp, accumulation, epochs
    )


def test_internevos_pass_ends_where_no_whole_step_is_left() -> None:
    config = Config(data=DataConfig(epochs=2.5, micro_num=4))
    assert resolve_epochs(config, 59, 2).data.total_steps == int(2.5 * (59 // 8))


@covers("ckpt.checkpoint_every_epochs")
def test_checkpoints_by_passes() -> None:
    ckpt = CheckpointConfig(checkpoint_every_epochs=0.5)
    config = Config(data=DataConfig(micro_num=2, total_steps=11), ckpt=ckpt)
    resolved = resolve_epochs(config, 40, 1)
    assert resolved.ckpt.checkpoint_every == 10
    assert resolved.data.total_steps == 11
    assert resolve_epochs(Config(), 40, 1) == Config()
    assert math.isinf(Config().ckpt.checkpoint_every)


@pytest.mark.parametrize(
    ("packs", "message"), [(0, "no known length"), (3, "less than one step")]
)
def test_passes_that_cannot_be_counted(packs: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_epochs(Config(data=DataConfig(epochs=1, micro_num=4)), packs, 1)


@pytest.mark.parametrize(
    "also", ["data.total_steps=5", "data.rampup_batch_size='1 1 5'"]
)
def test_one_length_only(also: str, tmp_path: object) -> None:
    path = f"{tmp_path}/c.py"
    with open(path, "w") as file:
        file.write(
            'data = dict(train_folder="x", micro_num=2)\nmodel = dict(dtype="float32")\n'
        )
    with pytest.raises(UserError, match=r"data\.epochs"):
        load_config(path, ["data.epochs=1", also])


@pytest.mark.parametrize("order", ["internevo", "xtuner"])
@pytest.mark.parametrize(("packs", "dp"), [(48, 1), (48, 2), (51, 2)])
def test_every_pack_comes_twice_but_those_that_are_counted(
    packs: int, dp: int, order: Literal["internevo", "xtuner"]
) -> None:
    config = Config(data=DataConfig(epochs=2, micro_num=4, order=order))
    steps = resolve_epochs(config, packs, dp).data.total_steps
    sampler = PackSampler(packs, 1, 4 * dp, order=order, unit=dp)
    position = SamplerPosition()
    uses: Counter[int] = Counter()
    for _ in range(steps):
        drawn, position = sampler.take(position)
        uses.update(drawn.tolist())
    left_out = packs_left_out(config, packs, dp)
    assert uses.total() == 2 * (packs - left_out) // (4 * dp) * 4 * dp
    assert max(uses.values()) == 2
    if packs == 48:
        assert set(uses.values()) == {2} and len(uses) == 48 and not left_out
    else:
        assert left_out == {"internevo": 3, "xtuner": 1}[order]
