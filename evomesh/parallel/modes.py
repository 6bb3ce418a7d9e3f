"""The four tensor modes as values: all that they differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TensorMode:
    sequence: bool  # activations between blocks are split along the sequence
    regather: bool  # backward gathers the input again instead of keeping it
    storage: Literal["tp", "wp"]  # axis on which weights are cut


MODES = {
    "mtp": TensorMode(sequence=False, regather=False, storage="tp"),
    "msp": TensorMode(sequence=True, regather=False, storage="tp"),
    "fsp": TensorMode(sequence=True, regather=True, storage="tp"),
    "isp": TensorMode(sequence=True, regather=False, storage="wp"),
}
