"""A poisoned document in a real run: found, and the run continues as one whose data never had it, to the bit."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.poison import (
    GARBAGE,
    LENGTH,
    POISONED,
    STEP,
    write_poisoned_run,
)
from tests.support.runs import metrics, tensor_hashes

# Of the poisoned document in a run in float64 on one rank.
POISONED_LOSS, POISONED_NORM = 6.916479952080405, 15.5435322517210
SPIKE = "spike = dict(policy={policy!r}, min_steps=8, window=16)\n"


def spike_lines(folder: Path) -> list[dict[str, Any]]:
    """The spikes of the run that a command left below its working folder."""
    return [row for row in all_lines(folder) if row["event"] == "spike"]


def all_lines(folder: Path) -> list[dict[str, Any]]:
    """All lines of it."""
    (path,) = folder.glob("RUN/*/*/spikes.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(
    interpreter: Interpreter, folder: Path, extra: str, *, ranks: int = 1, code: int = 0
) -> str:
    """Train in ``folder``, which is made if need be; return what the ranks printed."""
    folder.mkdir(exist_ok=True)
    write_poisoned_run(folder, extra)
    command = ["evomesh", "train", "config.py"]
    if ranks == 1:
        running = [interpreter.start(command, cwd=folder)]
    else:
        running = interpreter.start_ranks(command, ranks, cwd=folder)
    done = [each.wait(120) for each in running]
    text = "".join(each.stdout + each.stderr for each in done)
    assert [each.returncode for each in done] == [code] * ranks, text
    return text


def state_of(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hashes of all tensors of a checkpoint, and its counters."""
    checkpoint = folder / f"ckpts/step-{step:08d}"
    record = json.loads((checkpoint / "commit.json").read_text())["body"]
    counters = dict(record["state"]["train"])
    del counters["run_folder"]
    return tensor_hashes(checkpoint), counters


def train_without_the_step() -> None:
    """Train on an order of packs from which those of the step are gone, until one step earlier."""
    from evomesh.data.packing.sampler import PackSampler, SamplerPosition
    from evomesh.train.main import run_training

    take = PackSampler.take

    def shortened(self: PackSampler, position: SamplerPosition) -> Any:
        if position.step == STEP:
            _, position = take(self, position)
        return take(self, position)

    PackSampler.take = shortened  # type: ignore[method-assign]
    run_training("config.py", until=STEP + 3)


