"""Start the process that exports a checkpoint, and end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import evomesh
from evomesh.checkpoint.huggingface.export_job import END_S, ExportJob, ExportResult

WORKER = "evomesh.checkpoint.huggingface.export_process"
# What a launcher sets for the ranks of a run, and a library could take for its own.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class RunningExport(Protocol):
    """An export that was started."""

    def wait(self) -> ExportResult:
        """Wait for its end."""

    def end(self) -> None:
        """Make it end soon; called while another thread is in ``wait``."""


class ExportProcess:
    """An export in a separate process, see ``export_process``."""

    def __init__(self, job: ExportJob) -> None:
        command = worker_command(job)
        reader, self._lifeline = os.pipe()
        self._over = threading.Event()
        self._lock = threading.Lock()
        try:
            # In a new session, since Ctrl-C reaches every process of a terminal's.
            self._process = subprocess.Popen(
                command,
                stdin=reader,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(os.environ),
                start_new_session=True,
            )
        except BaseException:
            self._drop_lifeline()
            raise
        finally:
            os.close(reader)

    def wait(self) -> ExportResult:
        output, errors = self._process.communicate()
        self._over.set()
        self._drop_lifeline()
        try:
            answer = json.loads(output)
            return ExportResult(tuple(answer["lines"]), answer["error"])
        except ValueError:
            last_words = errors.decode(errors="replace").strip().rpartition("\n")[2]
            return ExportResult(
                error=_how_it_ended(self._process.returncode, last_words)
            )

    def end(self) -> None:
        self._drop_lifeline()
        if not self._over.wait(END_S):
            self._process.kill()

    def _drop_lifeline(self) -> None:
        """Close our end of the pipe, once."""
        with self._lock:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1


def worker_command(job: ExportJob) -> list[str]:
    """Return the command line of the process."""
    # -P: a file of the current folder never hides a module of the same name.
    return [sys.executable, "-P", "-m", WORKER, json.dumps(asdict(job))]


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the process: no accelerator, few threads, and the same evomesh."""
    made = dict(env)
    for name in OF_RANKS:
        made.pop(name, None)
    made["CUDA_VISIBLE_DEVICES"] = ""
    processors = os.cpu_count() or 1
    threads = max(1, processors // 4)
    made.setdefault("OMP_NUM_THREADS", str(threads))

    # Also where evomesh is not installed, but found beside the script that trains.
    package = Path(evomesh.__file__).parents[1]
    path = [str(package)]
    others = env.get("PYTHONPATH")
    if others:
        path.append(others)
    made["PYTHONPATH"] = os.pathsep.join(path)
    return made


def _how_it_ended(code: int, last_words: str) -> str:
    """Describe the end of a process that left no result."""
    how = f"with exit code {code}"
    if code < 0:
        how = f"by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", which the system sends where memory runs out"
    words = f": {last_words}" if last_words else ""
    return f"its process was ended {how}{words}"
