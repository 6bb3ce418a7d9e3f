"""Typed values of ``data.rampup_batch_size`` and ``data.skip_batches``, which a config has as text.

The schema parses them; the rest of the package reads the typed value. ``str`` of a
value is a text that parses to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from evomesh.quantities import counted

RAMPUP_FORM = 'three positive integers "start increment every", such as "2 2 100"'
STEPS_FORM = 'ascending step numbers and ranges, such as "3,10-20"'


class SettingError(ValueError):
    """A text that does not parse: what was found, and what was expected instead."""

    def __init__(self, found: str, expected: str) -> None:
        self.found, self.expected = found, expected
        super().__init__(f"{found}; expected {expected}")


@dataclass(frozen=True)
class BatchSizeRampup:
    """A batch that grows: ``min(start + (step // every) * increment, full)`` packs in step ``step``.

    Written in a config it counts micro-batches of one rank; ``times(dp_size)`` counts
    packs of all ranks.
    """

    start: int
    increment: int
    every: int

    @staticmethod
    def parse(text: str) -> BatchSizeRampup | None:
        """Parse ``"start increment every"``; "" is None.

        Raises:
            SettingError: not three positive integers.
        """
        words = text.split()
        if not words:
            return None
        are_positive = all(word.isdigit() and int(word) > 0 for word in words)
        if len(words) != 3 or not are_positive:
            raise SettingError(
                f"found {text!r}: {counted(len(words), 'item')}", RAMPUP_FORM
            )
        start, increment, every = map(int, words)
        return BatchSizeRampup(start, increment, every)

    def times(self, dp_size: int) -> BatchSizeRampup:
        """Return the same ramp for ``dp_size`` ranks together."""
        return BatchSizeRampup(
            self.start * dp_size, self.increment * dp_size, self.every
        )

    def size(self, step: int, full: int) -> int:
        """Return the number of packs of step ``step``, at most ``full``."""
        return min(self.start + step // self.every * self.increment, full)

    def __str__(self) -> str:
        return f"{self.start} {self.increment} {self.every}"


@dataclass(frozen=True)
class StepRanges:
    """Ascending ranges of step numbers, both ends included."""

    ranges: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def parse(text: str) -> StepRanges:
        """Parse comma-separated steps and ranges, ``"3,10-20"``; "" is none.

        Raises:
            SettingError: an item is neither, runs backwards or is out of order.
        """
        ranges: list[tuple[int, int]] = []
        items = [item for item in text.split(",") if item.strip()]
        for number, item in enumerate(items, 1):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", item)
            if match is None:
                raise SettingError(
                    f"item {number}, {item!r}, is not a step or a range", STEPS_FORM
                )
            first = int(match[1])
            last = int(match[2] or match[1])
            if last < first:
                raise SettingError(
                    f"item {number}, {item!r}, runs backwards", f'"{last}-{first}"'
                )
            if ranges and first <= ranges[-1][1]:
                raise SettingError(
                    f"item {number}, {item!r}, comes after step {ranges[-1][1]}",
                    STEPS_FORM,
                )
            ranges.append((first, last))
        return StepRanges(tuple(ranges))

    def __contains__(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.ranges)

    def __str__(self) -> str:
        return ",".join(
            str(first) if first == last else f"{first}-{last}"
            for first, last in self.ranges
        )


def _parse_rampup(value: Any) -> Any:
    if isinstance(value, BatchSizeRampup):
        return value
    return BatchSizeRampup.parse(_setting_text(value, RAMPUP_FORM))


def _parse_steps(value: Any) -> Any:
    if isinstance(value, StepRanges):
        return value
    # A shell takes the quotes away, so `--set data.skip_batches=53,58` gives numbers.
    numbers = value if isinstance(value, list | tuple) else [value]
    if numbers and all(type(number) is int for number in numbers):
        value = ",".join(map(str, numbers))
    return StepRanges.parse(_setting_text(value, STEPS_FORM))


def _setting_text(value: Any, expected: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SettingError(f"found {value!r} ({type(value).__name__})", expected)
    return value


def _as_written(value: BatchSizeRampup | StepRanges | None) -> str:
    return "" if value is None else str(value)


# The field types of the schema: parsed from text, dumped as text.
RampupSetting = Annotated[
    BatchSizeRampup | None, BeforeValidator(_parse_rampup), PlainSerializer(_as_written)
]
StepsSetting = Annotated[
    StepRanges, BeforeValidator(_parse_steps), PlainSerializer(_as_written)
]
