"""Muon (Jordan et al., 2024; for large models Liu et al., arXiv 2502.16982): orthogonal updates of whole matrices.

Masters and momenta are sharded as AdamW's are, but a direction needs a whole matrix. So
as many matrices of one kind as ranks share them travel together: each rank gathers one
of them from the shards of all, computes its direction, and sends every rank its shard
of it. Four matrices in four shards, one exchange there and one back:

    rank 0   A0 B0 C0 D0         A0 A1 A2 A3   ->  direction of A         A0 B0 C0 D0
    rank 1   A1 B1 C1 D1    ->   B0 B1 B2 B3   ->  direction of B    ->   A1 B1 C1 D1
    rank 2   A2 B2 C2 D2         C0 C1 C2 C3   ->  direction of C         A2 B2 C2 D2
    rank 3   A3 B3 C3 D3         D0 D1 D2 D3   ->  direction of D         A3 B3 C3 D3

Over two axes the exchange is one after the other. Of small matrices a rank takes several
at once, so that one kernel works on all of them. It has a few whole matrices, or
``MOST_ELEMENTS``, at a time in memory, whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.config.optimizer import OptimizerConfig
from evomesh.optim.groups import UpdateSettings
from evomesh.optim.orthogonal import update_directions
from evomesh.optim.rule import UpdateCounter, overwrite, true_gradient
from evomesh.optim.slot import ParameterSlot
from evomesh.parallel.collectives import all_to_all_no_grad
from evomesh.parallel.grid import Axis, Grid

# Matrices are taken together up to so many elements on a rank: beyond, a kernel has enough to do with one.
MOST_ELEMENTS = 2**22


@dataclass(frozen=True, eq=False)
class MuonMatrix:
    """A master that Muon updates, with its momentum and what holds for its updates."""

    master: Tensor
    momentum: Tensor
    settings: UpdateSettings


@dataclass(frozen=True)
class MatrixSharding:
    """The sharding of alike matrices: (axis, dim) pairs, outermost first, and the matrices packed in each."""

    shards: tuple[tuple[Axis, int], ...]
    packed_rows: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        return math.prod(axis.size for axis, _ in self.shards)

    def gather(self, shards: Tensor) -> Tensor:
        """Exchange a shard of each of m·n matrices, with n ranks, for m whole ones: [m·n, shard] -> [m, whole]."""
        for axis, dim in reversed(self.shards):
            shards = all_to_all_no_grad(shards, axis, 0, dim + 1)
        return shards

    def scatter(self, whole: Tensor) -> Tensor:
        """Undo ``gather``, [m, whole] -> [m·n, shard]."""
        for axis, dim in self.shards:
            whole = all_to_all_no_grad(whole, axis, dim + 1, 0)
        return whole


@dataclass(frozen=True, eq=False)
class MatrixBatch:
    """Alike matrices, of which every rank that shares them computes the directions of as many.

    Attributes:
        places: how many there can be; zeros take the places that a batch has no matrix for.
    """

    matrices: list[MuonMatrix]
    sharding: MatrixSharding
    places: int

    def directions(
        self, shards: list[Tensor], dtype: torch.dtype, steps: int
    ) -> Tensor:
        """Return this rank's shards of the matrices' directions; ``shards`` are those of their momenta."""
        whole = self.sharding.gather(self.stack(shards, dtype))
        found = update_directions(whole, self.sharding.packed_rows, steps)
        return self.sharding.scatter(found)

    def stack(self, shards: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return [places, shard]."""
        first = shards[0]
        stacked = first.new_zeros((self.places, *first.shape), dtype=dtype)
        for place, shard in zip(stacked, shards, strict=False):
            place.copy_(shard)
        return stacked


