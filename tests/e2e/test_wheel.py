"""A wheel, built from the files that it is made of: what is in it, and `evomesh demo` from it without a checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from evomesh import __version__
from evomesh.cli.config import shipped_configs, xtuner_configs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]

ROOT = Path(__file__).parents[2]
SOURCES = (
    "evomesh", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
)  # fmt: skip
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
# A model and a number of steps that take a second.
SMALL = (
    "model.num_layers=1", "model.hidden_size=24", "model.num_attention_heads=1", "model.num_kv_attention_heads=1",
    "model.mlp_ratio=1", "model.multiple_of=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, sources / name, ignore=ignored)
        else:
            shutil.copyfile(source, sources / name)
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=sources, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command of the unpacked wheel in a folder."""
    env = os.environ | {"PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
    env.pop("DEMO_DATA", None)
    command = [sys.executable, "-m", "evomesh", *words]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_the_wheel_has_every_file_of_the_package_and_every_config(
    wheel: Path, unpacked: Path
) -> None:
    assert wheel.name == f"evomesh-{__version__}-py3-none-any.whl"
    for path in (ROOT / "evomesh").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            packed = unpacked / path.relative_to(ROOT)
            assert packed.read_bytes() == path.read_bytes()
    for config in [*shipped_configs(), *xtuner_configs(), *ROOT.glob("configs/_base_/*.py")]:  # fmt: skip
        packed = unpacked / "evomesh" / "shipped_configs" / config.relative_to(ROOT / "configs")  # fmt: skip
        assert packed.read_bytes() == config.read_bytes()


def test_configs_are_found_without_a_checkout(unpacked: Path, tmp_path: Path) -> None:
    copied = run(unpacked, tmp_path, "config", "copy", "7B_isp_sft", "mine.py")
    assert copied.returncode == 0, copied.stderr
    assert (tmp_path / "mine.py").exists()
    assert (tmp_path / "_base_" / "7B.py").exists()


def test_the_demo_runs_without_a_checkout(unpacked: Path, tmp_path: Path) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    finished = run(unpacked, tmp_path, "demo", "try", "--steps", "10", *settings)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "of 10 steps" in finished.stdout
    last = finished.stdout.splitlines()[-1]
    assert last == "to ask more: cd try && evomesh chat --ckpt llm_ckpts/demo_chat"
    saved = {path.parent for path in tmp_path.rglob("commit.json")}
    checkpoints = tmp_path / "try" / "llm_ckpts"
    assert saved == {
        checkpoints / "demo" / "step-00000010",
        checkpoints / "demo_chat" / "step-00000002",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"try"}
    config = tmp_path / "try" / "configs" / "demo.py"
    assert config.read_bytes() == (ROOT / "configs" / "demo.py").read_bytes()


def test_containers_and_citations_are_of_this_version() -> None:
    containerfile = (ROOT / "Containerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", containerfile, re.M)
    names = {name for line in copied for name in line.split()}
    assert names == {*SOURCES, "constraints.txt"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == names
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
