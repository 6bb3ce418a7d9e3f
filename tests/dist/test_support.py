"""The harness itself: a test that cannot fail proves nothing."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from evomesh.parallel.collectives import all_reduce_no_grad
from tests.support.golden import write_bin
from tests.support.interpreter import Interpreter
from tests.support.pool import Pool, RankError, grid_of


def total(rank: int, offset: int, ranks: int) -> int:
    return int(
        all_reduce_no_grad(torch.tensor(rank + offset), grid_of(tensor=ranks).tp)
    )


def fail_on_one(rank: int) -> None:
    if rank == 2:
        raise ValueError("this rank has a reason")
    all_reduce_no_grad(torch.zeros(1), grid_of(tensor=4).tp)


def die_on_one(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hang(rank: int) -> None:
    if rank == 0:
        all_reduce_no_grad(torch.zeros(1), grid_of(tensor=4).tp)


def test_pool_runs_on_all_or_on_some(pool: Pool) -> None:
    assert pool.run(total, 10, 4) == [46] * 4
    assert pool.run(total, 10, 2, ranks=2) == [21] * 2


def test_pool_shows_the_failing_rank_and_starts_again(pool: Pool) -> None:
    with pytest.raises(RankError, match="this rank has a reason"):
        pool.run(fail_on_one)
    assert pool.run(total, 0, 4) == [6] * 4
    with pytest.raises(RankError, match=r"rank 1: died with exit code -9"):
        pool.run(die_on_one)
    with pytest.raises(RankError, match=r"rank 0: no answer"):
        pool.run(hang, timeout=1)
    assert pool.run(total, 0, 4) == [6] * 4


def test_interpreter_runs_a_script(interpreter: Interpreter, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\nprint(sys.argv[1], os.environ['X'], os.getcwd())\nsys.exit(3)\n"
    )
    finished = interpreter.run(
        [str(script), "argument"], env={"X": "value"}, cwd=tmp_path
    )
    assert (finished.returncode, finished.stdout) == (3, f"argument value {tmp_path}\n")


def test_interpreter_shows_a_traceback(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('the reason')\n")
    finished = interpreter.run([str(script)])
    assert finished.returncode == 1
    assert "ValueError: the reason" in finished.stderr


def test_interpreter_can_be_killed_at_a_moment(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfor i in range(1000):\n    print(f'step={i},', flush=True)\n    time.sleep(0.01)\n"
    )
    running = interpreter.start([str(script)])
    running.wait_for("step=3,")
    running.signal(signal.SIGKILL)
    assert running.wait().returncode == -signal.SIGKILL
    assert "step=999," not in running.stdout


def test_interpreter_starts_with_torch_imported(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint(sys.modules.keys() >= {'torch.distributed.fsdp', 'evomesh.cli.main'})\n"
    )
    assert interpreter.run([str(script)]).stdout == "True\n"


def test_write_bin_reproduces_the_documents_offsets(tmp_path: Path) -> None:
    import numpy as np

    path = write_bin(tmp_path / "x.bin", [[1] * 11, [22] * 15, []])
    assert (
        path.read_text().splitlines()[0]
        == '{"tokens": [' + ", ".join(["1"] * 11) + "]}"
    )
    meta = np.load(f"{path}.meta")
    assert meta.dtype == np.int64
    first = len('{"tokens": []}\n') + 11 + 2 * 10
    assert meta.tolist() == [[0, 11], [first, 15], [first + 15 + 15 * 2 + 2 * 14, 0]]
    assert sys.version_info >= (3, 11)
