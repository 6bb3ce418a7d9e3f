"""Where a layer's parameters live: dtype, device, and the tensor axis they may be cut over."""

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
    """Attributes:
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
        """In how many parts a layer cuts its weights itself; with ``wp`` storage, weight sharding does it later."""
        return self.axis.size if self.mode.weight_axis == "tp" else 1

    @property
    def partial(self) -> frozenset[str]:
        """Axes over which a whole parameter's gradient is a partial sum: each rank saw its part of the sequence.

        With ``wp`` storage the sum is made by weight sharding and over the rest of the weight view, not over ``tp``.
        """
        return (
            frozenset({"tp"})
            if self.mode.sequence_parallel and self.mode.weight_axis == "tp"
            else frozenset()
        )

    def on_tensor_axis(self) -> Placement:
        """For embedding, last norm and head, whose weights stay on the tensor axis in every mode."""
        return replace(self, mode=replace(self.mode, weight_axis="tp"))

    @property
    def exchanges_heads(self) -> bool:
        """Whether attention swaps its cut of the sequence for a cut of the heads (isp; Jacobs et al., 2309.14509)."""
        return self.mode.weight_axis == "wp" and self.axis.size > 1

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Activations between blocks -> [T, D] on every rank, for different uses there; ``backward P ->`` as before."""
        return all_gather(x, self.axis) if self.mode.sequence_parallel else copy_to_axis(x, self.axis)

    def make_parameter(
        self, shape: tuple[int, ...], spec: ShardSpec, dtype: torch.dtype | None = None
    ) -> nn.Parameter:
        """An uninitialised parameter of local ``shape``."""
        values = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return with_spec(nn.Parameter(values), spec)
