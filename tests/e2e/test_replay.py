"""``evomesh replay`` on a real run: equal to the bit, and a figure of the log that was changed is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.interpreter import Interpreter
from tests.support.runs import metrics, write_run


def test_replay(tmp_path: Path, interpreter: Interpreter) -> None:
    write_run(tmp_path, "data |= dict(total_steps=8, valid_every=4)\n")
    done = interpreter.run(["evomesh", "train", "config.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "RUN").glob("*/*")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    logged = (run / "metrics.jsonl").read_text()

    def replay(*options: str, cwd: Path = tmp_path) -> tuple[int, str, str]:
        command = ["evomesh", "replay", str(run), *options]
        result = interpreter.run(command, cwd=cwd)
        return result.returncode, result.stdout, result.stderr

    # 1. From the checkpoint of step 5, from anywhere, and nothing of the run is changed.
    elsewhere = tmp_path.parent
    code, text, errors = replay("--step", "6", cwd=elsewhere)
    assert code == 0, text + errors
    assert "steps 5 to 6 from local:ckpts/step-00000005, on 1 rank" in text
    assert "2 steps equal what was logged, to the bit" in text
    assert (run / "metrics.jsonl").read_text() == logged
    after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert after == before

    # 2. Before the first checkpoint: from the start. One figure of the log is changed.
    rows = metrics(run)
    rows[2]["grad_norm"] *= 1 + 1e-15
    assert rows[2]["grad_norm"] != json.loads(logged.splitlines()[2])["grad_norm"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)
    code, text, errors = replay("--step", "3")
    assert code == 1, text + errors
    assert "steps 0 to 3 from the start of the run" in text
    assert "not equal to the bit, first in step 2" in text
    assert "step 2: grad_norm" in text

    # 3. What cannot be replayed.
    code, _, errors = replay("--step", "8")
    assert code == 2
    assert "the run has not logged step 8" in errors
    shutil.move(run / "history.jsonl", tmp_path / "history.jsonl")
    code, _, errors = replay("--step", "3")
    assert code == 2
    assert "how the run was started is not recorded" in errors
