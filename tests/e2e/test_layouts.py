"""The training command in several layouts: each prints and records the losses of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.covers import covers
from tests.support.interpreter import Finished, Interpreter, free_port
from tests.support.runs import losses, metrics, write_run
from tests.support.tolerances import FLOAT32_RUN

pytestmark = covers("promise:interleaved")

ROOT = Path(__file__).parents[2]
# Optimizer steps, and packs in each of them over all data-parallel ranks.
STEPS, PACKS = (4, 8)
EXTRA = """
data |= dict(total_steps=4, valid_every=4, micro_num={micro_num})
parallel = dict({parallel})
model |= dict(num_layers=4, vocab_size=4096)
"""

# name -> (parallel section, data-parallel ranks of 4, more of the config)
LAYOUTS = {
    "zero1 over 2 of 4": ("zero1=2", 4, ""),
    "weights over 4 (fsdp)": ("zero1=dict(size=4, fsdp=True)", 4, ""),
    "mtp 2": ("tensor=2", 2, ""),
    "msp 2, zero1 off": ('tensor=dict(size=2, mode="msp"), zero1=1', 2, ""),
    "fsp 2, recompute": (
        'tensor=dict(size=2, mode="fsp")',
        2,
        'model["checkpoint"] = 0.5\n',
    ),
    "isp 2, weights over 4, overlap": (
        'tensor=dict(size=2, mode="isp"), weight=dict(size=4, overlap=True)',
        2,
        "",
    ),
    "isp 2, weights over 2, zero1 2": (
        'tensor=dict(size=2, mode="isp"), weight=dict(size=2), zero1=2',
        2,
        "",
    ),
    "1F1B 2": ("pipeline=2", 2, ""),
    "1F1B 2, mtp 2": ("pipeline=2, tensor=2", 1, ""),
    "interleaved 2, msp 2": (
        'pipeline=2, tensor=dict(size=2, mode="msp")',
        1,
        "model |= dict(num_chunks=2)\n",
    ),
    "isp 2 over 2 stages": (
        'pipeline=2, tensor=dict(size=2, mode="isp"), weight=dict(size=2)',
        1,
        "",
    ),
    "zbv 2": (
        'pipeline=dict(size=2, schedule="zbv")',
        2,
        "model |= dict(num_chunks=2)\n",
    ),
}


def write(folder: Path, parallel: str, data_ranks: int, more: str) -> None:
    write_run(
        folder,
        EXTRA.format(micro_num=PACKS // data_ranks, parallel=parallel) + more,
    )


def printed(finished: Finished) -> dict[int, float]:
    """Losses by step, as the log has them."""
    lines = re.findall(r"step=(\d+),loss=([\d.]+),", finished.stdout + finished.stderr)
    return {int(step): float(loss) for step, loss in lines}


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter
) -> Iterator[tuple[dict[int, float], float]]:
    """Losses and validation loss of one process."""
    folder = tmp_path_factory.mktemp("one")
    write(folder, "", 1, "")
    finished = interpreter.run(["evomesh", "train", "config.py"], cwd=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    yield losses(folder), metrics(folder)[-1]["val/en_loss"]


@covers(
    "model.num_chunks",
    "parallel.tensor",
    "parallel.tensor.size",
    "parallel.tensor.mode",
    "parallel.sequence_parallel",
    "parallel.pipeline",
    "parallel.pipeline.size",
    "parallel.weight",
    "parallel.weight.size",
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(
    name: str,
    tmp_path: Path,
    interpreter: Interpreter,
    reference: tuple[dict[int, float], float],
) -> None:
    write(tmp_path, *LAYOUTS[name])
    # With torchrun's variables.
    command = [str(ROOT / "train.py"), "--config", "config.py", "--launcher", "torch"]
    ranks = interpreter.start_ranks(command, 4, cwd=tmp_path)
    finished = [rank.wait(120) for rank in ranks]
    assert [one.returncode for one in finished] == [0] * 4, "\n".join(
        one.stderr[-2000:] for one in finished
    )
    expected, validation = reference
    found = losses(tmp_path)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=FLOAT32_RUN), f"step {step}"
    # By one rank alone.
    assert [log for one in finished if (log := printed(one))] == [found]
    assert metrics(tmp_path)[-1]["val/en_loss"] == pytest.approx(
        validation, rel=FLOAT32_RUN
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("mtp 2", "isp 2, weights over 4, overlap"),
        ("isp 2, weights over 2, zero1 2", "zbv 2"),
        ("weights over 4 (fsdp)", "1F1B 2, mtp 2"),
    ],
)
def test_a_run_goes_on_in_another_layout(
    first: str,
    second: str,
    tmp_path: Path,
    interpreter: Interpreter,
    reference: tuple[dict[int, float], float],
) -> None:
    for name, stop in ((first, "data.total_steps=2"), (second, "data.total_steps=4")):
        write(tmp_path, *LAYOUTS[name])
        command = ["evomesh", "train", "config.py", "--set", stop]
        for finished in [
            rank.wait(120) for rank in interpreter.start_ranks(command, 4, cwd=tmp_path)
        ]:
            assert finished.returncode == 0, finished.stderr[-2000:]
    assert losses(tmp_path) == {
        step: pytest.approx(loss, rel=FLOAT32_RUN)
        for step, loss in reference[0].items()
    }


def test_ramp_up_in_an_interleaved_pipeline(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    """Each number of micro-batches has its own schedule over the same stages."""
    more = 'model |= dict(num_chunks=2)\ndata |= dict(micro_num=6, rampup_batch_size="2 2 2", total_steps=6)\n'
    for name, parallel, ranks in (("one", "", 1), ("two", "pipeline=2", 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, parallel, 1, more)
        running = interpreter.start_ranks(
            ["evomesh", "train", "config.py"], ranks, cwd=tmp_path / name
        )
        for one in [rank.wait(120) for rank in running]:
            assert one.returncode == 0, one.stderr[-2000:]
    assert [row["micro_num"] for row in metrics(tmp_path / "two") if "loss" in row] == [
        2,
        2,
        4,
        4,
        6,
        6,
    ]
    expected = {
        step: pytest.approx(loss, rel=FLOAT32_RUN)
        for step, loss in losses(tmp_path / "one").items()
    }
    assert losses(tmp_path / "two") == expected


def test_deepspeed_flag(
    tmp_path: Path,
    interpreter: Interpreter,
    reference: tuple[dict[int, float], float],
) -> None:
    write(tmp_path, "", 2, "")
    command = [
        "evomesh",
        "train",
        "config.py",
        "--deepspeed",
        "deepspeed_zero3",
        "--work-dir",
        "work_dirs/here",
    ]
    finished = [
        rank.wait(120) for rank in interpreter.start_ranks(command, 2, cwd=tmp_path)
    ]
    assert [one.returncode for one in finished] == [0] * 2, finished[0].stderr[-2000:]
    assert (
        "".join(one.stdout + one.stderr for one in finished).count(
            "--deepspeed deepspeed_zero3: "
        )
        == 1
    )
    found = losses(tmp_path / "work_dirs/here")
    assert found == {
        step: pytest.approx(loss, rel=FLOAT32_RUN)
        for step, loss in reference[0].items()
    }


@covers("promise:torchrun")
def test_torchrun(tmp_path: Path, reference: tuple[dict[int, float], float]) -> None:
    """Run the torchrun command of InternEvo's guide with four real processes."""
    write(tmp_path, 'tensor=dict(size=2, mode="fsp"), pipeline=2', 1, "")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=4",
    ]
    command += [str(ROOT / "train.py"), "--config", "config.py", "--launcher", "torch"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        command,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-3000:]
    printed = dict(re.findall(r"step=(\d+),loss=([\d.]+),", output))
    assert {
        int(step): pytest.approx(float(loss), rel=FLOAT32_RUN)
        for step, loss in printed.items()
    } == reference[0]
    assert (
        "data parallel size: 1, pipeline parallel size: 2, tensor parallel size: 2"
        in output
    )
    for tp in range(2):
        for pp in range(2):
            assert f"tp:{tp},pp={pp},dp=0====" in output


