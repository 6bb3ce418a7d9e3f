"""The host waits for the device once a step, after the optimizer: shown on the meta device, which has no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.schema import (
    IGNORE,
    Config,
    GradProfilingConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    ZeroConfig,
)
from evomesh.data.batch import Batch
from evomesh.layers import attention, block_softmax
from evomesh.optim.gradient_profile import GradientProfile
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import build_grid
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.process_group import fake_world
from evomesh.pipeline.schedule import PipelineSchedule
from evomesh.plan.trace import weights_on_meta
from evomesh.train import step
from evomesh.train.stages import build_stages
from tests.support.host_reads import HostWaits, no_host_waits, record_messages

pytestmark = pytest.mark.slow

META = torch.device("meta")
ALONE, ONE = Grid(), ParallelConfig()
T, VOCAB = 48, 64
MEASURED = GradProfilingConfig(
    grad_norm_profiling=True, zero_grad_profiling=True, vocab_grad_norm_profiling=True
)
SHAPE = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    mlp_ratio=2.0,
    multiple_of=8,
)


def model_config(dtype: str, **changes: Any) -> ModelConfig:
    fixed = dict(model_type="LLAMA2", vocab_size=VOCAB, no_bias=True)
    return ModelConfig(dtype=dtype, **(fixed | SHAPE | changes))  # type: ignore[arg-type]


def host_batch(micro_num: int = 2) -> Batch:
    ids = torch.zeros(micro_num, T, dtype=torch.long)
    labels = ids.clone()
    labels[:, :5] = IGNORE
    positions = torch.cat([torch.arange(16), torch.arange(32)]).repeat(micro_num, 1)
    bounds = torch.tensor([[0, 16, 48, 48]], dtype=torch.int32).repeat(micro_num, 1)
    return Batch(ids, labels, positions, ids, bounds, 32)


LAYOUTS: list[dict[str, Any]] = [
    {"zero1": {"size": 4}},
    {"zero1": {"size": 2}, "tensor": {"size": 2, "mode": "mtp"}},
    {"tensor": {"size": 2, "mode": "msp"}, "zero1": {"size": 2}},
    {"tensor": {"size": 2, "mode": "fsp"}},
    {"zero1": {"fsdp": True}},
    {"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 2, "overlap": True}},
    {"pipeline": {"size": 2}},
]


@contextmanager
def step_of_one_in_four(
    monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]
) -> Iterator[CountedStep]:
    """The step of the last rank of a fake world of four, whose collectives return immediately.

    A pipeline runs its last stage only, without torch's schedule, which cannot agree on shapes there.
    """
    monkeypatch.setattr(PipelineSchedule, "train", PipelineSchedule.rehearse)
    parallel = ParallelConfig.model_validate(layout)
    overlap = {"overlap_sync_grad": True, "overlap_sync_param": True}
    with fake_world(4, 3), weights_on_meta():
        grid = build_grid(parallel, 4, 3)
        yield CountedStep(
            monkeypatch, "bfloat16", grid=grid, parallel=parallel, zero=overlap
        )


class CountedStep:
    """One step of a model on the meta device, whose results are read as zeros."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: str,
        clip: float = 1.0,
        grid: Grid = ALONE,
        parallel: ParallelConfig = ONE,
        zero: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        config = Config(model=model_config(dtype, **changes), parallel=parallel)
        self.grid = grid
        self.stages = build_stages(config, grid, MODES[parallel.tensor.mode], META)
        settings = ZeroConfig(clip_grad_norm=clip, **(zero or {}))
        named = self.stages.parameters().items()
        self.optimizer = ZeroOptimizer(
            named, config.adam, settings, grid, self.stages.module
        )
        self.scaler = LossScaler(config.grad_scaler, dtype)  # type: ignore[arg-type]
        self.reads: list[tuple[int, ...]] = []
        monkeypatch.setattr(step, "copy_to_host", self.copy_to_host)

    def copy_to_host(self, results: Tensor) -> Tensor:
        assert results.device == META
        self.reads.append(tuple(results.shape))
        return torch.zeros(results.shape, dtype=results.dtype)

    def __call__(
        self, reduction: str = "token", profile: GradientProfile | None = None
    ) -> None:
        settings = LossConfig(reduction=reduction, label_smoothing=0.1)  # type: ignore[arg-type]
        step.train_step(
            host_batch(),
            schedule=self.stages.schedule,
            optimizer=self.optimizer,
            scaler=self.scaler,
            grid=self.grid,
            loss_config=settings,
            data_types=["a", "b"],
            lr=1e-3,
            beta2=0.95,
            profile=profile,
        )


