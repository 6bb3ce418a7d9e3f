"""Decide from the records of all ranks whether a run hangs, and which rank the others wait for.

A rank that waits in a collective is a victim. The culprit is the rank that they wait
for: one that is stopped, has ended, or is not in a collective and makes no progress. If
every rank waits in a collective, it is the one whose order of collectives differs from
that of its previous step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from evomesh.watchdog.process_state import DISK_WAIT
from evomesh.watchdog.ring import CollectiveEntry, Frame, Place, RingState
from evomesh.watchdog.stacks import Stacks

GONE_S = 3.0  # how long the last words of a rank may take
# Shares of a processor: a rank above the first computes, below the second it waits, and
# between them it may only get too little of a busy machine.
BUSY, IDLE = 0.5, 0.05
STARVED_FACTOR = 6.0
LONG_PHASES = {Place.START, Place.VALIDATION, Place.SAVE, Place.UPKEEP, Place.END}
BACKGROUND_PHASES = {Place.SAVE, Place.END}
FILE_PHASES = {Place.FILE, Place.SAVE, Place.REPORT, Place.END}


class HangKind(StrEnum):
    """Kinds of hangs, by what keeps a rank from making progress."""

    GONE = "gone"
    STOPPED = "stopped"
    COLLECTIVE = "collective"
    BUSY = "busy"
    FILE = "file"
    DATA = "data"
    IDLE = "idle"


@dataclass(frozen=True)
class HangLimits:
    """Limits of the time that a rank may make no progress.

    Attributes:
        silence_s: in a step; at least this, and ``steps`` median steps.
        long_phase_s: in phases that take long: start, first step, validation, save, compilation.
    """

    silence_s: float = 10.0
    steps: float = 3.0
    long_phase_s: float = 1800.0

    def of_a_step(self, median_step_s: float) -> float:
        return max(self.silence_s, self.steps * median_step_s)


@dataclass(frozen=True)
class RankReport:
    """Knowledge of a rank at one moment; all times are seconds until now.

    Attributes:
        ring: what it has recorded.
        process: Linux's letter for its state.
        stalled_s: since it last entered or left anything.
        cpu_share: processors that it has used since then, but for what it still did in the first second.
        stopped_s, gone_s: since its process was seen stopped, or had ended; 0 while it runs.
        lock_age_s: since a background thread last had Python's lock.
        median_step_s: of its newest steps; 0 before there are some.
        background_s: since its background thread began what it does, such as the write of a piece of a file.
        stacks: asked for once it makes no progress.
    """

    host: str
    ring: RingState
    process: str = "S"
    stalled_s: float = 0.0
    stopped_s: float = 0.0
    gone_s: float = 0.0
    cpu_share: float = 0.0
    lock_age_s: float = 0.0
    median_step_s: float = 0.0
    background_s: float = 0.0
    stacks: Stacks | None = None

    @property
    def rank(self) -> int:
        return self.ring.rank

    @property
    def place(self) -> Frame:
        """Return what the rank is in, innermost."""
        nothing = Frame(Place.NOTHING, 0.0)
        return self.ring.frames[-1] if self.ring.frames else nothing

    @property
    def wait(self) -> Frame | None:
        """Return the collective that it is in, or its wait for a device that may be in one; None where it is in none.

        A rank that waits for its save in the background is where that is.
        """
        background = self.ring.background
        if background is not None and self.place.place in BACKGROUND_PHASES:
            return background if background.place.is_collective else None
        is_wait = self.place.place.is_collective or self.place.place == Place.RESULTS
        return self.place if is_wait else None

    @property
    def waits_for_others(self) -> bool:
        return self.wait is not None

    def is_in(self, places: Iterable[Place]) -> bool:
        inside = {frame.place for frame in self.ring.frames}
        return not inside.isdisjoint(places)


@dataclass(frozen=True)
class Suspect:
    """The rank that the others wait for.

    Attributes:
        detail: about its collectives.
    """

    report: RankReport
    kind: HangKind
    detail: str = ""


def find_suspect(
    reports: Sequence[RankReport], limits: HangLimits, is_complete: bool = True
) -> Suspect | None:
    """Return the rank that keeps the run from making progress; None while it makes some.

    Args:
        is_complete: whether every rank has a report; if not, an unknown rank may be the one that all wait for.
    """
    running = [report for report in reports if not report.ring.is_ending]
    # A rank with an error or a lost peer has its sentence, and ends the others with it.
    if not running or any(report.ring.has_verdict for report in reports):
        return None
    medians = [report.median_step_s for report in running]
    limit = limits.of_a_step(max(medians))
    return (
        _gone_or_stopped(running, limit)
        or _failed_collective(running)
        or (_out_of_order(running, limit) if is_complete else None)
        or _without_progress(running, limits, limit)
    )


def _gone_or_stopped(running: list[RankReport], limit: float) -> Suspect | None:
    """Find what no phase excuses."""
    for report in running:
        if report.gone_s >= GONE_S:
            return Suspect(report, HangKind.GONE)
    for report in running:
        # Progress can be younger than the stop by what other threads still did.
        if report.stopped_s >= limit:
            return Suspect(report, HangKind.STOPPED)
    return None


def _failed_collective(running: list[RankReport]) -> Suspect | None:
    """Find the order of collectives that made one of them fail."""
    if not any(report.ring.has_failed_collective for report in running):
        return None
    return _odd_order(running, must_differ=True)


def _out_of_order(running: list[RankReport], limit: float) -> Suspect | None:
    """Find the reason why all ranks wait for each other."""
    all_wait = all(report.waits_for_others for report in running)
    stalled = min(report.stalled_s for report in running)
    has_started = all(report.ring.steps_done > 0 for report in running)
    if len(running) == 1 or not all_wait or stalled < limit:
        return None
    return _odd_order(running, must_differ=not has_started)


def _odd_order(running: list[RankReport], must_differ: bool) -> Suspect | None:
    """Return the rank whose collectives differ from those of the others, or from its previous step.

    Args:
        must_differ: only if two ranks are in different collectives with one number.
    """
    mismatch = _first_mismatch(running)
    if mismatch is None and must_differ:
        return None
    deviations = []
    for report in running:
        found = _deviation(report.ring.entries)
        if found is not None:
            deviations.append((report, found))
    if len(deviations) == 1:
        report, (expected, called) = deviations[0]
        return Suspect(report, HangKind.COLLECTIVE, _order(called, expected))
    if mismatch is not None:
        report, called, expected = mismatch
        return Suspect(report, HangKind.COLLECTIVE, _order(called, expected))
    return _late(running)


_EnteredCall = tuple[RankReport, CollectiveEntry]


class _Mismatch(NamedTuple):
    """A rank, its collective, and that of most others in its place."""

    report: RankReport
    called: CollectiveEntry
    expected: CollectiveEntry


def _deviation(
    entries: Sequence[CollectiveEntry],
) -> tuple[CollectiveEntry, CollectiveEntry] | None:
    """Return (what the previous step did, what this one does instead) where they first differ."""
    # A save in the background agrees with the other ranks at any moment of a step.
    in_order = [entry for entry in entries if not entry.is_in_background]
    if not in_order:
        return None
    step = in_order[-1].step
    current = [entry for entry in in_order if entry.step == step]
    before = [entry for entry in in_order if entry.step == step - 1]
    for expected, called in zip(before, current, strict=False):
        if expected.kind != called.kind:
            return expected, called
    return None


def _first_mismatch(running: list[RankReport]) -> _Mismatch | None:
    """Return the first mismatch under one number of one group."""
    # Ranks that run the same code meet in the same collective under each number.
    calls: dict[tuple[str, int], list[_EnteredCall]] = defaultdict(list)
    for report in running:
        for entry in report.ring.entries:
            call = (entry.group, entry.number)
            same_call = calls[call]
            same_call.append((report, entry))
    by_number = sorted(calls, key=lambda call: call[1])
    for call in by_number:
        found = _other_kind(calls[call])
        if found is not None:
            return found
    return None


def _other_kind(same_call: Sequence[_EnteredCall]) -> _Mismatch | None:
    """Return the first rank whose kind of collective is not the most frequent, its entry and a usual one."""
    kinds = Counter(entry.kind for _, entry in same_call)
    usual_kind, _ = kinds.most_common(1)[0]
    usual = None
    unusual = None
    for report, entry in same_call:
        if entry.kind == usual_kind:
            usual = usual or entry
        elif unusual is None:
            unusual = (report, entry)
    if unusual is None or usual is None:
        return None
    return _Mismatch(*unusual, usual)


def _late(running: list[RankReport]) -> Suspect | None:
    """Return the rank that has not entered a collective in which others wait, and waits for no such rank itself."""
    suspect = None
    seen: set[int] = set()
    waiters: list[RankReport] = running
    while waiters:
        found = next(filter(None, (_late_for(one, running) for one in waiters)), None)
        if found is None or found.report.rank in seen:
            break
        suspect = found
        seen.add(found.report.rank)
        waiters = [found.report]
    return suspect


def _late_for(waiter: RankReport, running: list[RankReport]) -> Suspect | None:
    """Return the rank that has not entered the collective in which ``waiter`` waits."""
    wanted = waiter.wait
    if wanted is None or not wanted.group:
        return None
    for report in running:
        entered = report.ring.entered.get(wanted.group)
        if entered is not None and entered < wanted.number:
            detail = f"has not entered {describe_call(wanted)}"
            return Suspect(report, HangKind.COLLECTIVE, detail)
    return None


def _order(called: CollectiveEntry, expected: CollectiveEntry) -> str:
    # The expected one may be of the previous step, so only the other has a number.
    wanted = f"{expected.operation.words} of {_axis(expected.group)}"
    name = f"{called.operation.words} of {_axis(called.group)}"
    return (
        f"has called {name} (number {called.number}, {called.nbytes} bytes) instead of {wanted} "
        f"({expected.nbytes} bytes): it skips a collective, or calls them in another order"
    )


def describe_call(frame: Frame) -> str:
    """Return a collective as a sentence has it: ``all_reduce of dp (number 31)``."""
    name = frame.place.words
    if not frame.group:
        return name
    return f"{name} of {_axis(frame.group)} (number {frame.number})"


def _axis(group: str) -> str:
    """Return the part of a group's name that a user knows."""
    return group.partition(":")[0]


