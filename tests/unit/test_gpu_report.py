"""benchmarks/gpu.py and tools/wheels.py: what `make gpu` leaves when its time is up, what a bare machine is given."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import gpu
from tools import wheels

ROOT = Path(__file__).resolve().parents[2]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.mark.slow
def test_rows_of_a_part_that_takes_too_long_are_kept_and_its_processes_end() -> None:
    """The child inherits the pipe: if it outlived the part, reading would last as long as it does."""
    program = "echo '| steps | first | 1 |'; sleep 250 & wait"
    lines = list(gpu.lines_of_part("steps", ["sh", "-c", program], minutes=0.05))
    assert lines == [
        "| steps | first | 1 |",
        "| steps | rest | STOPPED after 0.05 minutes |  |  |",
    ]


@pytest.mark.slow
def test_a_part_that_fails_says_so() -> None:
    [line] = gpu.lines_of_part("serve", python("raise SystemExit(3)"), minutes=1)
    assert line == "| serve | rest | FAILED with exit code 3 |  |  |"


def test_wheels_are_those_of_the_package_without_torch() -> None:
    """Every version is the one of constraints.txt, and nothing that only torch needs is among them."""
    versions = wheels.needed("evomesh", set())
    del versions["setuptools"]  # tensorboard's; pip brings its own where it is missing
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.fullmatch(r"[\w.-]+==[\w.+-]+", line)
    )
    pinned = {gpu.normalized(name): version for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {
        gpu.normalized(re.split(r"[<>=]", line)[0]) for line in project["dependencies"]
    }
    assert direct - {"torch"} <= set(versions)
    assert not {"torch", "triton", "sympy", "networkx"} & set(versions)
    assert "pydantic-core" in versions  # needed by one that is needed
    assert versions.items() <= pinned.items()


def test_what_this_python_has_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.missing_requirements() == []
    installed = gpu.is_installed
    monkeypatch.setattr(
        gpu, "is_installed", lambda name: name != "orjson" and installed(name)
    )
    assert gpu.missing_requirements() == ["orjson"]


def test_without_wheels_the_command_that_makes_them_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "missing_requirements", lambda: ["orjson", "ijson"])
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"lacks orjson, ijson: .*make wheels"):
        gpu.install_missing_wheels()
