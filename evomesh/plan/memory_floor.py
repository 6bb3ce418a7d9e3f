"""A bound from below of what a rank holds, from the number of parameters alone."""

from __future__ import annotations

from evomesh.config.schema import Config
from evomesh.config.size import parameter_count
from evomesh.plan.layout_choice import LayoutChoice
from evomesh.plan.memory import PeakMemory


class MemoryFloor:
    """Computes what a rank holds at least, if all sizes divide and nothing is replicated."""

    def __init__(self, config: Config, world_size: int) -> None:
        self._world_size = world_size
        self._parameters = parameter_count(config.model) or 0
        self._is_half = not config.model.dtype.endswith("32")

    def peak(self, choice: LayoutChoice) -> PeakMemory:
        """Return weights and gradients of a rank; at least one stage holds as many as the mean."""
        shards = choice.tensor
        if choice.mode == "isp":
            # Embedding and head are sharded over the tensor axis.
            shards = max(shards, choice.weight)
        if choice.fsdp:
            shards *= choice.zero
        own = self._parameters // (shards * choice.pipeline)
        weight = 4
        if self._is_half:
            weight = 2
        held = {
            "weights": own * weight,
            "gradients": own * 4,
        }
        return PeakMemory(held, "update", outside={})
