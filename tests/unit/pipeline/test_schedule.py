"""What a schedule refuses."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

from evomesh.errors import UserError
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
