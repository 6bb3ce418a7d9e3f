"""What a run tells about its own speed, from the command line: the profile, and ranks that lag behind."""

from __future__ import annotations

from pathlib import Path

from tests.support.interpreter import Interpreter
from tests.support.runs import losses, write_run

MORE = """
data |= dict(total_steps=8, micro_num=1)
data |= dict(empty_cache_and_diag_interval={interval}, diag_outlier_ratio={ratio})
"""


def run(
    folder: Path, interpreter: Interpreter, more: str, *options: str
) -> tuple[str, list[Path]]:
    """Train on two ranks; return what they printed and the files of profiles."""
    folder.mkdir()
    write_run(folder, more)
    ranks = interpreter.start_ranks(
        ["evomesh", "train", "config.py", *options], 2, cwd=folder
    )
    finished = [rank.wait(120) for rank in ranks]
    assert [one.returncode for one in finished] == [0, 0], "\n".join(
        one.stderr[-2000:] for one in finished
    )
    output = "".join(one.stdout + one.stderr for one in finished)
    return output, sorted(folder.glob("RUN/*/*/traces/*"))


def test_profile_and_slow_ranks(tmp_path: Path, interpreter: Interpreter) -> None:
    # Of two ranks one is always above their median.
    slow = MORE.format(interval=4, ratio=1.0)
    output, traces = run(tmp_path / "slow", interpreter, slow, "--profile")
    assert output.count("is slow:") == 2  # once every four steps
    # Of the first data-parallel rank alone.
    assert sorted(path.suffix for path in traces) == [".json", ".txt"]
    assert "communication" in output

    # A larger ratio names no rank. A diagnosis after each step changes no bit, nor does
    # a profile of memory.
    often = MORE.format(interval=1, ratio=1e6)
    output, traces = run(tmp_path / "often", interpreter, often, "--memory-profile")
    assert "is slow:" not in output
    assert traces == []
    memory = sorted((tmp_path / "often").glob("RUN/*/*/memory/*.jsonl"))
    rows = [len(path.read_text().splitlines()) for path in memory]
    assert rows == [8, 8]  # each step of each rank
    assert losses(tmp_path / "slow") == losses(tmp_path / "often")
