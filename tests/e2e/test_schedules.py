"""Schedules of real runs: a decay from a step, and a branch that leaves the run it comes from as it is."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import pytest

from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import metrics, tensor_hashes, write_run

WSD = """
lr_scheduler = dict(type="wsd", warmup_steps=2, total_steps=TOTAL, decay_steps=3)
data |= dict(total_steps=TOTAL, valid_every=0)
ckpt["checkpoint_every"] = 4
"""


def train(interpreter: Interpreter, folder: Path, *sets: str, expect: int = 0) -> str:
    options = [word for item in sets for word in ("--set", item)]
    command = ["evomesh", "train", "config.py", *options]
    finished = interpreter.run(command, cwd=folder)
    assert finished.returncode == expect, finished.stderr[-3000:]
    return finished.stdout + finished.stderr


def file_hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def rates(folder: Path) -> dict[int, float]:
    return {row["step"]: row["lr"] for row in metrics(folder) if "loss" in row}


@covers("lr_scheduler.decay_from")
def test_a_branch_decays_in_its_folder_and_leaves_its_parent_alone(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    """It ends as a run does that was as short from the beginning; that one stops and resumes at each border."""
    parent, short = tmp_path / "parent", tmp_path / "short"
    write_run(parent, WSD.replace("TOTAL", "16"))
    train(interpreter, parent)
    before = file_hashes(parent)

    decay = ("lr_scheduler.decay_from=ckpts/8", "lr_scheduler.decay_steps=3")
    refused = train(interpreter, parent, *decay, expect=2)
    assert "ckpt.save_ckpt_folder" in refused and "branches from" in refused
    output = train(interpreter, parent, *decay, "ckpt.save_ckpt_folder=local:branch")
    assert "branching from ckpts/step-00000008" in output
    after = file_hashes(parent)
    assert before.items() <= after.items()
    assert {name for name in after if name.startswith("ckpts")} == {
        name for name in before if name.startswith("ckpts")
    }

    write_run(short, WSD.replace("TOTAL", "11"))
    for border in (2, 8, 11):
        train(interpreter, short, f"data.total_steps={border}")
    assert tensor_hashes(parent / "branch/step-00000011") == tensor_hashes(
        short / "ckpts/step-00000011"
    )
    expected = [0.005, *[0.01] * 8, 0.01 * 2 / 3, 0.01 / 3]
    assert list(rates(short).values()) == pytest.approx(expected)


def test_a_branch_names_the_checkpoint_by_its_step(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(tmp_path, WSD.replace("TOTAL", "8") + 'run_dir = "logs"\n')
    train(interpreter, tmp_path, "data.total_steps=5")
    (tmp_path / "ckpts").rename(tmp_path / "3")
    decay = "lr_scheduler.decay_steps=2"
    refused = train(
        interpreter, tmp_path, "lr_scheduler.decay_from=./3", decay, expect=2
    )
    assert "is step 5" in refused and "not step 3" in refused
    refused = train(
        interpreter, tmp_path, "lr_scheduler.decay_from=3/5", decay, expect=2
    )
    assert "run_dir (logs)" in refused and "branches from" in refused


@covers("ckpt.accept_schedule_change")
def test_a_resume_on_another_curve_says_so_and_waits_to_be_asked(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    cosine = 'data |= dict(total_steps=6, valid_every=0)\nlr_scheduler["total_steps"] = None\n'
    write_run(tmp_path, cosine)
    train(interpreter, tmp_path)
    checkpoints = sorted((tmp_path / "ckpts").iterdir())
    refused = train(interpreter, tmp_path, "data.total_steps=8", expect=2)
    assert "the learning rate jumps at step 6" in refused
    assert "data.total_steps 6 -> 8" in refused
    # No warm-up, since a tenth of 6 and of 8 steps is none; half a cosine of 8 steps.
    now = 0.001 + 0.009 * (1 + math.cos(math.pi * 6 / 8)) / 2
    assert re.search(rf"^ +6 +- +{now:.6g}$", refused, re.M)
    assert "lr_scheduler.total_steps=6" in refused
    assert sorted((tmp_path / "ckpts").iterdir()) == checkpoints

    command = ["evomesh", "train", "config.py", "--accept-schedule-change"]
    accepted = interpreter.run([*command, "--set", "data.total_steps=8"], cwd=tmp_path)
    assert accepted.returncode == 0, accepted.stderr
    assert (
        "the learning rate changes from step 6 on" in accepted.stdout + accepted.stderr
    )
    assert rates(tmp_path)[6] == pytest.approx(now)
