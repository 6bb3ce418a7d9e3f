"""Two training steps of one rank, and what they computed: activations, gradients and weights by name.

Hooks see what each module is given and returns, in both directions:

    input, output     what a module was given and returned           forward
    input gradient    gradient of what a module was given             backward
    output gradient   gradient of what it returned                    backward

The optimizer's gradients are seen after they have been summed over the ranks, and its
weights after the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from evomesh.config.schema import Config
from evomesh.diagnose.parity.batches import make_batch
from evomesh.layers.loss import LossOutput
from evomesh.optim.gradient_profile import GradientFigures
from evomesh.optim.scaler import LossScaler
from evomesh.optim.slot import ParameterSlot
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import ShardSpec, local_shard, spec_of
from evomesh.train.stages import ModelStages, build_optimizer, build_stages
from evomesh.train.step import StepOutput, seed_step, train_step

Kind = Literal[
    "input",
    "output",
    "token losses",
    "output gradient",
    "input gradient",
    "parameter gradient",
    "loss",
    "gradient norm",
    "weight",
]
STEPS = 2
WHOLE = "the model"
RATE, BETA2 = 0.1, 0.95


class Key(NamedTuple):
    """The name of one observed tensor.

    Attributes:
        name: global name of a module or a parameter; "the model" for numbers of all of it.
        pack: number of the pack within the step, -1 where a tensor belongs to none.
    """

    step: int
    kind: Kind
    name: str
    pack: int = -1


@dataclass(frozen=True)
class Observed:
    """One tensor as a rank has it; ``spec`` is that of a parameter, None for activations."""

    tensor: Tensor
    spec: ShardSpec | None = None


@dataclass
class Observations:
    """The tensors that the steps of one rank computed.

    Attributes:
        tokens: of a pack.
        tensors: by name, in the order in which they were seen.
        order: the first forward of this rank's modules: names as they were entered ("input") and left ("output").
    """

    tokens: int
    tensors: dict[Key, Observed] = field(default_factory=dict)
    order: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: Key, tensor: Tensor, spec: ShardSpec | None = None) -> None:
        """Keep a copy of a tensor, unless there is one of this name: a layer that recomputes shows it twice."""
        if key not in self.tensors:
            self.tensors[key] = Observed(tensor.detach().clone(), spec)


def observe(
    config: Config,
    grid: Grid,
    device: torch.device,
) -> Observations:
    """Train two steps of ``config`` on this rank of ``grid``, and return what they computed.

    Every rank of the grid calls it. The weights are the same in every layout.

    Raises:
        UserError: the model cannot be built in this layout.
    """
    built = _build(config, grid, device)
    # Hooks see the activations of the steps, and the profile their gradients.
    seen = Observations(config.data.packed_length)
    with _watched(built.stages, grid, seen) as clock:
        for step in range(STEPS):
            clock.begin(step)
            output = _train(built, seen, step)
            built.optimizer.wait_for_parameters()
            _add_results(seen, step, output)
            _add_weights(seen, step, built.stages)
    return seen


class _BuiltLayout(NamedTuple):
    """A layout with the model and the optimizer of one rank."""

    config: Config
    grid: Grid
    stages: ModelStages
    optimizer: ZeroOptimizer
    scaler: LossScaler


def _build(
    config: Config,
    grid: Grid,
    device: torch.device,
) -> _BuiltLayout:
    """Build model and optimizer as a run does, with their first weights."""
    seed = config.run.seed
    torch.manual_seed(seed)
    mode = MODES[config.parallel.tensor.mode]
    stages = build_stages(config, grid, mode, device)
    stages.initialize(seed, grid)
    optimizer = build_optimizer(config, stages, grid)
    optimizer.refresh_masters()
    scaler = LossScaler(config.grad_scaler, config.model.dtype)
    return _BuiltLayout(config, grid, stages, optimizer, scaler)


def _add_results(seen: Observations, step: int, output: StepOutput) -> None:
    """Keep the two numbers of a step that all ranks have in common."""
    loss = _number(output.loss)
    seen.add(Key(step, "loss", WHOLE), loss)
    norm = _number(output.update.grad_norm)
    seen.add(Key(step, "gradient norm", WHOLE), norm)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _add_weights(seen: Observations, step: int, stages: ModelStages) -> None:
    """Keep this rank's shards of the weights after a step."""
    for name, parameter in stages.parameters().items():
        key = Key(step, "weight", name)
        shard = local_shard(parameter)
        seen.add(key, shard, spec_of(parameter))


