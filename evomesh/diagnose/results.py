"""Results: what a check found, whether it is well, and what to do if it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from evomesh.config.redact import redact_text
from evomesh.errors import printable
from evomesh.quantities import counted

Status = Literal["ok", "warn", "fail"]
RANKS_NAMED = 4
EXIT_PROBLEMS = 1  # as of `evomesh data verify`: the command worked, and found problems


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        check: what was looked at, in a word or two.
        found: one sentence.
        fix: what to do; "" where all is well.
    """

    check: str
    status: Status
    found: str
    fix: str = ""

    def line(self) -> str:
        """Return the result as it is printed; a fix has its own line."""
        text = f"{self.status:<4}  {self.check:<13}  {self.found}"
        if self.fix:
            text += f"\n{'':21}fix: {self.fix}"
        return printable(redact_text(text))


@dataclass
class Report:
    """The results of all checks so far.

    Attributes:
        show: called with each result as soon as it is known, so that a check that hangs is seen to be the next one.
    """

    show: Callable[[CheckResult], None]
    results: list[CheckResult] = field(default_factory=list)

    def add(self, *results: CheckResult) -> None:
        """Keep and show results."""
        for result in results:
            self.results.append(result)
            self.show(result)

    @property
    def exit_code(self) -> int:
        """Return 0 where no check failed; a warning is no failure."""
        failed = any(result.status == "fail" for result in self.results)
        return EXIT_PROBLEMS if failed else 0

    def summary(self) -> str:
        """Return how many checks there were, and how many of them are not well."""
        statuses = [result.status for result in self.results]
        warned = statuses.count("warn")
        failed = statuses.count("fail")
        return f"{counted(len(statuses), 'check')}: {failed} failed, {warned} warned"

    def as_json(self, **more: Any) -> str:
        """Return the report as one line of JSON, with what the caller adds to it."""
        document = {
            "exit_code": self.exit_code,
            **more,
            "checks": [asdict(result) for result in self.results],
        }
        return redact_text(json.dumps(document))


@dataclass(frozen=True)
class RankPlace:
    """The rank that found something, and its host."""

    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def listed(places: Sequence[RankPlace]) -> str:
    """Return the first of some ranks by name, and how many more there are."""
    named = ", ".join(str(place) for place in places[:RANKS_NAMED])
    more = len(places) - RANKS_NAMED
    return f"{named} and {more} more" if more > 0 else named


def by_value(values: Sequence[str], places: Sequence[RankPlace]) -> str:
    """Return each value with the ranks that have it: ``2.13 (rank 0 on a), 2.11 (rank 1 on b)``."""
    ranks: dict[str, list[RankPlace]] = {}
    for value, place in zip(values, places, strict=True):
        ranks.setdefault(value, []).append(place)
    parts = [f"{value} ({listed(where)})" for value, where in ranks.items()]
    return ", ".join(parts)


def report_on_rank_0(rank: int, show: Callable[[CheckResult], None]) -> Report:
    """Return a report that shows its results on rank 0 only: they are the same on all ranks."""
    return Report(show if rank == 0 else _show_nothing)


def _show_nothing(_: CheckResult) -> None:
    return
