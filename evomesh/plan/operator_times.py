"""Times of single operators in real steps of small models, by which a machine is measured.

Operators are timed where the training code calls them, one by one: with the memory that
they find there, and the shapes that they have there. Of all calls of an operator with
about the same work the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evomesh.config.schema import Config
from evomesh.data.batch import Batch
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import build_grid
from evomesh.parallel.modes import MODES
from evomesh.plan.timeline import Kernel, describe_kernel
from evomesh.train.stages import build_stages
from evomesh.train.step import train_step
from evomesh.train.stopwatch import Stopwatch


class TimedKernel(NamedTuple):
    """A kernel that ran, and the seconds of it."""

    kernel: Kernel
    seconds: float


class OperatorTimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times every operator of the ``with`` block."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._timed: list[tuple[Kernel, Stopwatch]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        watch = Stopwatch(self._device)
        out = func(*args, **named)
        watch.stop()
        if func.namespace == "c10d":
            return out
        kernel = describe_kernel(func, args, named, out, self._device.type)
        if kernel is not None:
            self._timed.append((kernel, watch))
        return out

    def take(self) -> list[TimedKernel]:
        """Return what was timed, and forget it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = []
        for kernel, watch in self._timed:
            found.append(TimedKernel(kernel, watch.seconds()))
        self._timed.clear()
        return found


class RepeatedStep:
    """A training step of a small model on this rank, to be repeated."""

    def __init__(
        self, config: Config, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._config = config
        self._device = device
        self._grid = build_grid(config.parallel, world_size, rank)
        mode = MODES[config.parallel.tensor.mode]
        self._stages = build_stages(config, self._grid, mode, device)
        self._stages.initialize(7, self._grid)
        self._optimizer = ZeroOptimizer(
            self._stages.parameters().items(),
            config.adam,
            config.hybrid_zero_optimizer,
            self._grid,
            self._stages.module,
            config.optimizer,
            config.model.width_multiplier,
        )
        self._scaler = LossScaler(config.grad_scaler, config.model.dtype)
        self._batch = random_batch(config)

    def run(self) -> float:
        """Return the seconds of one more step."""
        started = time.perf_counter()
        train_step(
            self._batch,
            schedule=self._stages.schedule,
            optimizer=self._optimizer,
            scaler=self._scaler,
            grid=self._grid,
            loss_config=self._config.loss,
            data_types=["en"],
            lr=1e-4,
            beta2=0.95,
        )
        return time.perf_counter() - started


def random_batch(config: Config) -> Batch:
    """Make micro-batches of full segments of random tokens, each with a target."""
    data = config.data
    tokens = data.packed_length
    shape = (data.micro_num, tokens)
    ids = torch.randint(0, config.model.vocab_size, shape)
    positions = torch.arange(tokens) % data.seq_len
    bounds = torch.arange(
        0,
        tokens + 1,
        data.seq_len,
        dtype=torch.int32,
    )
    return Batch(
        tokens=ids,
        labels=ids.roll(-1, 1),
        position_ids=positions.expand(shape),
        type_ids=torch.zeros_like(ids),
        cu_seqlens=bounds.expand(data.micro_num, -1),
        max_seqlen=data.seq_len,
    )


def time_operators(
    step: RepeatedStep, device: torch.device, limit_s: float, most: int = 8
) -> list[TimedKernel]:
    """Return the operators of at least two steps, timed; of more as long as ``limit_s`` seconds have not passed."""
    step.run()
    times = OperatorTimes(device)
    begun = time.perf_counter()
    with times:
        for number in range(most):
            is_over = time.perf_counter() - begun > limit_s
            if number >= _FEWEST and is_over:
                break
            step.run()
    return times.take()


_FEWEST = 2


@dataclass(frozen=True)
class StepShare:
    """Times of a step of a small model: of all of it, and of its operators alone."""

    seconds: float
    in_operators: float
    operators: int

    @property
    def launch(self) -> float:
        """Return the seconds between two operators."""
        return max(self.seconds - self.in_operators, 0.0) / self.operators


def time_launches(step: RepeatedStep, device: torch.device, repeats: int) -> StepShare:
    """Return what is between the operators of a step, which are timed in every second repetition."""
    step.run()
    whole = []
    in_operators = []
    count = 1
    times = OperatorTimes(device)
    for _ in range(repeats):
        whole.append(step.run())
        with times:
            step.run()
        timed = times.take()
        count = len(timed)
        in_operators.append(sum(one.seconds for one in timed))
    return StepShare(
        seconds=statistics.median(whole),
        in_operators=statistics.median(in_operators),
        operators=count,
    )
