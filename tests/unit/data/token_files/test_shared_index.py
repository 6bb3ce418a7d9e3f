"""``use_shm``: one index per node, reused by the next run and removed when stale."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomesh.config.data import DataConfig
from evomesh.data.build import build_train_data
from evomesh.data.token_files.shared_index import remove_stale, shared_array
from evomesh.errors import UserError
from tests.support.covers import covers

pytestmark = covers("promise:shared-memory")

KEY = "0" * 32 + ".order"


def first_batch(tmp_path: Path, **values: Any) -> torch.Tensor:
    options: dict[str, Any] = {
        "seq_len": 8,
        "num_worker": 0,
        "train_folder": str(tmp_path / "train"),
    }
    return next(build_train_data(DataConfig(**options, **values), 100).stream()).tokens


@covers("data.use_shm", "data.shm_path")
def test_batches_are_the_same_and_the_index_is_reused(
    write_bin: Any, tmp_path: Path
) -> None:
    rng = np.random.RandomState(0)
    write_bin([rng.randint(1, 99, 5).tolist() for _ in range(50)])
    folder = tmp_path / "shm" / "deep"
    shm = {"use_shm": True, "shm_path": str(folder)}
    assert torch.equal(first_batch(tmp_path, **shm), first_batch(tmp_path))
    arrays = sorted(folder.glob("*.npy"))
    assert len(arrays) == 2
    born = [path.stat().st_ino for path in arrays]
    first_batch(tmp_path, **shm)
    assert [path.stat().st_ino for path in sorted(folder.glob("*.npy"))] == born
    write_bin([rng.randint(1, 99, 6).tolist() for _ in range(50)])
    assert torch.equal(first_batch(tmp_path, **shm), first_batch(tmp_path))
    assert len(list(folder.glob("*.npy"))) == 4


def held_bytes(folder: Path, documents: int, use_shm: bool) -> int:
    """Return what a process holds of a dataset whose documents have 1 and 2 tokens in turn."""
    path = folder / "train/en/a.bin"
    path.parent.mkdir(parents=True)
    lines = [b'{"tokens": [5]}\n', b'{"tokens": [7, 8]}\n'] * (documents // 2)
    path.write_bytes(b"".join(lines))
    lengths = [len(line) for line in lines]
    starts = np.cumsum(lengths) - lengths
    np.save(path.with_suffix(".npy"), np.stack([starts, [1, 2] * (documents // 2)], 1))
    path.with_suffix(".npy").rename(f"{path}.meta")
    config = DataConfig(
        seq_len=8,
        train_folder=str(folder / "train"),
        use_shm=use_shm,
        shm_path=str(folder / "shm"),
        min_length=2,
        num_worker=0,
    )
    tracemalloc.start()
    data = build_train_data(config, 100)
    stream = data.stream()
    next(stream)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held


def test_a_process_holds_nothing_that_grows_with_the_documents(tmp_path: Path) -> None:
    """Every array with an entry per document is a file that all processes of a node map."""
    held_bytes(tmp_path / "first", 1_000, True)  # modules and caches
    growth = {}
    for use_shm in (False, True):
        few = held_bytes(tmp_path / f"few {use_shm}", 20_000, use_shm)
        many = held_bytes(tmp_path / f"many {use_shm}", 60_000, use_shm)
        growth[use_shm] = many - few
    assert growth[False] > 20_000 * (4 + 8 + 4 + 8)  # kept, lengths, order, ends
    # The order of the packs, 8 bytes for each of 5,000, and what other threads hold. One
    # array more, with an entry per kept document, would be 80,000 bytes or more.
    assert growth[True] < 5_000 * 8 + 30_000
    assert len(list((tmp_path / "many True" / "shm").glob("*.npy"))) == 4


def test_stale_indexes_and_partial_files_are_removed(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1] * 50])
    folder = tmp_path / "shm"
    folder.mkdir()
    key = "0123456789abcdef" * 2
    new = folder / f"{key}.order.index.npy"
    own = [f"{key}.ends.index.npy", f"{key}.4.kept.index.npy"]
    own += [*(f".{name}.17.part" for name in own), *(f".{name}.lock" for name in own)]
    foreign = ["else.txt", "faiss.index.npy", ".download.part", f"{key}.npy"]
    old = [folder / name for name in [*own, *foreign]]
    for path in [*old, new]:
        path.write_bytes(b"x")
    for path in old:
        os.utime(path, (time.time() - 90_000,) * 2)
    first_batch(tmp_path, use_shm=True, shm_path=str(folder))
    assert [path.name for path in old if path.exists()] == foreign
    assert new.exists()


def test_every_index_that_is_written_is_removed_when_stale(
    write_bin: Any, tmp_path: Path
) -> None:
    """The names that are removed are those that are given, in every mode of packing."""
    write_bin([[1] * 50, [2] * 3])
    folder = tmp_path / "shm"
    for values in ({}, {"min_length": 4}, {"use_packed_dataset": False}):
        first_batch(tmp_path, use_shm=True, shm_path=str(folder), **values)
    written = list(folder.iterdir())
    for path in written:
        os.utime(path, (time.time() - 90_000,) * 2)
    assert len(written) > 4
    assert sorted(remove_stale(folder)) == sorted(path.name for path in written)


def test_an_unwritable_shared_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"shared index.*\n.*data\.use_shm=False"):
        shared_array(tmp_path / "file", "key", lambda: np.zeros(3))


def test_one_process_of_a_node_builds(tmp_path: Path) -> None:
    """The others wait for it: a lock belongs to an open file, so that threads stand for processes."""
    entered = threading.Barrier(4)
    builds: list[int] = []

    def build() -> np.ndarray[Any, Any]:
        builds.append(1)
        return np.arange(5)

    def map_it(_: int) -> list[int]:
        entered.wait()
        numbers: list[int] = shared_array(tmp_path / "shm", KEY, build).tolist()
        return numbers

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(map_it, range(4))) == [[0, 1, 2, 3, 4]] * 4
    assert len(builds) == 1


def test_a_builder_that_fails_leaves_the_work_to_the_next(tmp_path: Path) -> None:
    def fail() -> np.ndarray[Any, Any]:
        raise ValueError("killed")

    with pytest.raises(ValueError, match="killed"):
        shared_array(tmp_path, KEY, fail)
    built = shared_array(tmp_path, KEY, lambda: np.arange(2))
    assert built.tolist() == [0, 1]