@covers("promise:srun")
def test_srun(
    tmp_path: Path,
    interpreter: Interpreter,
    reference: tuple[dict[int, float], float],
) -> None:
    """Run the srun command of InternEvo's guide: two tasks on one node, each with the variables that srun sets."""
    write(tmp_path, "tensor=2", 1, "")
    command = [
        str(ROOT / "train.py"),
        "--config",
        "config.py",
        "--port",
        str(free_port()),
    ]
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_NPROCS": "2",
        "SLURM_JOB_NODELIST": "localhost",
    }
    tasks = [
        interpreter.start(
            command,
            cwd=tmp_path,
            env=step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    ]
    finished = [task.wait(120) for task in tasks]
    assert [one.returncode for one in finished] == [0, 0], "\n".join(
        one.stderr[-2000:] for one in finished
    )
    assert "tensor parallel size: 2" in finished[0].stdout + finished[0].stderr
    assert losses(tmp_path) == {
        step: pytest.approx(loss, rel=FLOAT32_RUN)
        for step, loss in reference[0].items()
    }


def test_nproc_per_node_starts_its_ranks(
    tmp_path: Path, reference: tuple[dict[int, float], float]
) -> None:
    write(tmp_path, "", 2, "")
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "NPROC_PER_NODE": "2",
    }
    command = [sys.executable, str(ROOT / "train.py"), "--config", "config.py"]
    finished = subprocess.run(
        command,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    assert (
        "data parallel size: 2, pipeline parallel size: 1, tensor parallel size: 1"
        in finished.stdout + finished.stderr
    )
    assert losses(tmp_path) == {
        step: pytest.approx(loss, rel=FLOAT32_RUN)
        for step, loss in reference[0].items()
    }


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("tensor=3", "3 does not divide num_attention_heads=4"),
        (
            "tensor=2, pipeline=4",
            "4 processes cannot be divided by pipeline.size * tensor.size = 8",
        ),
        ("zero1=3", "3 does not divide the 4 data-parallel ranks"),
    ],
)
def test_impossible_layouts_are_one_message(
    parallel: str, message: str, tmp_path: Path, interpreter: Interpreter
) -> None:
    write(tmp_path, parallel, 1, "")
    ranks = interpreter.start_ranks(["evomesh", "train", "config.py"], 4, cwd=tmp_path)
    finished = [rank.wait(60) for rank in ranks]
    assert [rank.returncode for rank in finished] == [2] * 4
    # One rank speaks for all.
    assert [rank.stderr.count(message) for rank in finished if rank.stderr] == [1]
    assert not any("Traceback" in rank.stderr for rank in finished)
    assert not (tmp_path / "RUN").exists()
