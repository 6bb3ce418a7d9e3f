"""Which ranks a diagnosis names, from figures; and what its probes do to a process."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from evomesh.parallel.grid import Axis, Grid
from evomesh.train import diagnosis
from evomesh.train.diagnosis import (
    Diagnosis,
    DiskProbe,
    RankFigures,
    first_large_file,
    read_past_cache,
    slow_devices,
    slow_disks,
    slow_groups,
    slow_steps,
    time_all_reduce,
    time_product,
)
from tests.support.covers import covers


def ranks(**columns: list[float]) -> list[RankFigures]:
    """Rows of figures on hosts with two ranks each."""
    count = len(next(iter(columns.values())))
    rows = []
    for rank in range(count):
        values = {name: column[rank] for name, column in columns.items()}
        rows.append(RankFigures(rank, f"node{rank // 2}", **values))
    return rows


@covers("data.diag_outlier_ratio")
def test_slow_is_above_the_ratio_times_the_median() -> None:
    times = ranks(fwd_bwd=[1.0, 1.0, 1.2, 1.0])
    assert list(slow_steps(times, 1.1)) == [
        "rank 2 on node1 is slow: forward and backward took 1.200 s (median of 4 ranks: 1.000 s)"
    ]
    assert list(slow_steps(times, 1.25)) == []
    assert list(slow_steps(ranks(fwd_bwd=[3.0]), 1.0)) == []


def test_steps_are_compared_within_a_pipeline_stage() -> None:
    """The last stage has the loss, and takes longer on every rank."""
    rows = ranks(fwd_bwd=[1.0, 1.0, 2.0, 2.5], peers=[(0, 0), (0, 0), (1, 0), (1, 0)])
    (sentence,) = slow_steps(rows, 1.1)
    assert sentence.startswith("rank 3 on node1 is slow")


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ([0.010, 0.010, 0.010, 0.020], "rank 3 on node1"),
        ([0.010, 0.010, 0.010, 0.0119], ""),  # 1.9 ms are noise
        ([0.100, 0.100, 0.100, 0.109], ""),  # above noise, and below the ratio
        ([0.010, 0.010, None, 0.020], "rank 3 on node1"),  # no memory for it on one
        ([None, None, None, None], ""),
    ],
)
def test_a_slow_device_is_named(times: list[float | None], named: str) -> None:
    sentences = list(slow_devices(ranks(product=times), 1.1))  # type: ignore[arg-type]
    assert [sentence.partition(" has")[0] for sentence in sentences] == (
        [named] if named else []
    )


def test_a_slow_disk_is_named() -> None:
    (sentence,) = slow_disks(ranks(disk=[0.01, 9.0, 0.01, 0.01]), 1.1)
    assert sentence == (
        "rank 1 on node0 has a slow disk: reading 1 MiB of the data took 9000.0 ms (median of 4 ranks: 10.0 ms)"
    )


def reduces(slow: set[int], size: int = 8) -> list[RankFigures]:
    """Ranks in rows of two (tp) and columns (dp); the groups of slow ranks take ten times as long."""
    rows = []
    for rank in range(size):
        groups = {
            "dp": range(rank % 2, size, 2),
            "tp": range(rank & ~1, (rank | 1) + 1),
        }
        times = {}
        for axis, members in groups.items():
            is_slow = not slow.isdisjoint(members)
            times[axis] = (members[0], 0.05 if is_slow else 0.005)
        rows.append(RankFigures(rank, f"node{rank}", reduces=times))
    return rows


@pytest.mark.parametrize(
    ("slow", "start"),
    [
        ({5}, "slow network at rank 5 on node5: "),
        ({2}, "slow network at rank 2 on node2: "),
        (set(), None),
    ],
)
def test_the_rank_that_all_slow_groups_share_is_named(
    slow: set[int], start: str | None
) -> None:
    sentences = list(slow_groups(reduces(slow), 1.5))
    assert len(sentences) == (start is not None)
    if start is not None:
        assert sentences[0].startswith(start)


def test_many_ranks_are_counted() -> None:
    """Of the rows alone: a slow switch between hosts."""
    rows = [
        RankFigures(
            rank, "n", reduces={"dp": (rank % 4, 0.05 if rank % 4 == 3 else 0.01)}
        )
        for rank in range(64)
    ]
    (sentence,) = slow_groups(rows, 1.5)
    assert "rank 3 on n, rank 7 on n, " in sentence
    assert " and 8 more: an all-reduce took over axis dp 50.0 ms" in sentence


def test_a_single_group_is_compared_with_its_past(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0.010, 0.011, 0.030])
    monkeypatch.setattr(diagnosis, "time_all_reduce", lambda axis, device: next(times))
    monkeypatch.setattr(
        diagnosis, "all_gather_objects", lambda value, axis: [value] * axis.size
    )
    sentences: list[str] = []
    grid = Grid(dp=Axis("dp", 2, 0))
    round_of = Diagnosis(1.5, grid, torch.device("cpu"), report=sentences.append)
    for _ in range(3):
        round_of.run(1.0)
    (sentence,) = sentences
    assert "over axis dp took 30.0 ms, and 10.0 ms earlier" in sentence


def test_only_the_main_rank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = RankFigures(1, "node1", fwd_bwd=9.0)
    monkeypatch.setattr(diagnosis, "gather_over", lambda grid, own: [own, own, slow])
    for rank, count in ((0, 1), (1, 0)):
        sentences: list[str] = []
        grid = Grid(dp=Axis("dp", 3, rank))
        monkeypatch.setattr(Diagnosis, "_reduces", lambda self: {})
        Diagnosis(1.5, grid, torch.device("cpu"), report=sentences.append).run(1.0)
        assert len(sentences) == count


def test_probes_leave_random_numbers_and_the_default_dtype_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    seconds = time_product(torch.device("cpu"))
    time_all_reduce(Axis("dp"), torch.device("cpu"))
    assert seconds is not None
    assert seconds > 0
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()


def test_a_device_without_memory_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*sizes: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "ones", refuse)
    assert time_product(torch.device("cpu")) is None


def test_the_disk_probe_reads_another_piece_each_time(tmp_path: Path) -> None:
    (tmp_path / "small.meta").write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    large = tmp_path / "sub/data.bin"
    large.write_bytes(os.urandom(3 * diagnosis.READ_BYTES + 5))
    assert first_large_file(tmp_path) == large
    assert read_past_cache(large, 2) == diagnosis.READ_BYTES
    probe = DiskProbe(str(tmp_path))
    assert probe.seconds() is None
    probe.start()
    probe._thread.join()
    assert probe.seconds() > 0


@pytest.mark.parametrize("name", ["", "gone"])
def test_without_a_file_there_is_no_figure(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe = DiskProbe(str(tmp_path / name))
    with caplog.at_level(logging.WARNING):
        probe.start()
        probe._thread.join()
    assert probe.seconds() is None
    assert not caplog.records
