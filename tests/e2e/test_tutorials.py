"""The tutorials of docs/tutorials, typed from top to bottom in one folder, with what they say is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import DOCS, Page

ROOT = Path(__file__).parents[2]
TUTORIALS = ["pretrain", "chat_model", "hugging_face", "internevo", "xtuner"]


def pattern(shown: str) -> re.Pattern[str]:
    """Return what matches an output: ``...`` is any text of a line, and alone in a line any number of lines."""
    parts = []
    for line in shown.splitlines():
        if line == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*".join(map(re.escape, line.split("..."))) + r"\n")
    return re.compile("".join(parts))


def type_in(folder: Path, commands: str) -> str:
    """Run commands as a shell would, and return what they print."""
    programs = Path(sys.executable).parent
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    finished = subprocess.run(
        ["bash", "-euc", commands],
        cwd=folder,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, commands + finished.stdout[-4000:]
    return finished.stdout


def follow(page: Page, folder: Path) -> None:
    """Write the files and run the commands of a page; compare the output with the block that follows."""
    output = ""
    for block in page.blocks:
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.info == "sh":
            output = type_in(folder, block.text)
        elif block.info == "text":
            shown = pattern(block.text)
            assert shown.fullmatch(output), f"{block.text}\nprinted:\n{output[-4000:]}"
        else:
            assert block.info == "sh no-run", f"{page.name}: {block.info}"


@pytest.mark.timeout(600)
def test_the_tutorials_as_they_are_typed(tmp_path: Path) -> None:
    """Each continues in the folder of the one before it."""
    for name in TUTORIALS:
        follow(Page(DOCS / f"tutorials/{name}.md"), tmp_path)


def test_every_tutorial_is_typed() -> None:
    names = [path.stem for path in (DOCS / "tutorials").glob("*.md")]
    assert {name for name in names if not name.endswith(".zh")} == set(TUTORIALS)
