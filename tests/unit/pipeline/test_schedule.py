"""What a schedule refuses, and what it keeps."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.torch_version import TorchVersion

from evomesh.data.batch import Batch
from evomesh.errors import UserError
from evomesh.layers.block_softmax import PLAIN
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import MODES
from evomesh.pipeline.schedule import PipelineSchedule, refuse_zbv


def test_zbv_needs_a_torch_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for good in ("2.13.0", "2.13.0+cpu", "2.14.1"):
        refuse_zbv(TorchVersion(good))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    options = {"hidden_size": 8, "dtype": torch.float32, "device": torch.device("cpu")}
    stages = [torch.nn.Linear(1, 1)] * 2, Grid(pp=Axis("pp", 2)), MODES["mtp"]
    with pytest.raises(
        UserError,
        match=r"torch 2\.11\.0\+cu130 cannot(.|\n)*torch 2\.13 or later(.|\n)*interleaved",
    ):
        PipelineSchedule(*stages, schedule="zbv", **options)
    PipelineSchedule(*stages, schedule="interleaved", **options)


def test_the_schedule_of_a_ramp_up_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's schedules hold buffers for each micro-batch."""
    schedule = PipelineSchedule(
        [torch.nn.Linear(1, 1)],
        Grid(pp=Axis("pp", 2)),
        MODES["mtp"],
        schedule="1f1b",
        hidden_size=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    built: list[weakref.ref[TorchSchedule]] = []

    class TorchSchedule:
        def step(self, *_: object, **__: object) -> None:
            return

    def build(num_micro_batches: int, tokens: int) -> TorchSchedule:
        made = TorchSchedule()
        built.append(weakref.ref(made))
        return made

    monkeypatch.setattr(schedule, "build_torch_schedule", build)
    for count in (4, 4, 8, 16, 16):
        ids = torch.zeros(count, 8, dtype=torch.long)
        bounds = torch.tensor([[0, 8]], dtype=torch.int32).expand(count, -1)
        batch = Batch(ids, ids, ids, ids, bounds, 8)
        schedule.train(batch, [1.0] * count, PLAIN, lambda index, output: None)
    assert [made() is not None for made in built] == [False, False, True]