def _without_progress(
    running: list[RankReport], limits: HangLimits, limit: float
) -> Suspect | None:
    """Return the rank, not in a collective, that has made no progress for longer than it may."""
    able = running
    if len(running) > 1:
        able = [report for report in running if not report.waits_for_others]
    candidates = []
    for report in able:
        if report.stalled_s >= _allowance(report, limits, limit):
            candidates.append(Suspect(report, _kind(report)))
    if not candidates:
        return None
    first = min(candidates, key=_guilt)
    # One that only waits may be in a collective that is not recorded, as those of a
    # compiled graph: for a rank that still may take its time.
    if first.kind == HangKind.IDLE and len(candidates) < len(able):
        return None
    return first


def _guilt(suspect: Suspect) -> tuple[int, bool, int]:
    """Return what sorts the most likely culprit first."""
    # A rank that computes, or waits for a file, does not wait for another rank.
    order = (HangKind.BUSY, HangKind.DATA, HangKind.FILE, HangKind.IDLE)
    stacks = suspect.report.stacks or Stacks()
    kind = order.index(suspect.kind)
    return kind, stacks.is_in_communication, suspect.report.ring.events


def _allowance(report: RankReport, limits: HangLimits, limit: float) -> float:
    """Return how long this rank may make no progress where it is."""
    stacks = report.stacks or Stacks()
    if stacks.is_in_debugger:
        return float("inf")
    is_first = report.ring.steps_done == 0
    computes = report.cpu_share > IDLE
    # A worker that computes is no dead one: reading and tokenizing may be slow.
    reads = report.is_in({Place.DATA}) and computes
    if _waits_for_piece(report):
        return STARVED_FACTOR * limit
    is_long = is_first or reads or stacks.is_compiling or report.is_in(LONG_PHASES)
    if is_long:
        return max(limit, limits.long_phase_s)
    if IDLE < report.cpu_share < BUSY:
        return STARVED_FACTOR * limit
    return limit


def _waits_for_piece(report: RankReport) -> bool:
    """Return whether a rank waits for one call that reads or writes; a save as a whole may take long."""
    if report.place.place == Place.FILE:
        return True
    background = report.ring.background
    is_piece = background is not None and background.place == Place.FILE
    return is_piece and report.background_s >= report.stalled_s


def _kind(report: RankReport) -> HangKind:
    stacks = report.stacks or Stacks()
    if report.is_in({Place.DATA}):
        reads_itself = any("/evomesh/data/token_files" in c.path for c in stacks.main)
        return HangKind.FILE if reads_itself else HangKind.DATA
    if report.cpu_share > IDLE:
        return HangKind.BUSY
    if report.process == DISK_WAIT or report.is_in(FILE_PHASES):
        return HangKind.FILE
    return HangKind.IDLE
