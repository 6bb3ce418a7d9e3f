"""Start a run again after what a restart can cure, and only then.

    75, a bug, killed by a signal ──> pause, start the same command again
    complete, user's error, Ctrl-C, a signal to the supervisor ──> end with the run's code
    two crashes in one step, too many restarts ──> end, with a sentence

Nothing here imports torch: the supervisor of a run of days is a small process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from evomesh.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_READER_LEFT,
    EXIT_RESTART,
    UserError,
)
from evomesh.storage.atomic_file import write_atomically
from evomesh.train.signals import SUPERVISOR, exit_code
from evomesh.train.step_file import VARIABLE, RunPosition, read_position

logger = logging.getLogger(__name__)

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
HISTORY = "exits.jsonl"
KEPT = 100  # ends in the history
LONGEST_PAUSE_S = 300.0
POLL_S = 0.1


@dataclass(frozen=True)
class RunExit:
    """One end of a run.

    Attributes:
        time: seconds since the epoch.
        code: exit code; negative for the signal that killed it.
        step: the one it was in; None before the first.
        restart: how many restarts this supervisor had made by then.
    """

    time: float
    code: int
    step: int | None
    restart: int

    @property
    def is_curable(self) -> bool:
        """Return whether the same command may succeed."""
        if self.code in (EXIT_INTERRUPTED, EXIT_READER_LEFT):
            return False
        was_killed = self.code < 0 or self.code > 128
        return was_killed or self.code in (EXIT_RESTART, EXIT_BUG)

    @property
    def words(self) -> str:
        """Return how it ended, in words."""
        number = -self.code if self.code < 0 else self.code - 128
        how = f"with exit code {self.code}"
        if self.code < 0 or self.code > 128:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(number).name}"
        where = "before its first step" if self.step is None else f"in step {self.step}"
        return f"{how} {where}"


class ExitHistory:
    """The last ends of a run: in memory until its folder is known, then in ``exits.jsonl`` there.

    Args:
        writes: whether this process keeps the file; of several supervisors of a job one does.
    """

    def __init__(self, writes: bool = True) -> None:
        self.exits: list[RunExit] = []
        self._writes = writes
        self._path: Path | None = None

    def add(self, ended: RunExit, run_folder: Path | None) -> None:
        """Record an end; a file that cannot be written is logged, and the history is in memory."""
        # A run that has saved nothing begins again, in a new folder.
        path = self._path
        if run_folder is not None:
            path = run_folder / HISTORY
        if path is not None and path != self._path:
            self._path = path
            earlier = read_history(path)
            self.exits = [*earlier, *self.exits]
        self.exits.append(ended)
        self.exits = self.exits[-KEPT:]
        path = self._path
        if path is not None and self._writes:
            self._write(path)

    def _write(self, path: Path) -> None:
        """Write the file anew, one line of JSON per end."""
        lines = []
        for ended in self.exits:
            line = json.dumps(asdict(ended))
            lines.append(f"{line}\n")
        try:
            with write_atomically(path) as file:
                file.writelines(line.encode() for line in lines)
        except OSError as error:
            logger.warning("cannot write %s: %s", path, error.strerror)

    def repeats_step(self) -> bool:
        """Return whether the last two crashes that had a step were in the same one."""
        crashes: list[int] = []
        for ended in self.exits:
            if ended.code == 0:
                crashes.clear()
            elif ended.is_curable and ended.step is not None:
                crashes.append(ended.step)
        if len(crashes) < 2:
            return False
        last = crashes[-1]
        before = crashes[-2]
        return last == before


def read_history(path: Path) -> list[RunExit]:
    """Return the ends that a file holds; lines of another form are left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                found.append(RunExit(**json.loads(line)))
    return found


@dataclass(frozen=True)
class RestartPolicy:
    """Number of restarts of a run, and the pauses before them.

    Attributes:
        first_pause_s: each next pause is twice as long, up to five minutes, until the run gets further than before.
    """

    max_restarts: int = 10
    first_pause_s: float = 5.0

    def pause_s(self, failures: int) -> float:
        """Return the pause after so many failures without progress, from 1."""
        return min(self.first_pause_s * 2.0 ** (failures - 1), LONGEST_PAUSE_S)


