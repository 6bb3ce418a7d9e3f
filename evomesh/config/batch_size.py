"""Tokens per optimizer step in InternEvo's terms and in XTuner's, and the setting that makes the two equal.

Both are ranks that see different data x micro-batches of a step x tokens of a
micro-batch:

- InternEvo, evomesh: ``gpus / (tensor * pipeline)  x  micro_num            x  micro_bsz * seq_len``
- XTuner:             ``gpus / sequence_parallel    x  accumulative_counts  x  max_length``

InternEvo's tensor group is its sequence-parallel group, so the tensor size divides
once. (XTuner's migration guide divides by it twice, and its accumulative_counts = TP *
PP * TP / SP makes the batch of that guide's own example twice as large:
tests/unit/config/test_batch_size.py works it out.)
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from evomesh.config.finding import nearest
from evomesh.errors import UserError


@dataclass(frozen=True)
class InternEvoBatch:
    """The settings of InternEvo and evomesh that make up a step."""

    gpus: int
    tensor: int
    pipeline: int
    micro_num: int
    micro_bsz: int
    seq_len: int

    def __post_init__(self) -> None:
        _check_divides(self.gpus, self.tensor * self.pipeline, "--tp times --pp")

    @property
    def data_parallel(self) -> int:
        """Number of ranks that see different data."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def packed_length(self) -> int:
        return self.micro_bsz * self.seq_len

    @property
    def packs_per_step(self) -> int:
        return self.data_parallel * self.micro_num

    @property
    def tokens_per_step(self) -> int:
        return self.packs_per_step * self.packed_length


@dataclass(frozen=True)
class XTunerBatch:
    """The settings of XTuner that make up a step; ``accumulative_counts`` is the number that mmengine receives."""

    gpus: int
    sequence_parallel: int
    accumulative_counts: int
    max_length: int

    def __post_init__(self) -> None:
        _check_divides(self.gpus, self.sequence_parallel, "--sp")

    @property
    def data_parallel(self) -> int:
        """Number of ranks that see different data."""
        return self.gpus // self.sequence_parallel

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of one of mmengine's iterations: one micro-batch on every rank."""
        return self.data_parallel * self.max_length

    @property
    def tokens_per_step(self) -> int:
        return self.tokens_per_iteration * self.accumulative_counts


@dataclass(frozen=True)
class Match:
    """The value of one setting that gives a number of tokens per step.

    Attributes:
        value: the exact value; the settings are equal only if it is a whole number.
        unit: tokens per step that one more of the setting adds.
    """

    value: Fraction
    unit: int

    @property
    def exact(self) -> int | None:
        return self.value.numerator if self.value.denominator == 1 else None

    @property
    def nearest(self) -> list[int]:
        """The whole numbers next to the value; at least 1."""
        below = self.value.numerator // self.value.denominator
        return [number for number in (below, below + 1) if number >= 1]

    def tokens(self, number: int) -> int:
        return number * self.unit


def match_accumulative_counts(
    tokens: int, gpus: int, sequence_parallel: int, max_length: int
) -> Match:
    """Return the ``accumulative_counts`` with which XTuner takes ``tokens`` tokens per step."""
    one = XTunerBatch(gpus, sequence_parallel, 1, max_length)
    return Match(Fraction(tokens, one.tokens_per_step), one.tokens_per_step)


def match_micro_num(tokens: int, batch: InternEvoBatch) -> Match:
    """Return the ``micro_num`` with which ``batch``, otherwise unchanged, takes ``tokens`` tokens per step."""
    unit = batch.data_parallel * batch.packed_length
    return Match(Fraction(tokens, unit), unit)


def _check_divides(gpus: int, size: int, name: str) -> None:
    if gpus % size:
        raise UserError(
            f"{gpus} GPUs do not divide by {name}={size}",
            expected=f"{name} of {nearest(size, divisors_of=gpus)}",
            code="EVO-PARALLEL-001",
        )
