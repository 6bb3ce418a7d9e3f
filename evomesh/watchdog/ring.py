"""The record of what a rank does: a file in shared memory that another process can read at any moment.

One page of state, which is overwritten in place, and a ring of the newest collectives:

    0      header   rank, pid, step, time of the last progress ...
    256    frames   what the main thread is in, outermost first
    2560   groups   name, and how many collectives of it this rank has entered
    8192   ring     one entry for each collective entered

A reader may see a state that is half a microsecond old in one field and new in another:
it decides only on what has stayed the same for seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct
from typing import Any

MAGIC = b"EVORING1"
# Magic, rank, pid, start time of the process, main thread.
IDENTITY = Struct("<8siiQQ")
# Events, time of the last, step, micro-batch, steps done, depth of the frames, entries.
PROGRESS = Struct("<QdqqqIQ")
PROGRESS_AT = 64
BEAT = Struct("<d")
BEAT_AT = 128
FLAGS = Struct("<I")
FLAGS_AT = 136
BACKGROUND_AT = 2304 - 160
FRAME = Struct("<HHIQd128s")  # place, group, -, number in the group, since, detail
FRAMES_AT = 256
FRAME_SIZE = 160
MAX_DEPTH = 11
GROUP = Struct("<Q56s")
GROUPS_AT = 2560
MAX_GROUPS = 80
ENTRY = Struct(
    "<QdHHIQQq"
)  # number, time, operation, group, whether in the background, number in it, bytes, step
RING_AT = 8192
ENTRIES = 512
SIZE = RING_AT + ENTRIES * ENTRY.size

# Flags.
HAS_VERDICT = (
    1  # this rank is about to end with an error, which may be that of another rank
)
COLLECTIVE_FAILED = 2
HAS_LEFT = 4  # it has finished


class Place(IntEnum):
    """Place that a rank may be in: a phase of the run, or a collective."""

    NOTHING = 0
    START = 1
    STEP = 2
    DATA = 3
    FORWARD_BACKWARD = 4
    OPTIMIZER = 5
    RESULTS = 6
    VALIDATION = 7
    SAVE = 8
    REPORT = 9
    UPKEEP = 10
    END = 11
    FILE = 12
    ALL_REDUCE = 32
    ALL_GATHER = 33
    REDUCE_SCATTER = 34
    ALL_TO_ALL = 35
    BROADCAST = 36
    GATHER = 37
    SEND = 38
    RECEIVE = 39
    PENDING = 40

    @property
    def is_collective(self) -> bool:
        return self >= Place.ALL_REDUCE

    @property
    def words(self) -> str:
        """Return the name as a sentence has it."""
        return _WORDS.get(self, self.name.lower())


_WORDS = {
    Place.NOTHING: "between two phases",
    Place.START: "start",
    Place.STEP: "step",
    Place.DATA: "data wait",
    Place.FORWARD_BACKWARD: "forward and backward",
    Place.RESULTS: "the wait for the device's results",
    Place.REPORT: "log and metrics",
    Place.END: "the end of the run",
    Place.FILE: "file access",
    Place.PENDING: "a pending collective",
}


@dataclass(frozen=True)
class Frame:
    """One thing that a rank is in.

    Attributes:
        group: of a collective, "" otherwise.
        number: of the collective in its group, from 1.
        since: by the monotonic clock of the host.
        detail: such as a path.
    """

    place: Place
    since: float
    group: str = ""
    number: int = 0
    detail: str = ""


@dataclass(frozen=True)
class CollectiveEntry:
    """A collective that a rank has entered.

    Attributes:
        is_in_background: by another thread than the one that trains, at any place in its order.
    """

    operation: Place
    group: str
    number: int
    nbytes: int
    step: int
    is_in_background: bool = False

    @property
    def kind(self) -> tuple[int, str, int]:
        """Return what must be equal on all ranks of the group, or at both ends of a channel."""
        operation = self.operation
        if operation == Place.RECEIVE:
            operation = Place.SEND
        return operation, self.group, self.nbytes


@dataclass(frozen=True)
class RingState:
    """Content of a ring file at one moment.

    Attributes:
        started: start time of the process, in ticks since the boot.
        main_thread: its identity, as ``faulthandler`` prints it.
        events: how many things were entered or left.
        progress_at: when the last of them was, by the monotonic clock of the host.
        beat_at: when a background thread last had Python's lock.
        steps_done: by this process.
        frames: what the main thread is in, outermost first.
        entered: collectives entered, by group.
        entries: the newest collectives, oldest first.
    """

    rank: int
    pid: int
    started: int
    main_thread: int
    events: int
    progress_at: float
    beat_at: float
    step: int
    micro_batch: int
    steps_done: int
    flags: int
    frames: tuple[Frame, ...] = ()
    background: Frame | None = None
    entered: dict[str, int] = field(default_factory=dict)
    entries: tuple[CollectiveEntry, ...] = ()

    @property
    def is_ending(self) -> bool:
        return bool(self.flags & (HAS_VERDICT | HAS_LEFT))

    @property
    def has_verdict(self) -> bool:
        return bool(self.flags & HAS_VERDICT)

    @property
    def has_failed_collective(self) -> bool:
        return bool(self.flags & COLLECTIVE_FAILED)


def read_ring(data: bytes) -> RingState | None:
    """Return the state that the bytes of a ring file hold; None while the file is being created."""
    if len(data) < SIZE or not data.startswith(MAGIC):
        return None
    _, rank, pid, started, main_thread = IDENTITY.unpack_from(data)
    progress = PROGRESS.unpack_from(data, PROGRESS_AT)
    events, progress_at, step, micro_batch, steps_done, depth, total = progress
    groups = [_text(name) for _, name in _groups(data)]
    entered = {_text(name): count for count, name in _groups(data)}
    frames = []
    for level in range(min(depth, MAX_DEPTH)):
        frames.append(_frame(data, FRAMES_AT + level * FRAME_SIZE, groups))
    background = _frame(data, BACKGROUND_AT, groups)
    return RingState(
        rank=rank,
        pid=pid,
        started=started,
        main_thread=main_thread,
        events=events,
        progress_at=progress_at,
        beat_at=BEAT.unpack_from(data, BEAT_AT)[0],
        step=step,
        micro_batch=micro_batch,
        steps_done=steps_done,
        flags=FLAGS.unpack_from(data, FLAGS_AT)[0],
        frames=tuple(frames),
        background=background if background.place else None,
        entered=entered,
        entries=tuple(_entries(data, total, groups)),
    )


def _groups(data: bytes) -> Iterator[tuple[int, bytes]]:
    for index in range(MAX_GROUPS):
        count, name = GROUP.unpack_from(data, GROUPS_AT + index * GROUP.size)
        if not name[0]:
            return
        yield count, name


def _frame(data: bytes, offset: int, groups: list[str]) -> Frame:
    place, group, _, number, since, detail = FRAME.unpack_from(data, offset)
    return Frame(_place(place), since, _group(groups, group), number, _text(detail))


def _entries(data: bytes, total: int, groups: list[str]) -> Iterator[CollectiveEntry]:
    oldest = max(0, total - ENTRIES)
    for index in range(oldest, total):
        slot = index % ENTRIES
        offset = RING_AT + slot * ENTRY.size
        fields = ENTRY.unpack_from(data, offset)
        written, _, place, group, background, number, nbytes, step = fields
        if written != index + 1:
            continue  # overwritten since
        yield CollectiveEntry(
            _place(place),
            _group(groups, group),
            number,
            nbytes,
            step,
            bool(background),
        )


def _place(number: int) -> Place:
    return Place(number) if number in Place._value2member_map_ else Place.NOTHING


def _group(groups: list[str], index: int) -> str:
    """Return the name of a group; index 0 means none."""
    return groups[index - 1] if 0 < index <= len(groups) else ""


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")


def as_json(state: RingState) -> dict[str, Any]:
    """Return a state as another host receives it."""
    entries = [_entry_row(entry) for entry in state.entries]
    frames = [_frame_row(frame) for frame in state.frames]
    background = None
    if state.background is not None:
        background = _frame_row(state.background)
    return {
        **{name: getattr(state, name) for name in _PLAIN},
        "frames": frames,
        "background": background,
        "entered": state.entered,
        "entries": entries,
    }


_PLAIN = (
    "rank",
    "pid",
    "started",
    "main_thread",
    "events",
    "progress_at",
    "beat_at",
    "step",
    "micro_batch",
    "steps_done",
    "flags",
)


def from_json(value: dict[str, Any]) -> RingState:
    """Take back what ``as_json`` made."""
    plain = {name: value[name] for name in _PLAIN}
    frames = tuple(_frame_of(row) for row in value["frames"])
    entries = []
    for operation, *rest in value["entries"]:
        entries.append(CollectiveEntry(_place(operation), *rest))
    background = value["background"]
    return RingState(
        **plain,
        frames=frames,
        background=_frame_of(background) if background else None,
        entered=value["entered"],
        entries=tuple(entries),
    )


def _entry_row(entry: CollectiveEntry) -> list[Any]:
    row: list[Any] = [entry.operation, entry.group, entry.number, entry.nbytes]
    return [*row, entry.step, entry.is_in_background]


def _frame_row(frame: Frame) -> list[Any]:
    return [frame.place, frame.since, frame.group, frame.number, frame.detail]


def _frame_of(row: list[Any]) -> Frame:
    place, since, group, number, detail = row
    return Frame(_place(place), since, group, number, detail)
