"""The command ``evomesh top``: a run while it trains, in a plain terminal."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

EVERY_S = 1.0
# Codes of ANSI: another screen without a cursor, and back; home; erase to the end.
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, ERASE_LINE, ERASE_REST = "\x1b[H", "\x1b[K", "\x1b[J"


def top(
    run: Annotated[
        str,
        typer.Argument(
            help="A run folder, or one above it: the run below it that was written last."
        ),
    ] = "RUN",
    once: Annotated[
        bool, typer.Option("--once", help="Print once and end; so does a pipe.")
    ] = False,
) -> None:
    """Show a run while it trains: progress, loss, speed, saves, alerts and each rank.

    Waits for a run that has not begun yet. Ends with q or Ctrl-C.
    """
    from evomesh.config.user import expand_home
    from evomesh.monitor.overview import find_run, wait_for_run

    path = expand_home(run)
    if once or not sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print("\n".join(frame(find_run(path), width, None, uses_color())))
        return
    watch(wait_for_run(path, EVERY_S))


def frame(folder: Path, width: int, height: int | None, in_color: bool) -> list[str]:
    """Return the lines that show a run now."""
    from evomesh.cli.top_view import render
    from evomesh.monitor.overview import read_overview

    view = read_overview(folder, time.time())
    return render(view, width, height, in_color)


def uses_color() -> bool:
    """Return whether to print colors: on a terminal that has them, unless NO_COLOR is set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def watch(folder: Path) -> None:
    """Draw the run every second until q or Ctrl-C; the last picture stays on the terminal."""
    lines: list[str] = []
    in_color = uses_color()
    with contextlib.suppress(KeyboardInterrupt), _screen():
        while True:
            size = shutil.get_terminal_size()
            lines = frame(folder, size.columns, size.lines - 1, in_color)
            hint = "q: end"[: size.columns]
            body = "".join(f"{line}{ERASE_LINE}\n" for line in lines)
            sys.stdout.write(f"{HOME}{body}{hint}{ERASE_LINE}{ERASE_REST}")
            sys.stdout.flush()
            if _wait_for_q(EVERY_S):
                break
    print("\n".join(lines))


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """Use the terminal's second screen, and get each key as it is pressed; restores both."""
    restore = _without_line_input()
    sys.stdout.write(ENTER_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE_SCREEN)
        sys.stdout.flush()
        restore()


def _without_line_input() -> Callable[[], None]:
    """Let the terminal hand over keys at once, without echo; return what undoes it."""
    if not sys.stdin.isatty():
        return lambda: None
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    return lambda: termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _wait_for_q(seconds: float) -> bool:
    """Wait; return True as soon as q is pressed."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    if not readable:
        return False
    # Not through the buffer of sys.stdin, of which ``select`` knows nothing.
    keys = os.read(sys.stdin.fileno(), 64)
    is_closed = keys == b""
    return is_closed or b"q" in keys.lower()