class TestHostWaitsOfAStep:
    @pytest.mark.parametrize("clip", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_one_wait_and_none_for_copying_the_batch(
        self, monkeypatch: pytest.MonkeyPatch, dtype: str, clip: float
    ) -> None:
        counted_step = CountedStep(
            monkeypatch, dtype, clip, checkpoint=0.5, use_fp32_norm=dtype != "float64"
        )
        for reduction in ("token", "micro_batch"):
            with no_host_waits() as copies:
                counted_step(reduction)
            assert copies.begun == len(fields(Batch)) - 3  # all tensors of a host batch
        # Norm, objective, its z-loss, and the tally of two types.
        assert counted_step.reads == [(3 + 3 * 2,)] * 2

    @pytest.mark.parametrize("kv_heads", [4, 2])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_one_wait_with_the_variable_length_kernel(
        self, monkeypatch: pytest.MonkeyPatch, dtype: str, kv_heads: int
    ) -> None:
        """torch knows shape and device of the kernel's outputs, forward and backward, without running it."""
        monkeypatch.setattr(attention, "_flash_takes", lambda q: True)
        monkeypatch.setattr(attention, "_per_segment", None)
        counted_step = CountedStep(
            monkeypatch, dtype, num_kv_attention_heads=kv_heads, checkpoint=0.5
        )
        with no_host_waits():
            counted_step()
        assert len(counted_step.reads) == 1

    @pytest.mark.parametrize(
        "changes",
        [{"norm_head": True, "embed_grad_scale": 0.1}, {"use_dynamic_ntk_rope": True}],
    )
    def test_one_wait_for_every_model(
        self, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
    ) -> None:
        counted_step = CountedStep(
            monkeypatch,
            "bfloat16",
            model_type="INTERNLM2_PUBLIC",
            no_bias=False,
            **changes,
        )
        with no_host_waits():
            counted_step()
        assert len(counted_step.reads) == 1

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_one_wait_in_every_layout(
        self, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]
    ) -> None:
        """The second step is profiled."""
        with step_of_one_in_four(monkeypatch, layout) as counted_step:
            slots, grid = counted_step.optimizer.slots, counted_step.grid
            profile = GradientProfile(MEASURED, slots, grid, tied=False)
            with no_host_waits():
                counted_step()
                counted_step(profile=profile)
        usual, measured = counted_step.reads
        assert measured[0] == usual[0] + 2 * len(profile.elements) + VOCAB

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_no_message_of_the_host_and_one_for_all_sums_in_every_layout(
        self, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]
    ) -> None:
        with step_of_one_in_four(monkeypatch, layout) as counted_step:
            counted_step()
            with record_messages() as messages:
                counted_step()
            grid = counted_step.grid
        assert messages, "nothing was recorded"
        assert {message.device for message in messages} == {META}
        # Of a bfloat16 model only counts and sums are wider than float32.
        small = [m for m in messages if m.dtype in (torch.int64, torch.float64)]
        targets = [(1, torch.int64)] * (grid.dp.size > 1)
        # Norm, objective, its z-loss and the tally of two types, once on each axis.
        axes = [axis for axis in (grid.dp, grid.tp, grid.pp) if axis.size > 1]
        sums = [(1 + 2 + 3 * 2, torch.float64)] * len(axes)
        assert [(m.numel(), m.dtype) for m in small] == targets + sums

    @pytest.mark.parametrize("place", ["layer", "loss", "optimizer", "update"])
    def test_a_second_wait_fails_this_test(
        self, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        counted_step = CountedStep(monkeypatch, "bfloat16")

        def reading(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                first = next(x for x in args if isinstance(x, Tensor))
                return first.flatten()[0].item() and function(*args, **kwargs)

            return call

        if place == "layer":
            monkeypatch.setattr(attention, "_varlen", reading(attention._varlen))
        elif place == "loss":
            monkeypatch.setattr(
                block_softmax.VocabularyShard,
                "_local_column",
                lambda self, target: target.tolist(),
            )
        elif place == "optimizer":
            monkeypatch.setattr("evomesh.optim.zero.clip_factor", reading(torch.square))
        else:
            monkeypatch.setattr(
                "evomesh.optim.zero.copy_masters_to_parameters",
                lambda slots: [slot.local.cpu() for slot in slots],
            )
        with no_host_waits(), pytest.raises((RuntimeError, NotImplementedError)):
            counted_step()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.as_tensor(0.5, device=x.device),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_every_kind_of_wait_is_detected(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=META)
    with (
        no_host_waits(),
        pytest.raises((HostWaits, RuntimeError, NotImplementedError, TypeError)),
    ):
        wait(x)
