"""The records of ranks: their size, who may write where, what a reader makes of a torn one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from evomesh.monitor.metrics import StepRecord
from evomesh.monitor.status import (
    RECORD_BYTES,
    RankStatus,
    StatusWriter,
    decode,
    encode,
    host_memory,
    read_statuses,
)

RECORD = StepRecord(1.0, 6, 2.0, 950.5, 1e-3, 1.0, 1.0, 1, 10, 0, 1, 1, 1, 1, 0.9, 0.25)


def writer(folder: Path, rank: int, place: int, began: float = 1.7e9) -> StatusWriter:
    return StatusWriter(folder, rank, place, 7, began, memory=lambda: (5, 9))


def test_the_largest_record_fits() -> None:
    huge = 10**15
    status = RankStatus(
        rank=10**6, host="h" * 300, pid=10**7, time=1e10 + 0.123, since=1e10 + 0.123,
        phase="validation", step=huge, total=huge, began=1e10 + 0.123, started=1e10 + 0.123,
        first_step=huge, tgs=1e9 + 0.123, fwd_bwd=1e6 + 0.123, data_wait=1e6 + 0.123,
        memory=huge, memory_limit=huge, saved=huge, saving=False,
    )  # fmt: skip
    record = encode(status)
    assert len(record) == RECORD_BYTES
    assert decode(record) == RankStatus(**{**vars(status), "host": "h" * 100})


def test_ranks_of_a_host_share_a_file(tmp_path: Path) -> None:
    with writer(tmp_path, rank=9, place=1) as second:
        with writer(tmp_path, rank=8, place=0) as first:
            first.begin(2)
            first.enter("train")
            first.step_done(RECORD, steps=7, data_wait=0.5)
            first.note_saves(5, saving=True)
        second.enter("data wait")
        statuses = read_statuses(tmp_path)
    (path,) = (tmp_path / "status").iterdir()
    assert path.stat().st_size == 2 * RECORD_BYTES
    eighth, ninth = statuses
    assert (eighth.rank, eighth.phase, eighth.step, eighth.total) == (8, "done", 7, 7)
    assert (eighth.first_step, eighth.tgs, eighth.fwd_bwd) == (2, 950.5, 0.25)
    assert (eighth.data_wait, eighth.saved, eighth.saving) == (0.5, 5, True)
    assert (eighth.memory, eighth.memory_limit) == (5, 9)
    assert (ninth.rank, ninth.phase) == (9, "start")  # as it was when it began


def test_ranks_of_an_earlier_start_are_left_out(tmp_path: Path) -> None:
    for rank in range(3):  # the first start
        with writer(tmp_path, rank, place=rank):
            pass
    for rank in range(2):
        with writer(tmp_path, rank, place=rank, began=1.7e9 + 0.004):
            pass
    assert [status.rank for status in read_statuses(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("error", "steps", "phase"),
    [
        (None, 7, "done"),
        (None, 6, "stopped"),
        (ValueError, 6, "failed"),
        (KeyboardInterrupt, 6, "stopped"),
    ],
)
def test_the_last_record_tells_how_the_rank_ended(
    error: type[BaseException] | None, steps: int, phase: str, tmp_path: Path
) -> None:
    opened = writer(tmp_path, 0, 0)
    try:
        with opened:
            opened.status.step = steps
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    (status,) = read_statuses(tmp_path)
    assert status.phase == phase
    assert status.has_ended


def test_empty_places_and_torn_records_are_left_out(tmp_path: Path) -> None:
    whole = encode(RankStatus(3, "a", time=1.0))
    torn = whole[:100] + bytes(RECORD_BYTES - 100)
    newer = encode(RankStatus(3, "b", time=2.0, step=4)) + b'{"rank'
    (tmp_path / "status").mkdir()
    (tmp_path / "status/a.jsonl").write_bytes(bytes(RECORD_BYTES) + torn + whole)
    (tmp_path / "status/b.jsonl").write_bytes(newer)
    (status,) = read_statuses(tmp_path)
    assert (status.rank, status.host, status.step) == (3, "b", 4)


def test_a_record_of_another_version_is_read(tmp_path: Path) -> None:
    assert decode(b'{"rank": 1, "of_tomorrow": 2}') == RankStatus(1)
    assert decode(b"[1]") is None
    assert decode(b"{}") is None


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "status").write_text("a file")
    with writer(tmp_path, 0, 0) as opened:
        opened._write_once()
    assert len(caplog.records) == 1
    assert "status files" in caplog.text


def test_memory_of_this_process() -> None:
    used, total = host_memory()
    assert 10**6 < used < total


def test_the_thread_writes_what_the_loop_has_set(tmp_path: Path) -> None:
    opened = writer(tmp_path, 0, 0)
    opened.every_s = 0.001
    with opened:
        opened.enter("save")
        deadline = time.monotonic() + 20
        while not any(one.phase == "save" for one in read_statuses(tmp_path)):
            assert time.monotonic() < deadline
