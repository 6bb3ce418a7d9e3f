"""Ranks that compute on fewer cores than there are ranks: those that compute at the same time get equal shares.

two ranks on one core, 2 s and 3 s of work     both to 4 s, at half speed; then the second alone to 5 s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Of a second: shorter rests of work are those of rounding.
_NOTHING = 1e-12


class SharedCores(NamedTuple):
    """Cores of a machine, and how many pipelines that do the same share them."""

    cores: int
    pipelines: int


@dataclass
class _CoreWork:
    start: float
    left: float


@dataclass
class CoreShare:
    """The clock of ranks that share cores; ``now`` is its time."""

    sharing: SharedCores
    now: float = 0.0
    _working: dict[int, _CoreWork] = field(default_factory=dict)

    def begin(self, rank: int, seconds: float) -> None:
        """Let a rank begin what would take ``seconds`` on a core alone."""
        self._working[rank] = _CoreWork(self.now, seconds)

    @property
    def speed(self) -> float:
        """Return the share of a core that each rank gets."""
        computing = len(self._working) * self.sharing.pipelines
        return min(self.sharing.cores / computing, 1.0) if computing else 1.0

    def advance(self, arrivals: Sequence[float]) -> list[tuple[int, float]]:
        """Move to the next end of work, or to the first of ``arrivals`` if that is earlier.

        Returns:
            ranks whose work has ended, and when it had begun.
        """
        speed = self.speed
        times = list(arrivals)
        for work in self._working.values():
            times.append(self.now + work.left / speed)
        until = min(times)
        passed = until - self.now
        self.now = until
        ended = []
        for rank, work in list(self._working.items()):
            work.left -= passed * speed
            if work.left <= _NOTHING:
                del self._working[rank]
                ended.append((rank, work.start))
        return ended
