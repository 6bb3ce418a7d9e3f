"""The oracle is the kernel's own count of page faults, in a fresh process each."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from evomesh.train.allocator import use_expandable_segments
from tests.support.runs import write_run

COUNT = """
import resource, sys, torch
from evomesh.config.loader import load_config
from evomesh.train.allocator import keep_freed_memory
from evomesh.train.main import run_training
if sys.argv[1] == "keep":
    print("kept", keep_freed_memory())
if sys.argv[1] == "train":
    print("trained", run_training(load_config("config.py", ["data.total_steps=3"])))
def step():
    for _ in range(4):
        torch.ones(48 << 20, dtype=torch.uint8)
for _ in range(8):  # until the heap has found its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (48 << 20) // 4096


def faults(how: str, cwd: Path | None = None, **variables: str) -> tuple[str, int]:
    """What a fresh process said of its preparation, and the faults of four large blocks after it."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLIBC_TUNABLES",)
    } | variables
    done = subprocess.run(
        [sys.executable, "-c", COUNT, how],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    said = dict(
        line.split()
        for line in done.stdout.splitlines()
        if line.startswith(("kept", "trained", "faults"))
    )
    return said.get("kept", ""), int(said["faults"])


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
class TestKeepFreedMemory:
    def test_freed_blocks_are_reused(self) -> None:
        # What it is about: every block costs all its pages again.
        assert faults("default")[1] > 3 * PAGES
        kept, count = faults("keep")
        assert kept == "True"
        assert count < PAGES / 10

    def test_a_training_run_on_the_cpu_has_them_reused(self, tmp_path: Path) -> None:
        write_run(tmp_path)
        assert (
            faults("train", tmp_path, PYTHONPATH=str(Path(__file__).parents[3]))[1]
            < PAGES / 10
        )

    @pytest.mark.parametrize(
        "variable",
        [
            {"MALLOC_MMAP_THRESHOLD_": "1048576"},
            {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"},
        ],
    )
    def test_the_users_choice_stands(self, variable: dict[str, str]) -> None:
        kept, count = faults("keep", **variable)
        assert kept == "False"
        assert count > 3 * PAGES


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.mark.parametrize("chosen", [None, *NAMES])
def test_segments_of_the_device_grow_unless_the_user_has_chosen(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "max_split_size_mb:512")
    use_expandable_segments()
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    if chosen is None:
        assert found == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    else:
        assert found == {chosen: "max_split_size_mb:512"}
