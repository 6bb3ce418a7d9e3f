"""The kernel's own record of a save: every file made below the save folder went through ``storage/``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.storage import local
made = []
class Calls(local.SystemCalls):
    def create(self, path):
        made.append(path)
        return super().create(path)
manager = CheckpointWriter(sys.argv[1])
manager.storage = manager.snapshot_storage = local.LocalStorage(Calls())
manager.save(1, {"w": torch.ones(300, 300)}, {"a": 1}, {})
manager.save(2, {"w": torch.ones(300, 300)}, {"a": 1}, {}, snapshot=True)
print("\\n".join(made))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_strace_sees_no_other_writes(tmp_path: Path) -> None:
    log, root = tmp_path / "log", tmp_path / "ckpts"
    command = [
        "strace",
        "-f",
        "-y",
        "-e",
        "trace=openat,creat,open",
        "-o",
        str(log),
        sys.executable,
        "-c",
        SCRIPT,
        str(root),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("this machine does not allow tracing")
    assert done.returncode == 0, done.stderr[-2000:]
    opened = re.findall(r'open(?:at)?\((?:[^"]*)"([^"]+)", ([A-Z_|]+)', log.read_text())
    written = {
        path
        for path, flags in opened
        if path.startswith(str(root)) and re.search("O_WRONLY|O_RDWR|O_CREAT", flags)
    }
    assert written - {f"{root}/.writer"} == set(done.stdout.split())
    assert len(written) > 6
