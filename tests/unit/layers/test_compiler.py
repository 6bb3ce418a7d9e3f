"""model.compile = "auto" compiles where that can work, and says once what is missing where it cannot."""

from __future__ import annotations

import logging
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from evomesh.layers import compiler
from evomesh.layers.compiler import compiles_blocks

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def complete_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with triton, the headers of Python, and gcc as the only program."""
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    make_program(tmp_path / "gcc")
    compiler._warn_once.cache_clear()
    yield
    compiler._warn_once.cache_clear()


def make_program(path: Path) -> None:
    path.touch()
    path.chmod(0o755)


def test_auto_compiles_on_cuda_only(caplog: pytest.LogCaptureFixture) -> None:
    assert compiles_blocks("auto", CUDA)
    assert not compiles_blocks("auto", CPU)
    assert not caplog.records


def remove_triton(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)


def remove_gcc(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "gcc").unlink()


def name_no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", "no-such-cc")


def remove_headers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "Python.h").unlink()


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        (remove_triton, "triton"),
        (remove_gcc, "gcc or clang"),
        (name_no_compiler, "no-such-cc"),
        (remove_headers, "Python.h"),
    ],
)
def test_auto_warns_once_and_stays_eager_where_something_is_missing(
    remove: Callable[[pytest.MonkeyPatch, Path], None],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remove(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not compiles_blocks("auto", CUDA)
        assert not compiles_blocks("auto", CUDA)
        assert not compiles_blocks("auto", CPU)
    (message,) = [record.getMessage() for record in caplog.records]
    assert named in message and "model.compile=False" in message
    assert compiles_blocks(True, CUDA), (
        "who asks for compiled blocks gets them, or the error of the compiler"
    )


@pytest.mark.parametrize("name", ["gcc", "clang", "own-cc"])
def test_any_compiler_that_triton_would_take_will_do(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gcc").unlink()
    make_program(tmp_path / name)
    if name == "own-cc":
        monkeypatch.setenv("CC", name)
    assert compiles_blocks("auto", CUDA)
