"""The oracle is the kernel's own count of page faults, in a fresh process each."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from evomesh.train.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def step():
    for _ in range(4):
        torch.ones(48 << 20, dtype=torch.uint8)
for _ in range(8):  # until the heap has found its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (48 << 20) // 4096


def faults(how: str, **variables: str) -> tuple[str, int]:
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES",)} | variables
    done = subprocess.run([sys.executable, "-c", COUNT, how], env=env, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
class TestKeepFreedMemory:
    def test_freed_blocks_are_reused(self) -> None:
        assert faults("default")[1] > 3 * PAGES  # what it is about: every block costs all its pages again
        kept, count = faults("keep")
        assert kept == "True"
        assert count < PAGES / 10

    @pytest.mark.parametrize(
        "variable", [{"MALLOC_MMAP_THRESHOLD_": "1048576"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}]
    )
    def test_the_users_choice_stands(self, variable: dict[str, str]) -> None:
        kept, count = faults("keep", **variable)
        assert kept == "False"
        assert count > 3 * PAGES
