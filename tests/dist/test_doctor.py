"""Checks that all ranks make together: clocks, and a save folder that all must see."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from evomesh.config.schema import Config
from evomesh.diagnose import folders
from evomesh.diagnose.folders import SaveFolderCheck, read_only_results
from evomesh.diagnose.machine import clock_offsets
from evomesh.diagnose.network import groups_to_time, time_groups
from evomesh.diagnose.results import CheckResult, RankPlace
from evomesh.parallel.exchange import SingleProcessExchange, default_exchange
from evomesh.storage.local import LocalStorage
from tests.support.pool import Pool, grid_of

PLACES = [RankPlace(rank, f"n{rank}") for rank in range(4)]
MIB = 1 << 20


def config_for(folder: str) -> Config:
    data = {"total_steps": 100}
    ckpt = {
        "enable_save_ckpt": True,
        "save_ckpt_folder": folder,
        "checkpoint_every": 10,
        "keep_last": 3,
    }
    return Config.model_validate({"data": data, "ckpt": ckpt})


def measure_clocks(rank: int, skews: list[float]) -> list[float]:
    exchange = default_exchange()
    offsets = clock_offsets(exchange, lambda: time.time() + skews[rank])
    exchange.close()
    return offsets


def test_skew_is_measured_from_rank_0(pool: Pool) -> None:
    skews = [100.0, 100.0, 105.0, 60.0]
    for offsets in pool.run(measure_clocks, skews):
        assert offsets[0] == 0.0
        # Proven is what is outside the time of a message, so never more than the skew.
        assert abs(offsets[1]) < 0.5
        assert 4.0 < offsets[2] < 5.5 and -40.5 < offsets[3] < -39.0


def check_save_folder(rank: int, folders: list[str]) -> list[CheckResult]:
    exchange = default_exchange()
    check = SaveFolderCheck(config_for(folders[rank]), exchange, PLACES)
    with patch("evomesh.diagnose.folders.LOOKS", 1):
        results = check.results(one_checkpoint=MIB)
    exchange.close()
    return results


def test_a_shared_folder_is_checked_and_left_as_it_was(
    pool: Pool, tmp_path: Path
) -> None:
    folder = str(tmp_path / "runs" / "ckpts")
    for results in pool.run(check_save_folder, [folder] * 4):
        names = [result.check for result in results]
        assert names == ["save folder", "disk space", "disk rates"]
        assert [result.status for result in results][:2] == ["ok", "ok"]
        assert "4 of them 4.0 MiB" in results[1].found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_one_rank_does_not_see_is_named(
    pool: Pool, tmp_path: Path
) -> None:
    folders = [str(tmp_path / "shared")] * 3 + [str(tmp_path / "own")]
    for results in pool.run(check_save_folder, folders):
        (result,) = results
        assert result.status == "fail" and "shared file system" in result.fix
        assert result.found.endswith("is not seen by rank 3 on n3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "status", "words"),
    [
        (MIB, "fail", "cannot hold two checkpoints"),
        (3 * MIB, "warn", "NOT ENOUGH"),
        (5 * MIB, "ok", "5.0 MiB are free"),
    ],
)
def test_a_disk_that_is_too_full_for_the_forecast(
    tmp_path: Path, monkeypatch: Any, free: int, status: str, words: str
) -> None:
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda *_: free)
    config = config_for(str(tmp_path / "ckpts"))
    check = SaveFolderCheck(config, SingleProcessExchange(), PLACES[:1])
    result = check.results(one_checkpoint=MIB)[1]
    assert result.status == status and words in result.found
    assert bool(result.fix) == (status != "ok")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_for(str(tmp_path / "file" / "ckpts"))
    check = SaveFolderCheck(config, SingleProcessExchange(), PLACES[:1])
    (result,) = check.results(one_checkpoint=MIB)
    assert result.status == "fail" and "rank 0 on n0 cannot write" in result.found


def check_data(rank: int, of_rank: list[str]) -> list[CheckResult]:
    exchange = default_exchange()
    data = {"train_folder": of_rank[rank]}
    config = Config.model_validate({"data": data})
    results = read_only_results(config, exchange, PLACES)
    exchange.close()
    return results


def test_data_that_differs_on_one_rank_is_named(pool: Pool, tmp_path: Path) -> None:
    for name, size in (("same", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_bytes(b"x" * size)
    of_rank = [str(tmp_path / "same")] * 2 + [str(tmp_path / "other")] * 2
    (result,) = pool.run(check_data, of_rank)[0]
    assert result.check == "train data" and result.status == "fail"
    assert "(rank 2 on n2, rank 3 on n3)" in result.found


def test_the_warnings_of_the_data_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(manifest={"hash": "1"}, num_packs=1, warnings=["a", "b"])
    monkeypatch.setattr(folders, "build_train_data", lambda *_: data)
    results = read_only_results(Config(), SingleProcessExchange(), PLACES[:1])
    found = [(result.status, result.found) for result in results]
    assert found[0][0] == "ok" and found[1:] == [("warn", "a"), ("warn", "b")]
    streaming = {"type": "streaming", "valid_every": 5}
    synthetic = Config.model_validate({"data": streaming})
    *_, last = read_only_results(synthetic, SingleProcessExchange(), PLACES[:1])
    assert last.status == "warn" and "validation on synthetic" in last.found


def time_axes(rank: int) -> tuple[list[str], list[CheckResult]]:
    grid = grid_of(tensor=2)
    exchange = default_exchange()
    results = time_groups(grid, torch.device("cpu"), exchange, PLACES)
    exchange.close()
    return [axis.name for axis in groups_to_time(grid)], results


def test_each_group_of_the_layout_is_timed_once(pool: Pool) -> None:
    for axes, results in pool.run(time_axes):
        assert axes == ["dp", "tp"]  # zero has the ranks of dp
        assert [result.check for result in results] == ["axis dp", "axis tp"]
        assert all("latency" in result.found for result in results)
