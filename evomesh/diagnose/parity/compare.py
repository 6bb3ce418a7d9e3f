"""Comparison of what a layout and one process computed: the first tensor that differs, in order of cause.

A fault shows first in the output of the module that has it, then in all that follows.
What a module is given differs first where the fault is between modules, as in attention
or between two stages. In backward the order is reversed, so that the gradient of a module's input comes
before that of the output which it is:

    forward    embedding, layers.0.attention_norm, layers.0.attention ..., norm, head
    backward   head, norm, ..., layers.0.attention, layers.0.attention_norm, embedding
    then       gradients of parameters, as the ranks have summed them; loss and norm of the
               step; weights after the update
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from evomesh.diagnose.parity.observe import Key, Kind, Observations, Observed
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec

# Bounds of max |a - b| / max |b|, see docs/adr/0001-numerics-contract.md. A sum that
# lacks a rank differs by a good part of itself.
BOUNDS = {
    "float64": 1e-10,
    "float32": 2e-5,
    "tf32": 2e-2,
    "float16": 3e-2,
    "bfloat16": 0.2,
}
PHASES: dict[Kind, int] = {
    "input": 0,
    "output": 0,
    "token losses": 1,
    "output gradient": 2,
    "input gradient": 2,
    "parameter gradient": 3,
    "loss": 4,
    "gradient norm": 4,
    "weight": 5,
}
DIRECTIONS: dict[Kind, str] = {
    "input": "what it is given, in forward",
    "output": "output, in forward",
    "token losses": "losses of tokens, in forward",
    "output gradient": "gradient of its output, in backward",
    "input gradient": "gradient of its input, in backward",
    "parameter gradient": "gradient of the parameter, summed over the ranks",
    "loss": "loss, summed over the ranks",
    "gradient norm": "gradient norm, summed over the ranks",
    "weight": "weight after the update",
}


@dataclass(frozen=True, order=True)
class Difference:
    """A tensor that is not the same in both; the smallest one comes first in order of cause.

    Attributes:
        distance: max |a - b| / max |b|; inf for NaN.
    """

    step: int
    phase: int
    position: int
    pack: int
    rank: int
    name: str
    kind: Kind
    distance: float

    def describe(self) -> str:
        """Return the module or parameter, the direction and the distance as one phrase."""
        where = f"step {self.step + 1}"
        if self.pack >= 0:
            where += f", pack {self.pack}"
        direction = DIRECTIONS[self.kind]
        return f"{self.name} ({direction}): {self.distance:.1e} apart, first on rank {self.rank} in {where}"


@dataclass(frozen=True)
class Comparison:
    """The findings of one rank.

    Attributes:
        compared: number of tensors.
        largest: distance among those.
        first: the first tensor beyond the bound, None if there is none.
    """

    compared: int
    largest: float
    first: Difference | None


def compare(
    own: Observations, whole: Observations, grid: Grid, rank: int, bound: float
) -> Comparison:
    """Compare this rank's parts with the whole tensors of one process.

    Args:
        rank: of this process in the job, for messages.
        bound: largest distance that passes.
    """
    # Where rounding begins to differ, everything after it differs too: the difference
    # to report is the first in the order of the computation.
    order = _Order(whole)
    compared = 0
    largest = 0.0
    differing = []
    for key, observed in own.tensors.items():
        parts = _same_part(key, observed, whole, grid)
        if parts is None:
            continue
        distance = _distance(*parts, whole.tensors[key].tensor)
        compared += 1
        largest = max(largest, distance)
        if distance > bound:
            position = order.position(key)
            phase = PHASES[key.kind]
            differing.append(
                Difference(
                    step=key.step,
                    phase=phase,
                    position=position,
                    pack=key.pack,
                    rank=rank,
                    name=key.name,
                    kind=key.kind,
                    distance=distance,
                )
            )
    return Comparison(compared, largest, min(differing, default=None))


class _Order:
    """Positions of names in the order in which one process computed them."""

    def __init__(self, whole: Observations) -> None:
        self._positions = {event: index for index, event in enumerate(whole.order)}

    def position(self, key: Key) -> int:
        """Return where a tensor comes within its step and phase."""
        # Backward goes through the modules in reverse, so what it computes counts down.
        positions = self._positions
        if key.kind == "input":
            return positions[key.name, "input"]
        if key.kind in ("output", "token losses"):
            return positions[key.name, "output"]
        if key.kind == "output gradient":
            return -positions[key.name, "output"]
        if key.kind == "input gradient":
            return -positions[key.name, "input"]
        module_position = self._of_module(key.name)
        return -module_position

    def _of_module(self, parameter: str) -> int:
        """Return the position of the innermost module around a parameter that was called."""
        for module in _modules_around(parameter):
            if (module, "output") in self._positions:
                return self._positions[module, "output"]
        return 0


def _modules_around(parameter: str) -> Iterator[str]:
    """Yield ``a.b``, then ``a``, for ``a.b.weight``."""
    name = parameter
    while "." in name:
        name, _, _ = name.rpartition(".")
        yield name


def _same_part(
    key: Key, observed: Observed, whole: Observations, grid: Grid
) -> tuple[Tensor, Tensor] | None:
    """Return this rank's tensor and the same part of the whole one; None where they cannot be compared.

    So are rows that are not tokens: norms of heads take those of all tokens as one
    matrix, of which a rank has no range. And a custom model may share tensors its own way.
    """
    if key not in whole.tensors:
        return None
    own = observed.tensor
    of_one_process = whole.tensors[key].tensor
    # 1. A parameter has a description of which part is here.
    if observed.spec is not None:
        return _part_of_parameter(own, observed.spec, of_one_process, grid)

    # 2. A number is the same everywhere.
    if of_one_process.dim() == 0:
        return own, of_one_process

    # 3. An activation has one row per token.
    if of_one_process.shape[0] != whole.tokens:
        return None
    part = _part_of_activation(of_one_process, own.shape, grid.tp)
    if part is None:
        return None
    return own, part


def _part_of_parameter(
    own: Tensor,
    spec: ShardSpec,
    whole: Tensor,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Return both without the padding of the layout."""
    for dim, indices in enumerate(spec.stored_ranges(grid)):
        length = len(indices)
        start = min(indices.start, whole.shape[dim])
        own = own.narrow(dim, 0, length)
        whole = whole.narrow(dim, start, length)
    return own, whole


def _part_of_activation(
    whole: Tensor, shape: tuple[int, ...], tp: Axis
) -> Tensor | None:
    """Return the part of ``whole`` that a rank of the tensor axis has, by the shape of what it has.

    The axis shards tokens, columns or heads, each in rank order: [64, 32] in one process
    and [16, 32] on four ranks are four ranges of rows.
    """
    if len(shape) != whole.dim():
        return None
    part = whole
    for dim, length in enumerate(shape):
        if length * tp.size == part.shape[dim] and tp.size > 1:
            part = part.narrow(dim, tp.rank * length, length)
        elif length != part.shape[dim]:
            return None
    return part


def _distance(own: Tensor, part: Tensor, whole: Tensor) -> float:
    """Return ``max |own - part| / max |whole|``, inf where a number is not finite in one of them only."""
    if own.numel() == 0:
        return 0.0
    differences = own.double() - part.double()
    difference = float(differences.abs().max())
    if difference == 0.0:
        return 0.0
    # The scale is that of the whole tensor: a part may be all zeros but for rounding.
    size = float(whole.double().abs().max())
    if size == 0.0:
        return math.inf
    distance = difference / size
    if not math.isfinite(distance):
        return math.inf
    return distance
