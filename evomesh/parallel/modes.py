"""The four tensor modes as values: all that they differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TensorMode:
    sequence_parallel: bool  # activations between blocks are split along the sequence
    regather_input: bool  # backward gathers the input again instead of keeping it
    weight_axis: Literal["tp", "wp"]  # axis on which weights are cut


MODES = {
    "mtp": TensorMode(sequence_parallel=False, regather_input=False, weight_axis="tp"),
    "msp": TensorMode(sequence_parallel=True, regather_input=False, weight_axis="tp"),
    "fsp": TensorMode(sequence_parallel=True, regather_input=True, weight_axis="tp"),
    "isp": TensorMode(sequence_parallel=True, regather_input=False, weight_axis="wp"),
}
