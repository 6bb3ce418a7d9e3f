"""The screen of ``evomesh top``: lines of text from a ``RunOverview``, at most as wide as the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomesh.errors import printable
from evomesh.monitor.overview import RunOverview, seconds_of
from evomesh.monitor.status import RankStatus
from evomesh.quantities import counted

ALERTS_SHOWN = 3
NEWEST_LINES = 3  # of the newest alert
CALM_KINDS = ("started", "resumed", "done")

BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
_STATE_COLORS = {"running": GREEN, "done": GREEN, "failed": RED, "silent": RED}


@dataclass(frozen=True)
class Line:
    """One line; ``color`` is a code of ANSI, "" for none."""

    text: str
    color: str = ""

    def render(self, width: int, in_color: bool) -> str:
        """Return the line, truncated to the width."""
        text = printable(self.text, keep="")
        if len(text) > width:
            text = text[: width - 1] + "…"
        if in_color and self.color and text:
            return f"\x1b[{self.color}m{text}\x1b[0m"
        return text


def render(
    view: RunOverview, width: int, height: int | None, in_color: bool
) -> list[str]:
    """Return the lines of the screen.

    Args:
        height: lines of the terminal; None: as many as there are ranks.
    """
    head = list(header(view, width))
    room = None if height is None else max(1, height - len(head) - 1)
    lines = [*head, *rank_lines(view, width, room)]
    return [line.render(width, in_color) for line in lines]


def header(view: RunOverview, width: int) -> Iterator[Line]:
    """Yield the lines about the run as a whole."""
    hosts = {rank.host for rank in view.ranks}
    count = f"{counted(len(view.ranks), 'rank')} on {counted(len(hosts), 'host')}"
    state = view.state
    yield Line(f"{state}   {count}   {view.folder}", _STATE_COLORS.get(state, YELLOW))
    if not view.ranks:
        yield Line("no rank has written its status yet", DIM)
    else:
        yield Line(progress_line(view))
        yield Line(figures_line(view))
        yield Line(saves_line(view))
    yield from alert_lines(view, width)
    yield Line("")


def progress_line(view: RunOverview) -> str:
    """Return how far the run is, with a bar and the time left."""
    done = max(rank.step for rank in view.ranks)
    total = max(rank.total for rank in view.ranks)
    part = done / total if total else 0.0
    filled = round(20 * part)
    bar = "#" * filled + "." * (20 - filled)
    line = f"step    {done:,} of {total:,}  [{bar}] {part:.1%}"
    seconds = seconds_per_step(view)
    if view.state == "running" and seconds is not None:
        line += f"   {duration(seconds * (total - done))} left"
    return line


def seconds_per_step(view: RunOverview) -> float | None:
    """Return the mean seconds of a step since training began, with saves and validation; None before the first."""
    rank = max(view.ranks, key=lambda rank: rank.step)
    steps = rank.step - rank.first_step
    return (rank.time - rank.started) / steps if steps else None


def figures_line(view: RunOverview) -> str:
    """Return the figures of the last step."""
    words = []
    for name, shown, form in (
        ("loss", "loss", ".4f"),
        ("grad_norm", "grad norm", ".3g"),
        ("lr", "lr", ".2e"),
    ):
        value = view.figure(name)
        words.append(f"{shown} {'-' if value is None else format(value, form)}")
    speed = view.tokens_per_second
    if speed is not None:
        words.append(f"{speed:,.0f} tokens/s")
    skipped = view.figure("inf_nan_skip_batches")
    if skipped:
        words.append(f"{counted(int(skipped), 'step')} skipped")
    return f"figures {'   '.join(words)}"


def saves_line(view: RunOverview) -> str:
    """Return which checkpoint is the last, and whether one is being written."""
    saved = [rank.saved for rank in view.ranks if rank.saved is not None]
    line = f"saves   last: step {max(saved):,}" if saved else "saves   none yet"
    writing = sum(rank.saving or rank.phase == "save" for rank in view.ranks)
    if writing and view.state == "running":
        line += f"   being written by {counted(writing, 'rank')}"
    return line


def alert_lines(view: RunOverview, width: int) -> Iterator[Line]:
    """Yield the newest alerts, newest first: that one in full, a line for each of the others."""
    if not view.alerts:
        yield Line("alerts  none", DIM)
        return
    newest_first = view.alerts[::-1]
    label = "alerts"
    for alert in newest_first[:ALERTS_SHOWN]:
        kind = str(alert.get("kind", "?"))
        color = "" if kind in CALM_KINDS else YELLOW
        words = alert_words(alert, kind, view.now)
        line = f"{label:<8}{words}"
        if label:
            parts = textwrap.wrap(line, width, subsequent_indent=8 * " ")
            for part in parts[:NEWEST_LINES]:
                yield Line(part, color)
        else:
            yield Line(line, color)
        label = ""  # stands before the newest one only
    earlier = len(view.alerts) - ALERTS_SHOWN
    if earlier > 0:
        yield Line(f"        and {earlier} earlier", DIM)


def alert_words(alert: Mapping[str, Any], kind: str, now: float) -> str:
    """Return age, kind and text of an alert in one line."""
    text = " ".join(str(alert.get("text", "")).split())
    if not text.startswith(kind):
        text = f"{kind}: {text}"
    time = seconds_of(alert.get("time"))
    return text if time is None else f"{duration(now - time)} ago, {text}"


def rank_lines(view: RunOverview, width: int, room: int | None) -> Iterator[Line]:
    """Yield the table of ranks; without room for all of them, those in trouble first and a line for the others."""
    if not view.ranks:
        return
    host_width = max(12, min(32, width - 68))
    yield Line(
        f"{'rank':>5} {'host':<{host_width}} {'step':>8} {'phase':<16} {'tok/s':>7} {'fwd+bwd':>8} {'data':>6}  memory",
        BOLD,
    )
    shown: Sequence[RankStatus] = view.ranks
    left_out = 0
    if room is not None and len(shown) + 1 > room:
        kept = max(1, room - 2)
        left_out = len(shown) - kept
        worst = sorted(shown, key=lambda rank: trouble(view, rank), reverse=True)
        shown = sorted(worst[:kept], key=lambda rank: rank.rank)
    for rank in shown:
        yield rank_line(view, rank, host_width)
    if left_out:
        yield Line(
            f"      and {counted(left_out, 'more rank')}, less slow than these", DIM
        )


def trouble(view: RunOverview, rank: RankStatus) -> tuple[bool, bool, float]:
    """Return a key that is larger for a rank that should be looked at first."""
    return view.is_silent(rank), rank.phase == "failed", rank.fwd_bwd + rank.data_wait


def rank_line(view: RunOverview, rank: RankStatus, host_width: int) -> Line:
    """Return one row of the table."""
    phase = rank.phase
    in_phase = view.now - rank.since
    color = ""
    if view.is_silent(rank):
        phase = f"silent {duration(view.now - rank.time)}"
        color = RED
    elif rank.phase == "failed":
        color = RED
    elif not rank.has_ended and in_phase >= 1:
        phase = f"{phase} {duration(in_phase)}"
    memory = f"{gigabytes(rank.memory)}/{gigabytes(rank.memory_limit)}G"
    host = printable(rank.host, keep="")
    if len(host) > host_width:
        host = host[: host_width - 1] + "…"
    return Line(
        f"{rank.rank:>5} {host:<{host_width}} {rank.step:>8,} {phase:<16.16} {rank.tgs:>7,.0f} {rank.fwd_bwd:>7.3f}s "
        f"{rank.data_wait:>5.2f}s {memory:>8}",
        color,
    )


def gigabytes(count: int) -> str:
    """Return bytes as a number of GB with about three digits."""
    number = count / 1e9
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return seconds in two units at most, such as ``1h 05m``."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
