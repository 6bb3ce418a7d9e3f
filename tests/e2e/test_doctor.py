"""``evomesh doctor`` as a user starts it: alone, and as the ranks of a job."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from evomesh.errors import EXIT_RESTART
from tests.support.interpreter import Interpreter
from tests.support.runs import write_run

TENSOR = "parallel = dict(tensor=2)\n"


def test_machines_alone(interpreter: Interpreter, tmp_path: Path) -> None:
    finished = interpreter.run(["evomesh", "doctor"], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0].split()[:2] == ["ok", "versions"]
    assert "failed" in lines[-1] and "parity" not in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_config_on_two_ranks(interpreter: Interpreter, tmp_path: Path) -> None:
    write_run(tmp_path, TENSOR)
    before = sorted(tmp_path.rglob("*"))
    command = ["evomesh", "doctor", "config.py", "--json"]
    ranks = interpreter.start_ranks(command, 2, cwd=tmp_path)
    first, second = [rank.wait() for rank in ranks]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert second.stdout == ""
    document = json.loads(first.stdout)
    assert document["ranks"] == 2
    checks = {check["check"]: check for check in document["checks"]}
    wanted = {"versions", "clocks", "open files", "ports", "axis tp", "config"}
    wanted |= {"save folder", "disk space", "disk rates", "train data", "data"}
    assert wanted | {"parity"} <= set(checks)
    assert not [check for check in checks.values() if check["status"] == "fail"]
    assert "float32" in checks["parity"]["found"]
    assert sorted(tmp_path.rglob("*")) == before


def doctor_with_a_broken_sum() -> None:
    """The command, with a module of the layout whose ranks do not add up."""
    from evomesh.cli.main import main
    from evomesh.diagnose.parity import observe
    from tests.dist.parity_jobs import broken_builder, skip_reduction

    build = broken_builder("layers.1.feed_forward.w2", skip_reduction)
    sys.argv = ["evomesh", "doctor", "config.py"]
    with patch.object(observe, "build_stages", build):
        main()


def test_a_broken_reduction_fails_and_is_named(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    write_run(tmp_path, TENSOR)
    ranks = interpreter.start_ranks(doctor_with_a_broken_sum, 2, cwd=tmp_path)
    first, second = [rank.wait() for rank in ranks]
    assert (first.returncode, second.returncode) == (1, 1), first.stderr
    (line,) = [line for line in first.stdout.splitlines() if line.startswith("fail")]
    assert "layers.1.feed_forward.w2 (output, in forward)" in line
    assert second.stdout == ""


def doctor_with_a_rank_that_is_killed() -> None:
    """The command; rank 1 is killed while the layout is compared with one process."""
    from evomesh.cli.main import main
    from evomesh.diagnose.parity import observe

    def killed(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["evomesh", "doctor", "config.py"]
    if os.environ["RANK"] == "1":
        observe.build_stages = killed
    main()


def test_a_rank_that_is_killed_is_named_and_ends_the_check(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    write_run(tmp_path, TENSOR)
    ranks = interpreter.start_ranks(doctor_with_a_rank_that_is_killed, 2, cwd=tmp_path)
    first, second = [rank.wait() for rank in ranks]
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == EXIT_RESTART, first.stderr
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("error")]
    assert "rank 1 on" in line and "lost" in line
    assert "Traceback" not in first.stderr and "frame #" not in first.stderr


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("modle = dict()\n", "modle"),
        ("parallel = dict(pipeline=2)\n", "1 process cannot be divided"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_message(
    interpreter: Interpreter, tmp_path: Path, extra: str, words: str
) -> None:
    write_run(tmp_path, extra)
    finished = interpreter.run(["evomesh", "doctor", "config.py"], cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert words in finished.stderr and finished.stderr.count("error:") == 1


def test_layouts_are_compared_one_after_the_other(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    write_run(tmp_path)
    command = ["evomesh", "parity", "config.py", "--json"]
    command += ["--layouts", "tensor=2,mode=isp,weight=2", "zero1=2,fsdp=True"]
    ranks = interpreter.start_ranks(command, 2, cwd=tmp_path)
    first, second = [rank.wait() for rank in ranks]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    checks = json.loads(first.stdout)["checks"]
    names = [check["check"] for check in checks]
    assert names == [command[-2]] * 2 + [command[-1]] * 2  # in float64 and in float32
    assert all(check["status"] == "ok" for check in checks)
