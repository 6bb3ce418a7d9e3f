"""The sentence that explains a hang."""

from __future__ import annotations

import time
from collections.abc import Sequence

from evomesh.watchdog.diagnosis import HangKind, RankReport, Suspect, describe_call
from evomesh.watchdog.ring import Place
from evomesh.watchdog.stacks import Stacks

MAX_CALLS = 12
LISTED_RANKS = 5  # ranks listed by number; the rest are counted


def explain(suspect: Suspect, reports: Sequence[RankReport], now: float) -> str:
    """Return one sentence: which rank is stuck where and since when, and what the others wait for.

    Args:
        now: seconds since the epoch.
    """
    report = suspect.report
    seconds = _seconds(suspect)
    clock = time.strftime("%H:%M:%S", time.localtime(now - seconds))
    who = f"rank {report.rank} on {report.host} (pid {report.ring.pid})"
    sentence = (
        f"{who} {_what(suspect)}, in {_where(report)}, since {clock} ({seconds:.0f} s)"
    )
    others = _others(suspect, reports)
    return f"{sentence}; {others}" if others else sentence


def stack_lines(suspect: Suspect) -> list[str]:
    """Return the Python stack of the rank, innermost call first."""
    stacks = suspect.report.stacks or Stacks()
    return [f"  at {call}" for call in stacks.main[:MAX_CALLS]]


def _seconds(suspect: Suspect) -> float:
    report = suspect.report
    if suspect.kind == HangKind.GONE:
        return report.gone_s
    if suspect.kind == HangKind.STOPPED:
        return report.stopped_s
    return report.stalled_s


def _what(suspect: Suspect) -> str:
    report = suspect.report
    stacks = report.stacks or Stacks()
    if suspect.kind == HangKind.GONE:
        return "was killed, or has ended without a message"
    if suspect.kind == HangKind.STOPPED:
        return "is stopped by a signal (SIGSTOP, SIGTSTP or a debugger)"
    if suspect.kind == HangKind.COLLECTIVE:
        return suspect.detail
    if suspect.kind == HangKind.BUSY:
        lock = " and holds Python's lock" if report.lock_age_s > 3.0 else ""
        return f"computes without progress (an endless loop?){lock}{_at(stacks)}"
    if suspect.kind == HangKind.FILE:
        return f"waits for a file system that does not answer{_at(stacks)}"
    if suspect.kind == HangKind.DATA:
        return _data(stacks)
    return f"waits and does not compute{_at(stacks)}"


def _at(stacks: Stacks) -> str:
    return f" at {stacks.main[0]}" if stacks.main else ""


def _data(stacks: Stacks) -> str:
    worker = stacks.data_worker
    if worker is not None:
        return f"waits for data, whose worker is stuck at {worker} (a file system that does not answer?)"
    if stacks.main:
        return "waits for data, and its data worker is dead"
    return "waits for data that never comes"


def _where(report: RankReport) -> str:
    """Return phase, step and path."""
    ring = report.ring
    place = Place.NOTHING.words
    detail = ""
    for frame in ring.frames:
        if frame.place.is_collective:
            continue
        detail = frame.detail
        if frame.place != Place.STEP:
            place = frame.place.words
    if detail:
        place += f" of {detail}"
    elif ring.background is not None and ring.background.detail:
        place += f" (in the background: {ring.background.detail})"
    if ring.step < 0:
        return place
    return f"{place} of step {ring.step}, micro-batch {ring.micro_batch}"


def _others(suspect: Suspect, reports: Sequence[RankReport]) -> str:
    """Return what the other ranks wait for."""
    waits: dict[str, list[int]] = {}
    for report in reports:
        wait = report.wait
        if report.rank == suspect.report.rank or wait is None:
            continue
        call = describe_call(wait)
        ranks_in_call = waits.setdefault(call, [])
        ranks_in_call.append(report.rank)
    if not waits:
        return ""
    parts = []
    for call, ranks in waits.items():
        parts.append(f"{name_ranks(ranks)} in {call}")
    listed = ", ".join(parts)
    return f"waiting for it: {listed}"


def name_ranks(ranks: list[int]) -> str:
    """Return ranks as a sentence has them: ``rank 3``, ``ranks 0, 1, 2, 4, 5 and 3 more``."""
    shown = ", ".join(map(str, sorted(ranks)[:LISTED_RANKS]))
    more = len(ranks) - LISTED_RANKS
    rest = f" and {more} more" if more > 0 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{rest}"
