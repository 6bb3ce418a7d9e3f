"""What a run tells about its own speed, from the command line: the profile, and ranks that lag behind."""

from __future__ import annotations

from pathlib import Path

from tests.support.interpreter import Interpreter
from tests.support.runs import write_run

MORE = "data |= dict(total_steps=8, micro_num=1, empty_cache_and_diag_interval=4, diag_outlier_ratio={ratio})\n"


def test_profile_and_slow_ranks(tmp_path: Path, interpreter: Interpreter) -> None:
    # Of two ranks one is always above their median.
    write_run(tmp_path, MORE.format(ratio=1.0))
    ranks = interpreter.start_ranks(
        ["evomesh", "train", "config.py", "--profile"], 2, cwd=tmp_path
    )
    finished = [rank.wait(120) for rank in ranks]
    assert [one.returncode for one in finished] == [0, 0], "\n".join(
        one.stderr[-2000:] for one in finished
    )
    output = "".join(one.stdout + one.stderr for one in finished)
    assert output.count("is slow:") == 2  # once every four steps
    (folder,) = tmp_path.glob("RUN/*/*/traces")  # of the first data-parallel rank alone
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".txt"]
    assert "communication" in output


def test_a_larger_ratio_names_no_rank(tmp_path: Path, interpreter: Interpreter) -> None:
    write_run(tmp_path, MORE.format(ratio=1e6))
    finished = [
        rank.wait(120)
        for rank in interpreter.start_ranks(
            ["evomesh", "train", "config.py"], 2, cwd=tmp_path
        )
    ]
    assert [one.returncode for one in finished] == [0, 0], "\n".join(
        one.stderr[-2000:] for one in finished
    )
    assert "is slow:" not in "".join(one.stdout + one.stderr for one in finished)
    assert not list(tmp_path.glob("RUN/*/*/traces"))
