"""The four tensor modes as values; docs/parallelism.md shows what each does with a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TensorMode:
    """Everything in which the tensor modes differ."""

    sequence_parallel: bool  # activations between blocks are sharded along the sequence
    regather_input: (
        bool  # backward gathers the input again, so that forward need not keep it
    )
    # Axis over which the weights of blocks are sharded.
    weight_axis: Literal["tp", "wp"]


MODES = {
    "mtp": TensorMode(sequence_parallel=False, regather_input=False, weight_axis="tp"),
    "msp": TensorMode(sequence_parallel=True, regather_input=False, weight_axis="tp"),
    "fsp": TensorMode(sequence_parallel=True, regather_input=True, weight_axis="tp"),
    "isp": TensorMode(sequence_parallel=True, regather_input=False, weight_axis="wp"),
}
