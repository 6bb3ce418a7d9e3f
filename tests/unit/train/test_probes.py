"""Probes count what they say, leave nothing in a folder, and name what they cannot do."""

from __future__ import annotations

import pytest
import torch

from evomesh.parallel.grid import Axis
from evomesh.parallel.probes import MessageTime, best_seconds, time_messages
from evomesh.storage.local import LocalStorage
from evomesh.train.probes import (
    FileTimes,
    product_seconds,
    time_folder,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("ranks", "moved"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_bandwidth_counts_what_a_ring_moves_over_one_link(
    ranks: int, moved: float
) -> None:
    assert MessageTime(1000, 0.5, ranks).bandwidth == moved * 1000 / 0.5


def test_the_best_of_several_runs_follows_one_that_warms_up() -> None:
    runs = []
    seconds = best_seconds(lambda: runs.append(1), CPU, repeats=3)
    assert len(runs) == 4 and seconds >= 0


def test_messages_are_timed_by_size() -> None:
    times = time_messages(Axis("dp"), CPU, (8, 4096), repeats=1)
    assert [time.nbytes for time in times] == [8, 4096]
    assert all(time.seconds > 0 for time in times)


def test_a_folder_is_left_as_it_was(tmp_path) -> None:
    times = time_folder(LocalStorage(), str(tmp_path), 1 << 16)
    assert times.nbytes == 1 << 16 and times.write > 0 and times.read > 0
    assert list(tmp_path.iterdir()) == []


def test_rates_are_bytes_per_second() -> None:
    times = FileTimes(100, write=2.0, read=4.0)
    assert (times.write_rate, times.read_rate) == (50.0, 25.0)


def test_a_probe_that_fails_leaves_no_file(tmp_path) -> None:
    class Unreadable(LocalStorage):
        def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
            raise OSError(5, "Input/output error", path)

    with pytest.raises(OSError, match="Input/output error"):
        time_folder(Unreadable(), str(tmp_path), 100)
    assert list(tmp_path.iterdir()) == []


def test_a_product_takes_time() -> None:
    assert product_seconds(CPU, size=16, repeats=1) > 0