def _train(built: _BuiltLayout, seen: Observations, step: int) -> StepOutput:
    config = built.config
    dp = built.grid.dp
    seed_step(config.run.seed, step, dp.rank)
    output = train_step(
        make_batch(config, step, dp.rank, dp.size),
        schedule=built.stages.schedule,
        optimizer=built.optimizer,
        scaler=built.scaler,
        grid=built.grid,
        loss_config=config.loss,
        data_types=["all"],
        lr=RATE,
        beta2=BETA2,
        profile=_GradientCopies(built.optimizer.slots, seen, step),
    )
    assert output is not None  # nothing asks it to stop
    return output


@dataclass(frozen=True)
class _GradientCopies:
    """Takes the place of a gradient profile, to see the gradients once they are summed over the ranks."""

    slots: list[ParameterSlot]
    seen: Observations
    step: int

    def measure(self) -> Tensor:
        for slot in self.slots:
            gradient = slot.master.grad
            if gradient is not None:
                key = Key(self.step, "parameter gradient", slot.name)
                self.seen.add(key, gradient, slot.spec)
        return torch.zeros(0, dtype=torch.float64, device=self.slots[0].local.device)

    def figures(self, sums: Tensor, inv_scale: float) -> GradientFigures:
        del sums, inv_scale
        return GradientFigures({}, None)


class _PackClock:
    """The step, and the pack that the next forward of each model is about."""

    def __init__(self, grid: Grid) -> None:
        self._dp = grid.dp
        self.step = 0
        self._done: dict[nn.Module, int] = {}

    def begin(self, step: int) -> None:
        self.step = step
        self._done.clear()

    def next_forward(self, model: nn.Module, *_: Any) -> None:
        """Count a forward of a whole model; every schedule runs the micro-batches in ascending order."""
        self._done[model] = self._done.get(model, -1) + 1

    def pack(self, model: nn.Module) -> int:
        micro_batch = self._done[model]
        return self._dp.rank + micro_batch * self._dp.size


@contextmanager
def _watched(
    stages: ModelStages, grid: Grid, seen: Observations
) -> Iterator[_PackClock]:
    """Observe all modules of the stages in the ``with`` block."""
    clock = _PackClock(grid)
    handles: list[Any] = []
    for model in stages.models:
        handles.append(model.register_forward_pre_hook(partial(clock.next_forward)))
        for name, module in model.named_modules():
            # The whole model's output is that of its last module, and differs by stage.
            if name:
                watch = _ModuleWatch(name, model, clock, seen)
                handles.append(module.register_forward_pre_hook(watch.entered))
                handles.append(module.register_forward_hook(watch.left))
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _ModuleWatch:
    """Observes one module of a model."""

    name: str
    model: nn.Module
    clock: _PackClock
    seen: Observations

    def entered(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._note_order("input")
        if arguments and isinstance(arguments[0], Tensor):
            self._observe("input", "input gradient", arguments[0])

    def left(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._note_order("output")
        if isinstance(output, LossOutput):
            self.seen.add(self._key("token losses"), output.nll)
        elif isinstance(output, Tensor):
            self._observe("output", "output gradient", output)

    def _note_order(self, end: str) -> None:
        event = (self.name, end)
        if event not in self.seen.order:
            self.seen.order.append(event)

    def _observe(
        self,
        kind: Kind,
        gradient_kind: Kind,
        tensor: Tensor,
    ) -> None:
        """Keep an activation now, and its gradient once backward has it; token ids are none."""
        if tensor.is_floating_point():
            key = self._key(kind)
            self.seen.add(key, tensor)
        if tensor.requires_grad:
            gradient_key = self._key(gradient_kind)
            keep = partial(self._add, gradient_key)
            tensor.register_hook(keep)  # type: ignore[no-untyped-call]

    def _add(self, key: Key, gradient: Tensor) -> None:
        self.seen.add(key, gradient)

    def _key(self, kind: Kind) -> Key:
        return Key(self.clock.step, kind, self.name, self.clock.pack(self.model))
