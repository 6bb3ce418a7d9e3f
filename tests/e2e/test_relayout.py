"""One run through changing layouts and a kill: one loss curve, that of a single process that never stopped."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import losses, write_run

STEPS, PACKS = 20, 4
COMMON = """
model |= dict(num_layers=4, dtype="torch.float64")
data |= dict(total_steps={steps}, micro_num={micro})
lr_scheduler["total_steps"] = 20
ckpt |= dict(checkpoint_every=2)
parallel = dict({parallel})
"""


# Steps 0 to 3, 4 to 8 and the rest.
STAGES = """
data["stages"] = [
    dict(until=4, seq_len=16, micro_num={half}),
    dict(until_tokens=1536),
    dict(dataset_weights={{"en/": 3, "code/": 1}}),
]
"""


RECIPES = {
    "adamw-cosine": "",
    "muon-wsd": """
optimizer = dict(type="muon")
lr_scheduler |= dict(type="wsd", warmup_steps=2, decay_steps=7)
""",
}


def write(
    folder: Path,
    parallel: str,
    data_ranks: int,
    steps: int = STEPS,
    recipe: str = "adamw-cosine",
) -> None:
    micro = PACKS // data_ranks
    text = COMMON.format(steps=steps, micro=micro, parallel=parallel)
    write_run(folder, text + STAGES.format(half=micro // 2) + RECIPES[recipe])


def run(interpreter: Interpreter, folder: Path, ranks: int) -> str:
    command = ["evomesh", "train", "config.py"]
    running = (
        interpreter.start_ranks(command, ranks, cwd=folder)
        if ranks > 1
        else [interpreter.start(command, cwd=folder)]
    )
    finished = [one.wait(200) for one in running]
    assert [one.returncode for one in finished] == [0] * ranks, "\n".join(
        one.stderr[-2000:] for one in finished
    )
    return "".join(one.stdout + one.stderr for one in finished)


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_resumed_in_other_layouts(
    recipe: str, tmp_path: Path, interpreter: Interpreter
) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    write(straight, "", 1, STEPS, recipe)
    run(interpreter, straight, 1)

    write(moved, "tensor=2, pipeline=2", 1, STEPS, recipe)
    running = interpreter.start_ranks(["evomesh", "train", "config.py"], 4, cwd=moved)
    running[2].wait_for("step=5,", timeout=120)  # the last stage prints
    running[1].signal(signal.SIGKILL)
    for one in running:
        one.kill()
    write(moved, "", 1, 11, recipe)
    assert "resuming step" in run(interpreter, moved, 1)
    write(moved, "zero1=2", 2, 14, recipe)
    assert "resuming step 11" in run(interpreter, moved, 2)
    isp = 'tensor=dict(size=2, mode="isp"), weight=dict(size=4)'
    write(moved, isp, 2, 17, recipe)
    assert "resuming step 14" in run(interpreter, moved, 4)
    write(moved, "", 1, STEPS, recipe)
    assert "resuming step 17" in run(interpreter, moved, 1)

    expected, found = losses(straight), losses(moved)
    assert found.keys() == expected.keys() == set(range(STEPS))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-10), f"step {step}"


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(
        tmp_path,
        COMMON.format(steps=2000, micro=PACKS // 2, parallel="zero1=2").replace(
            "checkpoint_every=2", ""
        ),
    )
    running = interpreter.start_ranks(
        ["evomesh", "train", "config.py"], 2, cwd=tmp_path
    )
    running[0].wait_for("step=3,", timeout=120)
    running[1].signal(signal.SIGTERM)
    assert [one.wait(60).returncode for one in running] == [75, 75]
    last = max(losses(tmp_path))
    assert (tmp_path / f"ckpts/step-{last + 1:08d}/commit.json").exists()


def long_steps(folder: Path, parallel: str, data_ranks: int) -> None:
    more = 'ckpt["checkpoint_every"] = 50\n'
    write_run(
        folder, COMMON.format(steps=5, micro=48 // data_ranks, parallel=parallel) + more
    )


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter
) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    long_steps(folder, "", 1)
    run(interpreter, folder, 1)
    return losses(folder)


@pytest.mark.parametrize(
    ("parallel", "ranks", "data_ranks"),
    [
        ("zero1=2", 2, 2),
        ('tensor=dict(size=2, mode="isp"), weight=dict(size=4)', 4, 2),
        ("zero1=dict(size=2, fsdp=True), tensor=2", 4, 2),
        # Stages are never between the same two micro-batches: the step is finished, and
        # the next one too if the other stage has begun it when the signal is seen.
        ("pipeline=2", 2, 1),
    ],
)
def test_a_signal_to_one_rank_breaks_a_long_step_off_on_all(
    parallel: str,
    ranks: int,
    data_ranks: int,
    tmp_path: Path,
    interpreter: Interpreter,
    uninterrupted: dict[int, float],
) -> None:
    long_steps(tmp_path, parallel, data_ranks)
    running = interpreter.start_ranks(
        ["evomesh", "train", "config.py"], ranks, cwd=tmp_path
    )
    # The first rank of the last stage.
    speaker = running[1 if "pipeline" in parallel else 0]
    speaker.wait_for("step=0,", timeout=120)
    started = time.monotonic()
    speaker.wait_for("step=1,", timeout=120)
    # Early in the next step: a rank that is ahead of the others decides how late all stop,
    # and on a busy machine it may be most of a step ahead.
    time.sleep(0.1 * (time.monotonic() - started))
    running[1].signal(signal.SIGTERM)
    finished = [one.wait(60) for one in running]
    assert [one.returncode for one in finished] == [75] * ranks, finished[0].stderr[
        -2000:
    ]
    output = "".join(one.stdout + one.stderr for one in finished)
    off = re.search(r"step (\d) was interrupted between micro-batches", output)
    assert (off is None) == ("pipeline" in parallel), output[-3000:]
    assert set(losses(tmp_path)) == set(
        range(int(off[1]) if off else max(losses(tmp_path)) + 1)
    )
    run(interpreter, tmp_path, ranks)
    assert losses(tmp_path) == {
        step: pytest.approx(loss, rel=1e-10) for step, loss in uninterrupted.items()
    }


@covers("ckpt.stop_file_path")
def test_the_stop_file(tmp_path: Path, interpreter: Interpreter) -> None:
    write(tmp_path, "", 1)
    with (tmp_path / "config.py").open("a") as file:
        file.write(
            'ckpt |= dict(stop_file_path="control/stop", checkpoint_every=1000)\n'
        )
    (tmp_path / "control").mkdir()
    (tmp_path / "control/stop").write_text("7")
    assert "stopped by the stop file after 7 steps" in run(interpreter, tmp_path, 1)
    assert (tmp_path / "ckpts/step-00000007/commit.json").exists()
    (tmp_path / "control/stop").write_text("-9")
    run(interpreter, tmp_path, 1)
    assert sorted(p.name for p in tmp_path.glob("ckpts/step-*")) == [
        f"step-{n:08d}" for n in (7, 9, STEPS)
    ]


def test_a_crash_says_which_checkpoint_a_restart_uses(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write(tmp_path, "", 1)
    with (tmp_path / "config.py").open("a") as file:
        file.write("max_consecutive_skips = 1\n")
        file.write(
            'model["dtype"] = "torch.float16"\n'
            "grad_scaler = dict(fp16=dict(initial_scale=2.0**60), max_scale=2.0**60)\n"
        )
    finished = interpreter.run(["evomesh", "train", "config.py"], cwd=tmp_path)
    assert finished.returncode == 6
    assert "a restart begins from scratch" in finished.stdout + finished.stderr
