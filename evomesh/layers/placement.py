"""Placement of a layer's parameters: dtype, device, and the tensor axis that may shard them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from evomesh.parallel.collectives import all_gather, copy_to_axis
from evomesh.parallel.grid import Axis
from evomesh.parallel.modes import MODES, TensorMode
from evomesh.parallel.spec import ShardSpec, with_spec


@dataclass(frozen=True)
class Placement:
    """Dtype, device and sharding of a layer's parameters and activations.

    Attributes:
        axis: the grid's tensor axis.
        mode: how activations and weights are laid out over it.
        dtype: of parameters and activations.
        device: of parameters.
    """

    axis: Axis = field(default_factory=lambda: Axis("tp"))
    mode: TensorMode = MODES["mtp"]
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def weight_shards(self) -> int:
        """Number of shards in which a layer creates its weights; weight sharding (axis ``wp``) shards them later."""
        return self.axis.size if self.mode.weight_axis == "tp" else 1

    @property
    def partial(self) -> frozenset[str]:
        """Axes over which a replicated parameter's gradient is a partial sum: each rank saw its shard of the sequence.

        With weight axis ``wp``, weight sharding and the rest of the weight view do the
        sum, not ``tp``.
        """
        tensor_parallel = self.mode.weight_axis == "tp"
        if self.mode.sequence_parallel and tensor_parallel:
            return frozenset({"tp"})
        return frozenset()

    def on_tensor_axis(self) -> Placement:
        """Return the placement of embedding, last norm and head, whose weights are on the tensor axis in every mode."""
        return replace(self, mode=replace(self.mode, weight_axis="tp"))

    @property
    def exchanges_heads(self) -> bool:
        """Return whether attention exchanges sequence shards for head shards (isp; Ulysses, arXiv 2309.14509)."""
        return self.mode.weight_axis == "wp" and self.axis.size > 1

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Gather activations between blocks to [T, D]: ``S(0)@tp -> R@tp``, in mtp ``I@tp -> R@tp``; backward dual."""
        return (
            all_gather(x, self.axis)
            if self.mode.sequence_parallel
            else copy_to_axis(x, self.axis)
        )

    def make_parameter(
        self, shape: tuple[int, ...], spec: ShardSpec, dtype: torch.dtype | None = None
    ) -> nn.Parameter:
        """Return an uninitialized parameter of local ``shape``."""
        values = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return with_spec(nn.Parameter(values), spec)
