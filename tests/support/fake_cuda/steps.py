"""Whole training steps on the fake device; prints a JSON line a case: {"name", "reads", "copies"} or {"name", "error"}.

python -m tests.support.fake_cuda.steps LIBRARY      # "": torch itself is built with CUDA
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

if sys.argv[1]:
    # Before torch, which asks for its CUDA hooks once.
    ctypes.CDLL(sys.argv[1])

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, Config, LossConfig, ParallelConfig, ZeroConfig
from evomesh.data.batch import Batch
from evomesh.layers import attention
from evomesh.optim import zero
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import build_grid
from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.process_group import fake_world
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.train import step
from evomesh.train.stages import build_stages
from tests.support.fake_cuda.cases import CASES, MODEL, WORLD, T
from tests.support.fake_cuda.mode import FakeDevice
from tests.support.nccl_log import OperationLog

CUDA = torch.device("cuda", 0)


class Clock:
    """In place of events on the device, which measure time."""

    def __init__(self, device: torch.device) -> None: ...

    def stop(self) -> None: ...

    def seconds(self) -> float:
        return 1.0


def host_batch(micro_batches: int = 2) -> Batch:
    ids = torch.zeros(micro_batches, T, dtype=torch.long)
    labels = ids.clone()
    labels[:, :5] = IGNORE
    positions = torch.cat([torch.arange(16), torch.arange(32)]).repeat(micro_batches, 1)
    bounds = torch.tensor([[0, 16, 48, 48]], dtype=torch.int32)
    return Batch(ids, labels, positions, ids, bounds.repeat(micro_batches, 1), 32)


@contextmanager
def streams_of_the_cpu() -> Iterator[None]:
    """Give FSDP2 the CPU's streams, which do nothing; torch's build without CUDA has no others."""
    names = ("Stream", "Event", "current_stream", "stream", "current_device")
    streams = {name: getattr(torch.cpu, name, None) for name in names}
    streams["Event"] = mock.MagicMock
    streams["current_device"] = lambda: 0
    with mock.patch.multiple(torch.cuda, **streams):
        yield


def train(case: dict[str, Any], grid: Grid, parallel: ParallelConfig) -> dict[str, Any]:
    config = Config.model_validate(
        {"model": MODEL | case.get("model", {}), "parallel": parallel.model_dump()}
    )
    overlap = {"overlap_sync_grad": True, "overlap_sync_param": True}
    device = FakeDevice()
    with device:
        stages = build_stages(config, grid, MODES[parallel.tensor.mode], CUDA)
        optimizer = ZeroOptimizer(
            stages.parameters().items(),
            config.adam,
            ZeroConfig.model_validate(overlap if grid.dp.size > 1 else {}),
            grid,
            stages.module,
        )
        scaler = LossScaler(config.grad_scaler, config.model.dtype)
        for _ in range(2):
            step.train_step(
                host_batch(),
                schedule=stages.schedule,
                optimizer=optimizer,
                scaler=scaler,
                grid=grid,
                loss_config=LossConfig(label_smoothing=0.1),
                data_types=["a", "b"],
                lr=1e-3,
                beta2=0.95,
            )
        optimizer.wait_for_parameters()
    wrong = [
        name
        for name, tensor in [*stages.parameters().items(), *_state(optimizer)]
        if tensor.device.type != "cuda"
    ]
    assert not wrong, f"not on the device: {wrong}"
    return {"reads": device.reads, "copies": device.batch_copies}


def _state(optimizer: ZeroOptimizer) -> list[tuple[str, Tensor]]:
    return list(optimizer.state_tensors().items())


def break_product(name: str) -> Any:
    """Return the patch that lets a step do what ``name`` says."""
    clip_factor = zero.clip_factor

    def clip_on_host(norm: Tensor, *args: Any) -> Any:
        if name == "a value is read":
            norm.item()
        elif name == "a tensor is made on the host":
            norm = norm.expand(2) + torch.zeros(2)
        elif name == "a blocking copy":
            torch.ones(2).to(norm.device)
        elif name == "a second copy to the host":
            norm.cpu()
        return clip_factor(norm, *args)

    if name == "a host tensor is sent":
        return mock.patch.object(
            step,
            "micro_batch_weights",
            lambda labels, grid, config: _sent(labels, grid),
        )
    return mock.patch.object(zero, "clip_factor", clip_on_host)


def _sent(labels: Tensor, grid: Grid) -> Tensor:
    on_the_host = torch.ones(len(labels), dtype=torch.float64)
    return all_reduce_no_grad(on_the_host, grid.tp)


def run(case: dict[str, Any]) -> dict[str, Any]:
    parallel = ParallelConfig.model_validate(case.get("parallel", {}))
    if not case.get("parallel"):
        return train(case, Grid(), parallel)
    with fake_world(WORLD, WORLD - 1), streams_of_the_cpu():
        return train(case, build_grid(parallel, WORLD, WORLD - 1), parallel)


def main() -> None:
    log = OperationLog("/dev/null", is_on_host=lambda x: x.is_cpu, stand_in="fake")
    log.install()
    replaced = [
        # Which would look for a driver before the first tensor of the device.
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(attention, "_has_flash", lambda device: True),
        mock.patch.object(step, "Stopwatch", Clock),
        mock.patch.object(PipelineSchedule, "train", PipelineSchedule.rehearse),
    ]
    for patch in replaced:
        patch.start()
    for case in CASES:
        try:
            with break_product(case["name"]) if case.get("broken") else nullcontext():
                found = run(case)
        except Exception:
            found = {"error": traceback.format_exc()[-3000:]}
        print(json.dumps({"name": case["name"], **found}), flush=True)


if __name__ == "__main__":
    main()
