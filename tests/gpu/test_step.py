"""Whole training steps on a device, against the same steps in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from evomesh.config.schema import (
    IGNORE,
    AdamConfig,
    Config,
    LossConfig,
    ModelConfig,
    ZeroConfig,
)
from evomesh.data.batch import Batch
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train import step
from evomesh.train.stages import build_stages
from evomesh.train.step import StepOutput
from evomesh.train.stopwatch import Stopwatch
from tests.support.tolerances import FLOAT32_RUN

CPU = torch.device("cpu")
T, VOCAB, STEPS = 192, 257, 3
# Relative: bfloat16 has 8 bits, and the loss averages over tokens.
HALF_LOSS, HALF_NORM = (1e-2, 5e-2)
SHAPE = dict(
    num_layers=2,
    hidden_size=128,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    mlp_ratio=2.0,
)
PACKS = [(192,), (64, 128), (1, 60, 3, 100, 28)]


class Training:
    """Weights are drawn in float64 and rounded, so that runs in all dtypes start from the same."""

    def __init__(self, device: torch.device, dtype: str, **changes: Any) -> None:
        fixed = dict(
            model_type="LLAMA2",
            multiple_of=8,
            vocab_size=VOCAB,
            no_bias=True,
            compile=False,
        )
        model = ModelConfig(**(fixed | SHAPE | changes), dtype=dtype)  # type: ignore[arg-type]
        self.device, self.config = (
            device,
            Config(model=model, adam=AdamConfig(adam_eps=1e-3)),
        )
        self.stages = build_stages(self.config, Grid(), MODES["mtp"], device)
        drawn = build_stages(
            self.config.model_copy(update={"model": _wide(model)}),
            Grid(),
            MODES["mtp"],
            CPU,
        )
        drawn.initialize(5, Grid())
        with torch.no_grad():
            for name, parameter in self.stages.parameters().items():
                parameter.copy_(
                    drawn.parameters()[name] * (4 if parameter.dim() > 1 else 1)
                )
        named = self.stages.parameters().items()
        self.optimizer = ZeroOptimizer(
            named, self.config.adam, ZeroConfig(clip_grad_norm=0.5), Grid()
        )
        self.optimizer.refresh_masters()
        self.scaler = LossScaler(self.config.grad_scaler, dtype)  # type: ignore[arg-type]

    def step(self, number: int) -> StepOutput:
        output = step.train_step(
            host_batch(number, pinned=self.device.type == "cuda"),
            schedule=self.stages.schedule,
            optimizer=self.optimizer,
            scaler=self.scaler,
            grid=Grid(),
            loss_config=LossConfig(label_smoothing=0.05),
            data_types=["a", "b"],
            lr=1e-2,
            beta2=0.95,
        )
        assert output is not None
        return output

    def state(self) -> dict[str, Tensor]:
        tensors = self.stages.parameters() | self.optimizer.state_tensors()
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _wide(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"dtype": "float64", "compile": False})


def host_batch(number: int, pinned: bool) -> Batch:
    random = torch.Generator().manual_seed(number)
    ids, labels = torch.randint(VOCAB, (2, 2, T), generator=random)
    labels[:, :: 5 + number] = IGNORE
    types = torch.randint(2, (2, T), generator=random)
    lengths = PACKS[number % len(PACKS)]
    positions = torch.cat([torch.arange(n) for n in lengths]).repeat(2, 1)
    bounds = torch.tensor((0, *lengths)).cumsum(0).int().repeat(2, 1)
    tensors = (ids, labels, positions, types, bounds)
    return Batch(
        *(x.pin_memory() if pinned else x for x in tensors), max_seqlen=max(lengths)
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "loss", "norm"),
    [
        ("float32", FLOAT32_RUN, FLOAT32_RUN),
        ("bfloat16", HALF_LOSS, HALF_NORM),
        ("float16", HALF_LOSS, HALF_NORM),
    ],
)
def test_losses_and_norms_are_those_of_float64_on_the_cpu(
    device: torch.device,
    dtype: str,
    loss: float,
    norm: float,
    recompute: float,
    compiled: bool,
) -> None:
    if compiled and device.type == "cpu":
        pytest.skip(
            "tests/unit/models/test_compiled.py has it, without minutes of compiling"
        )
    ours = Training(device, dtype, checkpoint=recompute, compile=compiled)
    theirs = Training(CPU, "float64")
    for number in range(STEPS):
        found, expected = ours.step(number), theirs.step(number)
        assert found.update.check == "ok"
        assert found.loss == pytest.approx(expected.loss, rel=loss)
        assert found.update.grad_norm == pytest.approx(
            expected.update.grad_norm, rel=norm
        )
        tally, reference = found.tally.summary(), expected.tally.summary()
        assert tally["tokens/a"] == reference["tokens/a"] and tally[
            "loss/b"
        ] == pytest.approx(reference["loss/b"], rel=loss)
        assert 0 < found.fwd_bwd_time < 600


@contextmanager
def no_synchronization(device: torch.device) -> Iterator[None]:
    """Within, CUDA raises where the host would wait for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_host_waits_once_a_step(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: str, compiled: bool
) -> None:
    if compiled and device.type == "cpu":
        pytest.skip("needs a device that could be waited for")
    training, reads = Training(device, dtype, checkpoint=0.5, compile=compiled), []
    copy_to_host = step.copy_to_host

    def read(results: Tensor) -> Tensor:
        reads.append(results.device.type)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        return copy_to_host(results)

    for number in range(len(PACKS)):  # libraries start, blocks are compiled
        training.step(number)
    monkeypatch.setattr(step, "copy_to_host", read)
    for number in range(len(PACKS)):
        with no_synchronization(device):
            training.step(number)
    assert reads == [device.type] * len(PACKS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_says_when_the_host_waits() -> None:
    x = torch.ones(3, device="cuda")
    for wait in (
        x.sum().item,
        x.nonzero,
        lambda: torch.as_tensor(0.5, device="cuda"),
        x.cpu,
    ):
        with no_synchronization(x.device), pytest.raises(RuntimeError):
            wait()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_overflow_is_skipped_without_a_trace(
    device: torch.device, dtype: str, bad: float
) -> None:
    ours, clean = Training(device, dtype), Training(device, dtype)
    for training in (ours, clean):
        training.step(0)
    before, scale = ours.state(), ours.scaler.scale
    slot = ours.optimizer.slots[-1]
    hook = slot.param.register_hook(lambda gradient: torch.full_like(gradient, bad))
    assert ours.step(1).update.check == ("inf" if bad == float("inf") else "nan")
    hook.remove()
    after = ours.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ours.optimizer.state() == {"steps": 1}
    ours.scaler.scale = scale  # back where the clean run is
    for training in (ours, clean):
        assert training.step(2).update.check == "ok"
    assert ours.optimizer.state() == {"steps": 2}
    expected = clean.state()
    for name, tensor in ours.state().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lengths_and_number_of_documents_compile_nothing_anew_on_cuda() -> None:
    torch._dynamo.reset()
    counters.clear()
    training = Training(torch.device("cuda"), "bfloat16", num_layers=12, compile="auto")
    training.step(0)
    first = counters["stats"]["unique_graphs"]
    for number in range(1, 6):
        training.step(number)
    assert 0 < counters["stats"]["unique_graphs"] == first
    assert counters["frames"]["total"] == counters["frames"]["ok"]


def test_stopwatch_counts_the_devices_work(device: torch.device) -> None:
    x = torch.randn(1024, 1024, device=device)
    x @ x  # libraries start
    first, many = Stopwatch(device), 20
    x @ x
    first.stop()
    second = Stopwatch(device)
    for _ in range(many):
        x @ x
    second.stop()
    x.sum().item()
    assert second.seconds() > 3 * first.seconds() > 0
