"""Figures of single layers and parameters of the gradient, the same in every layout (``grad_profiling``).

A rank measures what it counts in the global norm, so each element is measured once.
All sums of a step are one tensor [R] on the device, summed over all ranks:

    squares of P parameters | nonzero elements of P parameters | squares of V rows of the output head

It joins the step's other results, so that the host does not wait for it separately.
What is not asked for has no columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from evomesh.config.grad_profiling import GradProfilingConfig, chosen_layer, layer_of
from evomesh.errors import UserError
from evomesh.optim.slot import ParameterSlot
from evomesh.parallel.collectives import all_gather_objects, all_reduce_no_grad
from evomesh.parallel.grid import Grid


@dataclass(frozen=True)
class GradientFigures:
    """Figures of one step, on the host.

    Attributes:
        scalars: by InternEvo's names of the metrics, such as
            ``layer_grad_norm/layers.3`` and ``param_zero_grad/head.weight``.
        vocab_norms: [V] float64, the norm of each row of the output head's gradient;
            None: not asked for.
    """

    scalars: dict[str, float]
    vocab_norms: Tensor | None


class GradientObserver(Protocol):
    """Sees the gradients of a step once they are summed over the ranks."""

    def measure(self) -> Tensor:
        """Return numbers [R] float64, not yet unscaled; the step brings them to the host with its results."""

    def figures(self, sums: Tensor, inv_scale: float) -> GradientFigures:
        """Return what the numbers of ``measure``, on the host, stand for."""


class GradientProfile:
    """Measures the gradients of a step; made once, on all ranks together.

    Args:
        slots: the parameters of this rank.
        tied: the output head is the embedding.

    Raises:
        UserError: the model has no such layer, or no output head.
    """

    def __init__(
        self,
        config: GradProfilingConfig,
        slots: Sequence[ParameterSlot],
        grid: Grid,
        tied: bool,
    ) -> None:
        self.config = config
        self.grid = grid
        self.device = slots[0].local.device

        # 1. The whole model: other stages of a pipeline have other parameters.
        shapes = _shapes_of_all_stages(slots, grid)

        # 2. The parameters of the chosen layers, with their elements: P columns.
        names = _chosen_parameters(config, list(shapes), tied)
        self.elements: dict[str, int] = {}
        for name in names:
            self.elements[name] = math.prod(shapes[name])
        counted = [slot for slot in slots if slot.counts_in_norm]
        self.slots = [slot for slot in counted if slot.name in self.elements]
        columns = []
        for slot in self.slots:
            column = names.index(slot.name)
            columns.append(column)
        # Made here, because the host waits for a tensor of Python numbers.
        self.columns = torch.tensor(columns, dtype=torch.long, device=self.device)

        # 3. The output head, which is on the last stage only: V columns.
        head = "embedding.weight" if tied else "head.weight"
        self.heads = [slot for slot in counted if slot.name == head]
        self.vocab_rows = 0
        if config.vocab_grad_norm_profiling:
            self.vocab_rows = _rows_of_head(head, shapes)

    def measure(self) -> Tensor:
        """Return the sums [R] over all ranks, float64, of the reduced gradients, not yet unscaled or clipped."""
        parts = []
        if self.config.grad_norm_profiling:
            parts.append(self._by_parameter(_square))
        if self.config.zero_grad_profiling:
            parts.append(self._by_parameter(_nonzero))
        if self.config.vocab_grad_norm_profiling:
            parts.append(self._head_squares())
        own_sums = torch.cat(parts)
        grid = self.grid
        return all_reduce_no_grad(own_sums, grid.dp, grid.tp, grid.pp)

    def _by_parameter(self, figure: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a figure of each parameter [P], 0 where this rank has none."""
        by_parameter = self._zeros(len(self.elements))
        nothing = self._zeros(())
        figures = []
        for slot in self.slots:
            gradient = _stored_gradient(slot, self.grid)
            own_figure = nothing if gradient is None else figure(gradient)
            figures.append(own_figure)
        if figures:
            by_parameter[self.columns] = torch.stack(figures)
        return by_parameter

    def _head_squares(self) -> Tensor:
        """Return the square of each row of the output head's gradient [V], 0 for rows of other ranks."""
        squares = self._zeros(self.vocab_rows)
        for slot in self.heads:
            gradient = _stored_gradient(slot, self.grid)
            if gradient is None:
                continue
            rows = slot.spec.stored_ranges(self.grid)[0]
            norms = torch.linalg.vector_norm(
                gradient.flatten(1), dim=1, dtype=_wide(gradient)
            )
            squares[rows.start : rows.stop] = norms.double().square()
        return squares

    def _zeros(self, shape: int | tuple[()]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def figures(self, sums: Tensor, inv_scale: float) -> GradientFigures:
        """Return the figures that sums of ``measure``, on the host, stand for."""
        scalars: dict[str, float] = {}
        remaining = sums
        parameters = len(self.elements)
        if self.config.grad_norm_profiling:
            squares = remaining[:parameters].tolist()
            remaining = remaining[parameters:]
            squares_by_name = self._named("grad_norm", squares)
            for name, square in squares_by_name.items():
                scalars[name] = math.sqrt(square) * inv_scale
        if self.config.zero_grad_profiling:
            nonzero = remaining[:parameters].tolist()
            remaining = remaining[parameters:]
            zeros = self._zero_counts(nonzero)
            scalars |= self._named("zero_grad", zeros)
        vocab_norms = None
        if self.config.vocab_grad_norm_profiling:
            vocab_norms = remaining.sqrt() * inv_scale
        return GradientFigures(scalars, vocab_norms)

    def _zero_counts(self, nonzero: list[float]) -> list[int]:
        """Return how many elements of each chosen parameter's gradient are zero."""
        sizes = self.elements.values()
        return [size - int(count) for size, count in zip(sizes, nonzero, strict=True)]

    def _named(self, metric: str, by_parameter: Sequence[float]) -> dict[str, float]:
        """Return figures that add up: the sum of each layer, then those of the parameters, by name of the metric."""
        of_layers: dict[str, float] = defaultdict(int)
        of_parameters: dict[str, float] = {}
        for name, figure in zip(self.elements, by_parameter, strict=True):
            of_layers[f"layer_{metric}/{layer_of(name)}"] += figure
            of_parameters[f"param_{metric}/{name}"] = figure
        return {**of_layers, **of_parameters}


def _shapes_of_all_stages(
    slots: Sequence[ParameterSlot], grid: Grid
) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every parameter, without the padding of the layout."""
    own_shapes = {}
    for slot in slots:
        own_shapes[slot.name] = slot.spec.stored_shape
    shapes: dict[str, tuple[int, ...]] = {}
    for stage_shapes in all_gather_objects(own_shapes, grid.pp):
        shapes |= stage_shapes
    return shapes


def _chosen_parameters(
    config: GradProfilingConfig, names: Sequence[str], tied: bool
) -> list[str]:
    """Return the parameters of the chosen layers.

    Raises:
        UserError: a chosen layer has no parameter, as may be in a custom model.
    """
    if not config.writes_layers:
        return []
    if not config.layers:
        return list(names)
    existing = dict.fromkeys(layer_of(name) for name in names)
    chosen = set()
    for written in config.layers:
        layer = chosen_layer(written, tied)
        if layer not in existing:
            raise UserError(
                f"the model has no layer {written!r}",
                where="grad_profiling.layers",
                expected=f"any of {', '.join(existing)}",
                code="EVO-MODEL-006",
            )
        chosen.add(layer)
    return [name for name in names if layer_of(name) in chosen]


def _rows_of_head(head: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return V.

    Raises:
        UserError: a custom model has no parameter of this name.
    """
    if head not in shapes:
        raise UserError(
            f"the model has no parameter {head}",
            where="grad_profiling.vocab_grad_norm_profiling",
            fix="remove it; it measures an output head of that name",
            code="EVO-MODEL-006",
        )
    return shapes[head][0]


def _stored_gradient(slot: ParameterSlot, grid: Grid) -> Tensor | None:
    """Return the gradient of this rank's rows without the padding of the layout; None if nothing used the parameter."""
    gradient = slot.master.grad
    if gradient is None or not slot.spec.padding:
        return gradient
    rows = slot.spec.stored_ranges(grid)[0]
    return gradient[: len(rows)]


def _square(gradient: Tensor) -> Tensor:
    """Return the square of the norm; float64, as float32 overflows at gradients of 1e19."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=_wide(gradient))
    return norm.double().square()


def _nonzero(gradient: Tensor) -> Tensor:
    """Return how many elements are not zero."""
    return torch.count_nonzero(gradient).double()


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)