class Supervisor:
    """Runs a command until it is complete.

    Args:
        command: of the run.
        report: called with a sentence when a run was killed or is given up: for alerts.
        history: of its ends.
        env: of the run.
    """

    def __init__(
        self,
        command: Sequence[str],
        policy: RestartPolicy,
        *,
        history: ExitHistory | None = None,
        report: Callable[[str, RunPosition], None] = lambda text, position: None,
        env: Mapping[str, str] = os.environ,
    ) -> None:
        self._command, self._policy = command, policy
        self._history = history or ExitHistory()
        self._report = report
        self._env = env
        self._child: subprocess.Popen[bytes] | None = None
        self._signal: signal.Signals | None = None
        self._farthest = -1
        self._failures = 0

    def run(self) -> int:
        """Start the run, and again while that can help; return the exit code.

        Raises:
            UserError: it crashed twice in one step, or has been started too often.
        """
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._forward)
        restarts = 0
        while True:
            code, position = self._run_once(restarts)
            ended = RunExit(time.time(), code, position.step, restarts)
            self._history.add(ended, position.run_folder)
            if self._signal is not None or not ended.is_curable:
                return self._code_of_end(code)
            if code < 0:
                self._report(f"the run was {ended.words}", position)
            self._refuse_hopeless(ended, restarts, position)
            restarts += 1
            if not self._pause(ended, restarts):
                return exit_code(self._signal)

    def _code_of_end(self, code: int) -> int:
        """Return the exit code of a job whose run ended with ``code`` and is not started again."""
        if self._signal is not None and code == -self._signal:
            # It had no handlers yet, and so nothing to save.
            return exit_code(self._signal)
        return code if code >= 0 else 128 - code

    def _run_once(self, restarts: int) -> tuple[int, RunPosition]:
        """Run the command to its end; return its code and how far it came."""
        with tempfile.TemporaryDirectory(prefix="evomesh-run-") as folder:
            step_file = Path(folder) / "step"
            env = dict(self._env)
            env[VARIABLE] = str(step_file)
            env[SUPERVISOR] = str(os.getpid())
            # Ranks that are supervised one by one under torchrun's agent meet in its
            # store again, where the verdict of their last attempt still is.
            attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) + restarts
            if "TORCHELASTIC_RUN_ID" in env:
                env["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
            self._child = subprocess.Popen(
                self._command,
                env=env,
                start_new_session=True,  # Ctrl-C reaches it once, through this process
            )
            if self._signal is not None:  # arrived before there was a child
                self._child.send_signal(self._signal)
            code = self._child.wait()
            return code, read_position(step_file)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal to the run, which saves and ends; it is not started again."""
        self._signal = signal.Signals(number)
        child = self._child
        if child is not None and child.returncode is None:
            child.send_signal(number)

    def _refuse_hopeless(
        self, ended: RunExit, restarts: int, position: RunPosition
    ) -> None:
        """Give up where one more start would end the same way."""
        reason = ""
        if self._history.repeats_step():
            reason = (
                f"the run ended twice in step {ended.step}, the last time {ended.words}"
            )
        elif restarts >= self._policy.max_restarts:
            reason = f"the run ended {ended.words}, after {restarts} restarts"
        if not reason:
            return
        self._report(f"not started again: {reason}", position)
        raise UserError(
            reason,
            expected="a run that gets further with each start",
            fix="see its log for the cause; the same command, or a higher --max-restarts, starts it again",
            exit_code=EXIT_BUG,
            code="EVO-TRAIN-005",
        )

    def _pause(self, ended: RunExit, restarts: int) -> bool:
        """Wait before the next start, longer each time that the run gets no further; False: a signal came."""
        step = -1 if ended.step is None else ended.step
        self._failures += 1
        if step > self._farthest:
            self._farthest, self._failures = step, 1
        seconds = self._policy.pause_s(self._failures)
        logger.warning(
            "the run ended %s; restart %d of at most %d in %.0f s",
            ended.words,
            restarts,
            self._policy.max_restarts,
            seconds,
        )
        deadline = time.monotonic() + seconds
        while self._signal is None and time.monotonic() < deadline:
            time.sleep(min(POLL_S, seconds))
        return self._signal is None
