"""tools/test_versions.sh tests all versions even if one fails, and ends with what became of each."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands for make: an environment whose Python knows how the tests of its version end.
MAKE = """#!/bin/sh
for word in "$@"; do case $word in VENV=*) venv=${word#VENV=};; esac; done
case $venv in *2.9*) exit 1;; esac
mkdir -p "$venv/bin"
case $venv in *2.11*) code=1 words="1 failed, 2 passed";; *) code=0 words="3 passed";; esac
printf '#!/bin/sh\\necho "$@"; echo "%s in 1s"; exit %s\\n' "$words" $code >"$venv/bin/python"
chmod +x "$venv/bin/python"
"""


@pytest.mark.slow
def test_every_version_is_tested_and_summed_up(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    script = shutil.copy(ROOT / "tools/test_versions.sh", tmp_path / "tools")
    pins = "numpy==2.4.6\nsetuptools==84.2.1\ntorch==2.13.0\n"
    (tmp_path / "constraints.txt").write_text(pins)
    make = tmp_path / "bin/make"
    make.parent.mkdir()
    make.write_text(MAKE)
    make.chmod(0o755)
    path = f"{make.parent}:{os.environ['PATH']}"
    environment = dict(os.environ, PATH=path, TESTS="tests/arch tests/dist")

    def run(*versions: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [script, *versions],
            check=False,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.returncode, done.stdout.splitlines()

    code, lines = run("2.11.0", "2.9.0", "2.15.0")
    assert code == 1
    assert lines[-3:] == [
        "torch 2.11.0: 1 failed, 2 passed in 1s",
        "torch 2.9.0: no environment could be made",
        "torch 2.15.0: 3 passed in 1s",
    ]
    assert "-m pytest -n 2 --dist loadgroup tests/arch tests/dist" in lines
    made = tmp_path / ".venvs/torch-2.15.0/constraints.txt"
    assert made.read_text() == "numpy==2.4.6\ntorch==2.15.0\n"
    assert [run(one)[0] for one in ("2.9.0", "2.11.0", "2.15.0")] == [1, 1, 0]