@covers("spike.policy")
def test_a_run_that_skips_equals_one_without_the_packs(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    # 1. It is found in its step and left out.
    skipping = tmp_path / "skip"
    text = trained(interpreter, skipping, SPIKE.format(policy="skip"))
    (spike,) = spike_lines(skipping)
    assert (spike["step"], spike["action"], spike["applied"]) == (STEP, "skipped", False)  # fmt: skip
    assert spike["left_out"] == [STEP]
    assert f"step {STEP} is a spike: gradient norm" in text

    # The ledger knows: the document was never used.
    row = f"{POISONED[0]}:{POISONED[1]}"
    asked = interpreter.run(
        ["evomesh", "ledger", "RUN", "--document", row], cwd=skipping
    )
    assert asked.returncode == 0, asked.stderr
    (use, count) = asked.stdout.splitlines()
    assert use.startswith(f"step {STEP} rank 0 micro-batch 2 ")
    assert use.endswith("(skipped: spike)")
    assert count == "used in 0 steps, skipped in 1"

    # 2. A run whose config leaves out the step, and one whose order of packs never had it.
    told = tmp_path / "told"
    trained(interpreter, told, f'data["skip_batches"] = "{STEP}"\n')
    assert state_of(skipping, 40) == state_of(told, 40)
    shortened = tmp_path / "shortened"
    shortened.mkdir()
    write_poisoned_run(shortened, "ckpt['checkpoint_every'] = 1\n")
    done = interpreter.run(train_without_the_step, cwd=shortened)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state_of(skipping, 30)[0] == state_of(shortened, STEP + 2)[0]
    without = {row["step"]: row["loss"] for row in metrics(shortened)}
    with_it = {row["step"]: row["loss"] for row in metrics(skipping)}
    assert [with_it[step] for step in (28, 29)] == [without[step] for step in (27, 28)]

    # 3. Killed before a later checkpoint, resumed in the same layout and in others: it stays left out.
    expected = state_of(skipping, 40)
    for step in (30, 35, 40):
        shutil.rmtree(skipping / f"ckpts/step-{step:08d}")
    tensor = tmp_path / "tensor"
    shutil.copytree(skipping, tensor)
    text = trained(interpreter, skipping, SPIKE.format(policy="skip"))
    assert f"step {STEP} is left out" in text
    assert state_of(skipping, 40) == expected
    assert len(spike_lines(skipping)) == 1
    text = trained(
        interpreter,
        tensor,
        SPIKE.format(policy="off") + "parallel = dict(tensor=2)\n",
        ranks=2,
    )
    assert f"step {STEP} is left out" in text
    assert STEP not in [row["step"] for row in metrics(tensor)]
    assert state_of(tensor, 40)[1] == expected[1]
    last = metrics(tensor)[-1]["loss"]
    assert last == pytest.approx(with_it[39], rel=1e-4)


def test_a_run_that_stops_saves_the_state_before_the_spike(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    stopping = tmp_path / "stop"
    extra = SPIKE.format(policy="stop")
    text = trained(interpreter, stopping, extra, code=6)
    assert f"stopped before the update of step {STEP}" in text
    assert [row["action"] for row in spike_lines(stopping)] == ["stopped"]
    undisturbed = tmp_path / "undisturbed"
    trained(interpreter, undisturbed, "ckpt['checkpoint_every'] = 27\n")
    assert state_of(stopping, STEP) == state_of(undisturbed, STEP)
    # The same command stops there again; a run whose config leaves the step out continues.
    trained(interpreter, stopping, extra, code=6)
    trained(interpreter, stopping, extra + f'data["skip_batches"] = "{STEP}"\n')
    assert metrics(stopping)[-1]["step"] == 39


def poison_gradient(step: int, rank: int) -> None:
    """Train with a hook that makes the gradient of a step NaN on one rank."""
    import os

    from evomesh.train import step as step_module
    from evomesh.train.main import run_training

    count = 0
    finish = step_module._LossSums.of_this_rank

    def poisoned(self: Any, grid: Any) -> Any:
        nonlocal count
        sums = finish(self, grid)
        if count == step and int(os.environ.get("RANK", "0")) == rank:
            sums[0] = float("nan")
        count += 1
        return sums

    step_module._LossSums.of_this_rank = poisoned  # type: ignore[method-assign]
    run_training("config.py")


def test_nan_on_one_rank_is_left_out_by_all(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    extra = SPIKE.format(policy="skip") + "data |= dict(total_steps=10, micro_num=2)\n"
    write_poisoned_run(tmp_path, extra)
    command = partial(poison_gradient, 6, 1)
    running = interpreter.start_ranks(command, 2, cwd=tmp_path)
    done = [each.wait(120) for each in running]
    text = "".join(each.stdout + each.stderr for each in done)
    assert [each.returncode for each in done] == [0, 0], text
    (spike,) = spike_lines(tmp_path)
    assert (spike["step"], spike["what"], spike["loss"]) == (6, ["loss"], "NaN")
    plain = tmp_path / "plain"
    trained(interpreter, plain, extra + "data['skip_batches'] = '6'\n", ranks=2)
    assert state_of(tmp_path, 10) == state_of(plain, 10)


LAYOUTS = {
    "dp2": "data['micro_num'] = 2\n",
    "tp2": "parallel = dict(tensor=dict(size=2, mode='msp'))\n",
    "pp2": "parallel = dict(pipeline=2)\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rollback_equals_a_run_without_the_packs(
    tmp_path: Path, interpreter: Interpreter, layout: str
) -> None:
    """Back to step 25, on without the packs: the document is named, and the result is that of a run without them."""
    back = tmp_path / "back"
    extra = LAYOUTS[layout] + "model |= dict(dtype='torch.float64')\n"
    text = trained(
        interpreter, back, extra + SPIKE.format(policy="rollback_and_skip"), ranks=2
    )
    assert "resuming step 25" in text
    rows = all_lines(back)
    assert [row["event"] for row in rows] == ["spike", "court", "rollback"]
    assert (rows[2]["step"], rows[2]["to"], rows[2]["left_out"]) == (STEP, 25, [STEP])
    found = rows[1]["micro_batches"][0]
    (document,) = found["documents"]
    assert (document["file"], document["row"]) == POISONED
    assert document["ids"] == (GARBAGE * LENGTH)[:LENGTH]
    # Micro-batch 2 of a single rank; the same figures in every layout.
    place = (found["rank"], found["micro_batch"])
    assert place == ((0, 1) if layout == "dp2" else (0, 2))
    assert found["loss"] == pytest.approx(POISONED_LOSS, rel=1e-10)
    assert found["grad_norm"] == pytest.approx(POISONED_NORM, rel=1e-10)
    assert found["suspicion"] > 50
    embedding = rows[1]["layers"][0]
    assert embedding["layer"] == "embedding"
    assert embedding["grad_norm_ratio"] > 100
    assert len(rows[1]["micro_batches"]) == 4
    assert sorted(layer["layer"] for layer in rows[1]["layers"]) == [
        "embedding", "head", "layers.0", "layers.1", "norm",
    ]  # fmt: skip
    plain = tmp_path / "plain"
    trained(interpreter, plain, extra + f"data['skip_batches'] = '{STEP}'\n", ranks=2)
    assert state_of(back, 40) == state_of(plain, 40)
    steps = [row["step"] for row in metrics(back)]
    assert steps == [step for step in range(40) if step != STEP]


def test_a_rollback_takes_earlier_steps_along_and_leaves_no_way_back(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    extra = "spike = dict(policy='rollback_and_skip', min_steps=8, window=16, skip_before=4)\n"
    back = tmp_path / "back"
    text = trained(interpreter, back, extra)
    # The checkpoint of step 25 has been trained on steps 23 and 24.
    assert "it was trained on step 23" in text
    assert "resuming step 20" in text
    assert all_lines(back)[-1]["left_out"] == [23, 24, 25, 26, 27]
    plain = tmp_path / "plain"
    trained(interpreter, plain, f"data['skip_batches'] = '23-{STEP}'\n")
    expected = state_of(plain, 40)
    assert state_of(back, 40) == expected
    # Without what was saved since, as if it had been killed right after it went back.
    for step in (25, 30, 35, 40):
        shutil.rmtree(back / f"ckpts/step-{step:08d}")
    trained(interpreter, back, extra)
    assert state_of(back, 40) == expected
    assert [row["event"] for row in all_lines(back)] == ["spike", "court", "rollback"]
