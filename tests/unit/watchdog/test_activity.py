"""The record of a process, read back as its watcher reads it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomesh.watchdog import ring
from evomesh.watchdog.activity import Activity, remove_old_records
from evomesh.watchdog.ring import CollectiveEntry, Place, RingState
from evomesh.watchdog.tracker import RankTracker
from evomesh.watchdog.watcher import HostWatcher


@pytest.fixture
def activity(tmp_path: Path) -> Iterator[Activity]:
    activity = Activity()
    (tmp_path / "ring").mkdir()
    activity.open(tmp_path / "ring", 3)
    yield activity
    activity.close()


def read(activity: Activity) -> RingState:
    state = ring.read_ring(activity._path.read_bytes())
    assert state is not None
    return state


def test_what_the_process_is_in(activity: Activity) -> None:
    activity.begin_step(7)
    activity.begin_micro_batch(2)
    with (
        activity.phase(Place.FORWARD_BACKWARD),
        activity.collective(Place.ALL_REDUCE, "dp:a", 64),
    ):
        state = read(activity)
    assert (state.rank, state.step, state.micro_batch) == (3, 7, 2)
    inside = [(f.place, f.group, f.number) for f in state.frames]
    assert inside == [(Place.FORWARD_BACKWARD, "", 0), (Place.ALL_REDUCE, "dp:a", 1)]
    assert state.entries == (CollectiveEntry(Place.ALL_REDUCE, "dp:a", 1, 64, 7),)
    after = read(activity)
    assert not after.frames
    assert after.events > state.events


def test_collectives_are_numbered_by_group_and_the_oldest_are_forgotten(
    activity: Activity,
) -> None:
    for _ in range(ring.ENTRIES):
        activity.launched(Place.ALL_GATHER, "tp:a")
    activity.launched(Place.ALL_REDUCE, "dp:b")
    state = read(activity)
    assert state.entered == {"tp:a": ring.ENTRIES, "dp:b": 1}
    assert len(state.entries) == ring.ENTRIES
    assert state.entries[0].number == 2
    assert state.entries[-1].group == "dp:b"


def test_a_background_thread_has_a_place_beside_the_main_thread(
    activity: Activity,
) -> None:
    path = "/a/" + "long/" * 40 + "weights.bin"
    seen = []

    def write() -> None:
        with activity.phase(Place.FILE, path):
            activity.launched(Place.GATHER, "exchange:a")
            seen.append(read(activity))

    with activity.phase(Place.OPTIMIZER):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    (state,) = seen
    assert [frame.place for frame in state.frames] == [Place.OPTIMIZER]
    assert state.background is not None
    assert state.background.detail == path[-128:]
    activity.launched(Place.ALL_REDUCE, "dp:a")
    inside = [entry.is_in_background for entry in read(activity).entries]
    assert inside == [True, False]
    assert read(activity).background is None


def test_deep_nesting_and_many_groups_are_survived(activity: Activity) -> None:
    def nest(depth: int) -> None:
        with activity.collective(Place.BROADCAST, f"group:{depth}"):
            if depth:
                nest(depth - 1)
            else:
                assert len(read(activity).frames) == ring.MAX_DEPTH

    nest(2 * ring.MAX_GROUPS)
    assert not read(activity).frames


def test_another_host_receives_the_same(activity: Activity) -> None:
    activity.begin_step(1)
    with activity.collective(Place.GATHER, "exchange:x"):
        state = read(activity)
    assert ring.from_json(ring.as_json(state)) == state


def test_a_closed_record_is_gone_and_costs_nothing(activity: Activity) -> None:
    folder = activity._path.parent
    activity.close()
    assert not folder.exists()
    with activity.phase(Place.SAVE):
        activity.launched(Place.ALL_REDUCE, "dp:a")
    assert not activity.is_open


def test_the_records_of_killed_runs_are_removed(
    activity: Activity, tmp_path: Path
) -> None:
    alive = activity._path.parent
    dead = tmp_path / "dead"
    dead.mkdir()
    data = bytearray(activity._path.read_bytes())
    _, rank, _, started, thread = ring.IDENTITY.unpack_from(data)
    # Another process has this one's number now.
    ring.IDENTITY.pack_into(data, 0, ring.MAGIC, rank, os.getpid(), started - 1, thread)
    (dead / "0.ring").write_bytes(data)
    (dead / "watcher").touch()
    begun = tmp_path / "begun"
    begun.mkdir()
    remove_old_records([alive, dead, begun])
    assert alive.exists()
    assert begun.exists()
    assert not dead.exists()


def test_two_ranks_that_end_at_once_end_well(
    activity: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one removes the folder between two calls of this one."""

    def list_removed(folder: Path, pattern: str) -> Iterator[Path]:
        raise FileNotFoundError(2, "No such file or directory", str(folder))

    monkeypatch.setattr(Path, "glob", list_removed)
    path = activity._path
    activity.close()
    assert not activity.is_open
    assert not path.exists()
    assert HostWatcher(path.parent, "n1").look() == []


def test_the_main_thread_is_seen_among_more_threads_than_faulthandler_writes(
    activity: Activity, tmp_path: Path
) -> None:
    ends = threading.Event()
    threads = [threading.Thread(target=ends.wait, args=(60,)) for _ in range(120)]
    for thread in threads:
        thread.start()
    (path,) = tmp_path.glob("ring/*.ring")
    tracker = RankTracker(path, "n0", 0.0)
    try:
        tracker.sample(1.0)
        tracker.ask_for_stacks()
        stacks = tracker.report(2.0).stacks
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert stacks is not None
    assert any(call.path.endswith("test_activity.py") for call in stacks.main)
    assert len(stacks.others) >= 99
