"""Records of what each rank is doing, rewritten once a second, for ``evomesh top``.

The ranks of a host share one file, ``status/HOST.jsonl`` in the run folder, in which each
has a place of ``RECORD_BYTES`` bytes: a JSON object, padded with spaces. So a thousand
ranks on 125 hosts are 125 files, no two hosts write to one file, and nothing grows.

A thread writes the record. The training loop only sets attributes, and a rank that is
stuck is still seen, with the phase that it is stuck in.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from evomesh.monitor.metrics import StepRecord
from evomesh.monitor.optional_output import OptionalOutput

FOLDER = "status"
RECORD_BYTES = 512
COMPACT = (",", ":")  # separators without blanks
EVERY_S = 1.0
# Phases that a rank does not leave.
ENDED = ("done", "stopped", "failed")


@dataclass
class RankStatus:
    """The record of one rank.

    Attributes:
        time: when the record was written; ``since`` when ``phase`` began. Unix seconds.
        phase: "data wait", "train", "validation", "save", "report", "diagnosis"; see ``ENDED``.
        step: the number of steps that are done; ``total`` of the whole run.
        began: when the ranks of this start of the run met; the same on all of them.
        started: when this start of the run began to train; ``first_step`` steps were done by then.
        tgs: tokens per device and second in the last step.
        fwd_bwd, data_wait: seconds of the last step.
        memory, memory_limit: bytes that this rank uses at most, and has.
        saved: step of the last checkpoint; ``saving``: one is being written.
    """

    rank: int
    host: str = ""
    pid: int = 0
    time: float = 0.0
    since: float = 0.0
    phase: str = "start"
    step: int = 0
    total: int = 0
    began: float = 0.0
    started: float = 0.0
    first_step: int = 0
    tgs: float = 0.0
    fwd_bwd: float = 0.0
    data_wait: float = 0.0
    memory: int = 0
    memory_limit: int = 0
    saved: int | None = None
    saving: bool = False

    @property
    def has_ended(self) -> bool:
        return self.phase in ENDED


class StatusWriter:
    """Context manager: the record of this rank, written by a thread until the run ends.

    Args:
        folder: of the run.
        place: of this rank among those of its host, from 0.
        began: when this start of the run began, in Unix seconds, the same on all ranks.
        memory: returns the bytes in use and the bytes there are.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        place: int,
        total: int,
        began: float,
        memory: Callable[[], tuple[int, int]],
    ) -> None:
        self.every_s = EVERY_S
        self.ends_early = False  # as the config asks, and so complete
        host = socket.gethostname()
        now = time.time()
        self.status = RankStatus(
            rank, host=host, pid=os.getpid(), since=now, total=total, began=began
        )
        self._path = folder / FOLDER / f"{file_name(host)}.jsonl"
        self._place = place
        self._memory = memory
        self._output = OptionalOutput("status files", tries_again=True)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._write_until_end, name="status", daemon=True
        )

    def begin(self, steps: int) -> None:
        """Note that training begins now, after the steps of earlier starts of the run."""
        self.status.step = self.status.first_step = steps
        self.status.started = time.time()

    def enter(self, phase: str) -> None:
        """Note that this rank is in a phase from now on."""
        self.status.phase = phase
        self.status.since = time.time()

    def step_done(self, record: StepRecord, steps: int, data_wait: float) -> None:
        """Note the figures of a step; ``steps`` are done now."""
        status = self.status
        status.step = steps
        status.tgs = record.tgs
        status.fwd_bwd = record.fwd_bwd_time
        status.data_wait = data_wait

    def note_saves(self, saved: int | None, saving: bool) -> None:
        """Note the last checkpoint, and whether one is being written."""
        self.status.saved = saved
        self.status.saving = saving

    def __enter__(self) -> StatusWriter:
        self._write_once()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self.enter("failed")
        else:
            self.enter("done" if self.is_complete else "stopped")
        self._ended.set()
        # A file system that hangs must not keep the run.
        self._thread.join(EVERY_S)

    @property
    def is_complete(self) -> bool:
        """Return whether nothing is left to train."""
        return self.ends_early or self.status.step >= self.status.total

    def _write_until_end(self) -> None:
        while not self._ended.wait(self.every_s):
            self._write_once()
        self._write_once()

    def _write_once(self) -> None:
        self._output.attempt(self._write)

    def _write(self) -> None:
        status = self.status
        used, limit = self._memory()
        status.memory = used
        status.memory_limit = limit
        status.time = time.time()
        record = encode(status)
        offset = self._place * RECORD_BYTES
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not truncated: the other ranks of the host have their places in the file.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, record, offset)
        finally:
            os.close(descriptor)


def file_name(host: str) -> str:
    """Return a host's name as part of a file's."""
    return re.sub(r"[^\w.-]", "_", host)[:100] or "host"


def encode(status: RankStatus) -> bytes:
    """Return a record of ``RECORD_BYTES`` bytes: JSON, spaces and a line break."""
    figures = asdict(status)
    for name, value in figures.items():
        if isinstance(value, float):
            rounded = round(value, 3)
            figures[name] = rounded
    figures["host"] = status.host[:100]
    text = json.dumps(figures, separators=COMPACT)
    # All records are equally long, so that a rank finds its own by its place, and writes
    # it while others write theirs.
    data = text.encode()
    padded = data.ljust(RECORD_BYTES - 1)
    return padded + b"\n"


def decode(record: bytes) -> RankStatus | None:
    """Return what ``encode`` wrote; None for a place that is empty or half-written."""
    try:
        figures: Any = json.loads(record.strip(b" \n\0"))
        known = {item.name for item in fields(RankStatus)}
        return RankStatus(**{name: figures[name] for name in known & set(figures)})
    except (ValueError, TypeError, AttributeError):
        return None


def read_statuses(folder: Path) -> list[RankStatus]:
    """Return the records of all ranks of the newest start of a run, in the order of ranks.

    An earlier start may have had more ranks, or other hosts: their records are still there. A rank
    that has moved to another host is taken from where it wrote last.

    Raises:
        OSError: a file cannot be read.
    """
    records = list(_all_records(folder / FOLDER))
    return _last_of_each_rank(_newest_start(records))


def _last_of_each_rank(records: Sequence[RankStatus]) -> list[RankStatus]:
    oldest_first = sorted(records, key=lambda record: record.time)
    newest = {record.rank: record for record in oldest_first}
    return [newest[rank] for rank in sorted(newest)]


def _newest_start(records: Sequence[RankStatus]) -> list[RankStatus]:
    """Return the records of the start that began last."""
    starts = {record.began for record in records}
    if not starts:
        return []
    last = max(starts)
    return [record for record in records if record.began == last]


def _all_records(folder: Path) -> Iterator[RankStatus]:
    for path in sorted(folder.glob("*.jsonl")):
        content = path.read_bytes()
        for start in range(0, len(content), RECORD_BYTES):
            status = decode(content[start : start + RECORD_BYTES])
            if status is not None:
                yield status


def host_memory() -> tuple[int, int]:
    """Return the resident bytes of this process and the bytes of the machine; 0 where it does not report them."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            fields_of_process = file.read().split()
        page = os.sysconf("SC_PAGE_SIZE")
        resident = int(fields_of_process[1])
        installed = os.sysconf("SC_PHYS_PAGES")
        return resident * page, installed * page
    except (OSError, ValueError, IndexError):
        return 0, 0
