"""Record what this process does, for the watcher of its host; about a microsecond an event.

    with this_process().phase(Place.SAVE):
        ...

Like the log, the record belongs to the process, not to an object that every function
would have to be given. It does nothing until ``open``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO

from evomesh.watchdog import ring
from evomesh.watchdog.process_state import read_state, start_time
from evomesh.watchdog.ring import Place

# What makes this process write the stacks of its threads, and that of its main thread.
# `faulthandler` stops after 100 threads, of which the main one comes last. Real-time
# signals have no other use here; SIGUSR1 and SIGUSR2 have.
STACK_SIGNAL = getattr(signal, "SIGRTMIN", 34) + 6
MAIN_STACK_SIGNAL = STACK_SIGNAL + 1  # the kernel lets the main thread answer it


@functools.cache
def this_process() -> Activity:
    """Return the record of this process."""
    return Activity()


def remove_record(folder: Path) -> None:
    """Remove the folder of a host's records."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()


def remove_old_records(folders: Iterable[Path]) -> None:
    """Remove the folders of runs whose ranks were all killed before a watcher could do it."""
    for folder in folders:
        with contextlib.suppress(OSError):
            if _all_have_ended(folder):
                remove_record(folder)


def _all_have_ended(folder: Path) -> bool:
    """Return whether every rank that records in ``folder`` has ended; not where a ring cannot be read."""
    rings = list(folder.glob("*.ring"))
    for path in rings:
        state = ring.read_ring(path.read_bytes())
        if state is None:
            return False
        process = read_state(state.pid, state.started)
        if not process.has_ended:
            return False
    return bool(rings)


