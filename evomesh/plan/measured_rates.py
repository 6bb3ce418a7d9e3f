"""Rates that were measured on a machine: of operators by the size of their work, and of messages between its processes.

A rate is a curve: small work is slower than large work, by the start of a kernel or a
message, by caches, by what a processor does with few rows. Between two measured points
the time is on the line that joins them on logarithmic scales:

    work      4 kB      64 kB      1 MB
    rate      0.5       3.1        5.6 GB/s
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

GIGA = 1e9
MICRO = 1e-6
# Stands for the operators of a kind that were not measured by themselves.
ANY = "*"

Positive = Annotated[float, Field(gt=0)]


class FileTable(BaseModel):
    """A table of a device file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RateCurve(FileTable):
    """Rates by work: 10^9 operations or bytes a second.

    Attributes:
        work: operations or bytes, ascending.
        rate: of each.
    """

    work: tuple[Positive, ...] = Field(min_length=1)
    rate: tuple[Positive, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_points(self) -> RateCurve:
        if len(self.work) != len(self.rate):
            raise ValueError(f"{len(self.work)} values of work, {len(self.rate)} rates")
        if any(after <= before for before, after in pairwise(self.work)):
            raise ValueError("work is not ascending")
        return self

    def seconds(self, work: float) -> float:
        """Return the time of so much work: below the smallest that of the smallest, above the largest at its rate."""
        after = bisect_left(self.work, work)
        if after == 0:
            _, seconds = self._point(0)
            return seconds
        if after == len(self.work):
            last = self.rate[-1]
            return work / (last * GIGA)
        low = self._point(after - 1)
        high = self._point(after)
        return between(work, low, high)

    def _point(self, number: int) -> tuple[float, float]:
        """Return the work of a point, and its seconds."""
        work = self.work[number]
        rate = self.rate[number] * GIGA
        return work, work / rate


def between(value: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """Return the time at ``value`` on the line between two points on logarithmic scales."""
    whole = math.log(high[0] / low[0])
    share = math.log(value / low[0]) / whole
    rise = math.log(high[1] / low[1])
    return low[1] * math.exp(share * rise)


class OperatorRate(RateCurve):
    """Rates of an operator.

    Attributes:
        name: in torch, or the kind of kernels that it stands for and "*".
        dtype: of its numbers.
        size: smallest dimension of a product, tokens of a sequence in attention; 0 for others.
    """

    name: str
    dtype: str
    size: int = Field(0, ge=0)


class MessageRate(RateCurve):
    """Rates of a kind of message between processes of one machine, in GB/s of one copy of the whole value.

    Attributes:
        operation: all_gather, reduce_scatter, all_reduce, all_to_all, broadcast or send.
        ranks: of the group.
        processes: that compute on the machine, in groups of so many ranks which all send at the same time.
        latency: microseconds of the shortest message.
    """

    operation: str
    ranks: int = Field(gt=1)
    processes: int = Field(gt=1)
    latency: float = Field(ge=0)

    def message_seconds(self, nbytes: int) -> float:
        """Return the time of a message, which is never less than the latency."""
        return max(self.seconds(nbytes), self.latency * MICRO)


class Host(FileTable):
    """The processors of a machine on which ranks compute.

    Attributes:
        cores: that ranks share; more ranks than these take turns.
        launch: microseconds between two operators: Python, autograd.
        hidden: share of a transfer that passes while its rank computes.
    """

    cores: int = Field(gt=0)
    launch: float = Field(ge=0)
    hidden: float = Field(0.0, ge=0, le=1)

    @property
    def launch_seconds(self) -> float:
        return self.launch * MICRO

    def turns(self, processes: int) -> float:
        """Return how many times longer a computation takes with so many processes that compute."""
        return max(processes / self.cores, 1.0)


def operator_seconds(curves: Sequence[OperatorRate], size: int, work: float) -> float:
    """Return the time of an operator from its curves of several sizes, ascending.

    Between two sizes it is on the line on logarithmic scales, beyond them that of the nearest.
    """
    smaller: list[OperatorRate] = []
    larger: list[OperatorRate] = []
    for curve in curves:
        side = smaller if curve.size <= size else larger
        side.append(curve)
    if not smaller:
        return larger[0].seconds(work)
    nearest = smaller[-1]
    seconds = nearest.seconds(work)
    is_exact = nearest.size in (0, size)
    if is_exact or not larger:
        return seconds
    following = larger[0]
    low = nearest.size, seconds
    high = following.size, following.seconds(work)
    return between(size, low, high)


def nearest_messages(
    rates: Sequence[MessageRate], ranks: int, processes: int
) -> MessageRate:
    """Return the rates of the groups that are most like one of ``ranks`` on a machine with so many processes."""

    def distance(rate: MessageRate) -> tuple[float, float]:
        more_ranks = rate.ranks / ranks
        more_processes = rate.processes / processes
        of_ranks = math.log(more_ranks)
        of_processes = math.log(more_processes)
        return abs(of_ranks), abs(of_processes)

    return min(rates, key=distance)
