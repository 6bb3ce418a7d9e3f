"""Maps hold the file's bytes, no handle, and nothing once they are gone."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from evomesh.config.data import DataConfig
from evomesh.data.packing.corpus import open_corpus
from evomesh.data.token_files.mapping import map_array, map_file
from tests.support.golden import write_bin
from tests.support.interpreter import Interpreter


def open_handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.slow
def test_bytes_without_a_handle(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789" * 1000)
    before = open_handles()
    content = map_file(path)
    assert open_handles() == before and is_mapped(path)
    assert bytes(content) == path.read_bytes() and content.readonly
    part = content[5:8]
    del content
    gc.collect()
    assert bytes(part) == b"567", "a view keeps the map"
    del part
    gc.collect()
    assert not is_mapped(path)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (7,), (5, 2), (3, 4, 5)])
@pytest.mark.parametrize("dtype", ["<i4", "<i8", "<f4", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_equal_numpys(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, order: str
) -> None:
    path = tmp_path / "a.npy"
    np.save(
        path,
        np.asarray(np.arange(np.prod(shape)).reshape(shape).astype(dtype), order=order),
    )
    before = open_handles()
    found, expected = map_array(path), np.load(path)
    assert open_handles() == before
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "content", [b"", b"no array", b"\x93NUMPY\x01\x00"], ids=["empty", "other", "torn"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        map_array(path)
    with pytest.raises(ValueError):
        np.save(path, np.array([{}]), allow_pickle=True)
        map_array(path)


def read_more_files_than_handles() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for use_shm in (False, True):
        config = DataConfig(
            train_folder="data",
            seq_len=8,
            micro_num=1,
            min_length=2,
            use_shm=use_shm,
            shm_path="shm",
        )
        corpus = open_corpus(config, None)
        packs = [corpus.read(number) for number in range(corpus.num_packs)]
        print(
            len(corpus.report), sum(int((pack.labels != -100).sum()) for pack in packs)
        )


@pytest.mark.slow
def test_more_token_files_than_a_process_may_open(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    for number in range(100):
        write_bin(
            tmp_path / f"data/en/{number}.bin",
            [[1 + number % 50] * 9, [5], [2, 3, 4] * 3],
        )
    finished = interpreter.run(read_more_files_than_handles, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    first, second = finished.stdout.splitlines()
    assert first == second and first.startswith("100 ")