class Activity:
    """The writer of a ring file."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._path = Path()
        self._stacks: IO[bytes] | None = None
        self._pid = 0
        self._main = 0
        self._events = 0
        self._depth = 0
        self._step = self._micro_batch = -1
        self._steps_done = 0
        self._total_entries = 0
        self._flags = 0
        self._groups: dict[str, int] = {}
        self._entered: list[int] = []
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        return self._map is not None

    def open(self, folder: Path, rank: int) -> None:
        """Start to record, in ``folder/RANK.ring``; the stacks go to ``RANK.stack`` beside it.

        Raises:
            OSError: the file cannot be written.
        """
        self.__init__()  # type: ignore[misc]  # a process may run several worlds in turn
        self._path = folder / f"{rank}.ring"
        with self._path.open("w+b") as file:
            # Reserved: writing to a full memory file system kills a process.
            os.posix_fallocate(file.fileno(), 0, ring.SIZE)
            opened = mmap.mmap(file.fileno(), ring.SIZE)
        self._pid = os.getpid()
        self._main = threading.get_ident()
        ring.IDENTITY.pack_into(
            opened,
            0,
            bytes(len(ring.MAGIC)),
            rank,
            self._pid,
            start_time(self._pid),
            self._main,
        )
        self._map = opened
        self._progress()
        self.beat()
        opened[: len(ring.MAGIC)] = ring.MAGIC  # last: the file is whole from here on
        self._write_stacks_on_signal(self._path.with_suffix(".stack"))

    def _write_stacks_on_signal(self, path: Path) -> None:
        """Let the watcher ask for the stacks of all threads, and of the main one."""
        stacks = path.open("wb", buffering=0)
        self._stacks = stacks
        with contextlib.suppress(ValueError, RuntimeError):
            faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
            faulthandler.register(MAIN_STACK_SIGNAL, file=stacks, all_threads=False)

    def close(self) -> None:
        """Stop to record and remove the file."""
        if self._map is None:
            return
        self.set_flag(ring.HAS_LEFT)
        opened = self._map
        self._map = None
        opened.close()
        if self._stacks is not None:
            faulthandler.unregister(STACK_SIGNAL)
            faulthandler.unregister(MAIN_STACK_SIGNAL)
            self._stacks.close()
        # The last rank of the host removes the folder, if no watcher does. Ranks end at the
        # same time: each may find that another has just removed it.
        folder = self._path.parent
        with contextlib.suppress(OSError):
            for path in (self._path, self._path.with_suffix(".stack")):
                path.unlink(missing_ok=True)
            if not list(folder.glob("*.ring")):
                remove_record(folder)

    def phase(self, place: Place, detail: str = "") -> AbstractContextManager[object]:
        """Return a context: this process is in ``place``."""
        if self._map is None:
            return nullcontext()
        return _Stay(self, place, detail=detail)

    def collective(
        self, operation: Place, group: str, nbytes: int = 0
    ) -> AbstractContextManager[object]:
        """Return a context: this process is in a collective, the next one of its group."""
        if self._map is None:
            return nullcontext()
        return _Stay(self, operation, group, self.launched(operation, group, nbytes))

    def waiting(self, operation: Place, group: str) -> AbstractContextManager[object]:
        """Return a context: this process waits for a collective that it has launched."""
        if self._map is None:
            return nullcontext()
        index = self._group_index(group)
        number = self._entered[index - 1] if index else 0
        return _Stay(self, operation, group, number)

    def launched(self, operation: Place, group: str, nbytes: int = 0) -> int:
        """Record that a collective was launched and return its number in the group."""
        opened = self._map
        if opened is None:
            return 0
        with self._lock:
            index = self._group_index(group)
            if not index:
                return 0
            number = self._entered[index - 1] + 1
            self._entered[index - 1] = number
            place = self._total_entries % ring.ENTRIES
            self._total_entries += 1
            ring.ENTRY.pack_into(
                opened,
                ring.RING_AT + place * ring.ENTRY.size,
                self._total_entries,
                time.monotonic(),
                operation,
                index,
                not self._is_in_front(),
                number,
                nbytes,
                self._step,
            )
            offset = ring.GROUPS_AT + (index - 1) * ring.GROUP.size
            ring.GROUP.pack_into(opened, offset, number, group.encode()[:55])
        self._progress()
        return number

    def begin_step(self, step: int) -> None:
        """Record that a step begins."""
        self._step = step
        self._micro_batch = 0
        self._progress()

    def end_step(self) -> None:
        """Record that a step is finished."""
        self._steps_done += 1
        self._progress()

    def begin_micro_batch(self, index: int) -> None:
        """Record that a micro-batch of the step begins."""
        self._micro_batch = index
        self._progress()

    def beat(self) -> None:
        """Record that Python's lock is free; called by a background thread."""
        if self._map is not None:
            ring.BEAT.pack_into(self._map, ring.BEAT_AT, time.monotonic())

    def set_flag(self, flag: int) -> None:
        """Record that this rank is about to end, or that a collective of it has failed."""
        if self._map is not None:
            self._flags |= flag
            ring.FLAGS.pack_into(self._map, ring.FLAGS_AT, self._flags)

    def _progress(self) -> None:
        opened = self._map
        if opened is None:
            return
        self._events += 1
        ring.PROGRESS.pack_into(
            opened,
            ring.PROGRESS_AT,
            self._events,
            time.monotonic(),
            self._step,
            self._micro_batch,
            self._steps_done,
            self._depth,
            self._total_entries,
        )

    def _group_index(self, group: str) -> int:
        """Return the place of a group in the table, from 1; 0 without one or where the table is full."""
        known = self._groups.get(group)
        if known is not None:
            return known
        row = len(self._groups)
        if not group or row == ring.MAX_GROUPS:
            return 0
        self._groups[group] = row + 1
        self._entered.append(0)
        if self._map is not None:
            offset = ring.GROUPS_AT + row * ring.GROUP.size
            name = group.encode()
            ring.GROUP.pack_into(self._map, offset, 0, name[:55])
        return row + 1

    def _is_in_front(self) -> bool:
        """Return whether the calling thread is the main thread, or one of autograd's, for which that waits."""
        if threading.get_ident() == self._main:
            return True
        return threading.current_thread().name.startswith("Dummy")

    def enter(self, place: Place, group: str, number: int, detail: str) -> bool:
        """Write a frame; return whether it is one of the main thread."""
        opened = self._map
        in_front = self._is_in_front()
        if opened is None:
            return in_front
        offset = ring.BACKGROUND_AT
        if in_front:
            level = min(self._depth, ring.MAX_DEPTH - 1)
            offset = ring.FRAMES_AT + level * ring.FRAME_SIZE
            self._depth += 1
        index = self._groups.get(group, 0)
        end = detail.encode(errors="replace")[-128:]  # the end of a path tells most
        ring.FRAME.pack_into(
            opened, offset, place, index, 0, number, time.monotonic(), end
        )
        if in_front:
            self._progress()
        return in_front

    def leave(self, in_front: bool) -> None:
        """Take back the newest frame."""
        if in_front:
            self._depth = max(self._depth - 1, 0)
            self._progress()
        elif self._map is not None:
            ring.FRAME.pack_into(self._map, ring.BACKGROUND_AT, 0, 0, 0, 0, 0.0, b"")


class _Stay:
    """One stay in a place, from ``with`` to its end."""

    __slots__ = ("_activity", "_detail", "_group", "_in_front", "_number", "_place")

    def __init__(
        self,
        activity: Activity,
        place: Place,
        group: str = "",
        number: int = 0,
        detail: str = "",
    ) -> None:
        self._activity = activity
        self._place = place
        self._group = group
        self._number = number
        self._detail = detail

    def __enter__(self) -> None:
        self._in_front = self._activity.enter(
            self._place, self._group, self._number, self._detail
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._activity.leave(self._in_front)