class Muon(UpdateCounter):
    """Updates matrices whose state is sharded over any axes; equal to one process up to the order of sums.

    Args:
        slots: matrices [r, c], or stacks [E, r, c] of matrices that count each for itself, such as experts.
        settings: what holds for each slot's master.
    """

    def __init__(
        self,
        slots: Sequence[ParameterSlot],
        settings: Mapping[Tensor, UpdateSettings],
        config: OptimizerConfig,
        grid: Grid,
    ) -> None:
        super().__init__(slots[0].master.device)
        self.config = config
        self._matrices: dict[Tensor, MuonMatrix] = {}
        alike: dict[MatrixSharding, dict[object, list[MuonMatrix]]] = {}
        for slot in slots:
            master = slot.master
            momentum = torch.zeros_like(master)
            matrix = MuonMatrix(master, momentum, settings[master])
            self._matrices[master] = matrix
            sharding = _sharding_of(slot, grid)
            kinds = alike.setdefault(sharding, {})
            kind = (master.shape, master.dtype)
            kinds.setdefault(kind, []).append(matrix)
        self.batches: list[MatrixBatch] = []
        for sharding, kinds in alike.items():
            for matrices in kinds.values():
                self.batches += _in_batches(matrices, sharding)

    def step(
        self,
        lr: float,
        beta2: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        for batch in self.batches:
            shards = [
                self._look_ahead(matrix, grad_scale, found_inf)
                for matrix in batch.matrices
            ]
            dtype = self._dtype(shards[0].dtype)
            directions = batch.directions(shards, dtype, self.config.ns_steps)
            for matrix, direction in zip(batch.matrices, directions, strict=False):
                rate = lr * matrix.settings.lr_scale
                kept_share = 1 - rate * matrix.settings.weight_decay
                decayed = matrix.master * kept_share
                updated = decayed.sub_(direction.to(decayed.dtype), alpha=rate)
                overwrite(matrix.master, updated, found_inf)
        self.add(found_inf)

    def _look_ahead(
        self,
        matrix: MuonMatrix,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor:
        """Update the momentum, and return it as it will be after one more such gradient."""
        gradient = matrix.master.grad
        if gradient is None:
            gradient = torch.zeros_like(matrix.master)
        gradient = true_gradient(gradient, grad_scale)
        weight = 1 - self.config.momentum
        momentum = torch.lerp(matrix.momentum, gradient, weight)
        overwrite(matrix.momentum, momentum, found_inf)
        if not self.config.nesterov:
            return momentum
        return torch.lerp(gradient, momentum, self.config.momentum)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which matrices travel and are orthogonalized."""
        if dtype == torch.float64:
            return dtype
        return torch.bfloat16 if self.config.ns_dtype == "bfloat16" else torch.float32

    def communicate(self) -> None:
        for batch in self.batches:
            shards = [matrix.momentum for matrix in batch.matrices]
            dtype = self._dtype(shards[0].dtype)
            whole = batch.sharding.gather(batch.stack(shards, dtype))
            batch.sharding.scatter(whole)

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        matrix = self._matrices.get(master)
        return {} if matrix is None else {"momentum": matrix.momentum}


def _sharding_of(slot: ParameterSlot, grid: Grid) -> MatrixSharding:
    axes = grid.axes
    shards = [(axes[name], dim) for name, dim in slot.spec.shards]
    divided = tuple((axis, dim) for axis, dim in shards if axis.size > 1)
    return MatrixSharding(divided, slot.spec.packed_rows)


def _in_batches(
    matrices: Sequence[MuonMatrix],
    sharding: MatrixSharding,
) -> Iterator[MatrixBatch]:
    """Yield batches of alike matrices, each rank's share as small as ``MOST_ELEMENTS`` and as even as possible."""
    ranks = sharding.num_shards
    elements_of_shard = matrices[0].master.numel()
    whole_elements = elements_of_shard * ranks
    most_of_a_rank = max(1, MOST_ELEMENTS // whole_elements)
    share_of_a_rank = math.ceil(len(matrices) / ranks)
    num_batches = math.ceil(share_of_a_rank / most_of_a_rank)
    even_share = math.ceil(share_of_a_rank / num_batches)
    places = even_share * ranks
    for first in range(0, len(matrices), places):
        stop = first + places
        batch = list(matrices[first:stop])
        yield MatrixBatch(batch, sharding, places)
