"""Real Slurm with two virtual nodes: the guides' srun line, and the scripts in launch/ while ranks and nodes are lost.

All cases share one cluster. A start of a rank costs seconds, so one job goes through all that can end a life of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.support import slurm
from tests.support.interpreter import Interpreter
from tests.support.runs import write_run
from tests.support.slurm import ROOT, Cluster, wait_until
from tests.support.xtuner import TINY_MODEL, token_files, write_config

pytestmark = [
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()),
    pytest.mark.xdist_group("slurm"),
]
STEPS = 12
CONFIG = f"""
model |= dict(num_layers=1, hidden_size=16, num_attention_heads=2, num_kv_attention_heads=1)
data["total_steps"] = lr_scheduler["total_steps"] = {STEPS}
ckpt["checkpoint_every"] = 2
"""
# In the first lives of a job its last data-parallel rank waits, before step 3, 6 or 9, until it is stopped or
# killed; the others wait for it in a collective. Some of Slurm's clocks tick every 30 s, and the watchdog is faster.
PAUSES = """
monitor = dict(watchdog=dict(enable=False))
import os, time
from evomesh.train.signals import StopRequest
from evomesh.train.trainer import Trainer
def _step_or_pause(trainer, poll, step=Trainer._one_step, lives={lives}):
    life = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    dp = trainer.run.grid.dp
    if life < lives and trainer.state.step == 3 * (life + 1) and dp.rank == dp.size - 1:
        print("pause in life", life, flush=True)
        while StopRequest.installed().signal is None:
            time.sleep(0.05)
    step(trainer, poll)
Trainer._one_step = _step_or_pause
"""
LAUNCH = ROOT / "launch/slurm"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm.cluster() as started:
        yield started


def rows(folder: Path) -> dict[int, str]:
    """Step -> loss and norm as they stand in the metrics; a step that was repeated after a crash must be bit-equal."""
    found: dict[int, str] = {}
    for path in folder.glob("RUN/**/metrics.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            text = f"{row['loss']!r} {row['grad_norm']!r}"
            assert found.setdefault(row["step"], text) == text, f"step {row['step']}"
    return found


class Reference:
    """The run without Slurm and without a stop, once for each number of ranks."""

    def __init__(self, interpreter: Interpreter, folder: Path) -> None:
        self._interpreter, self._folder = interpreter, folder

    def rows(self, ranks: int) -> dict[int, str]:
        folder = self._folder / f"{ranks}-ranks"
        if not folder.exists():
            write_run(folder, CONFIG)
            self.start(["evomesh", "train", "config.py"], ranks, folder)
        return rows(folder)

    def start(self, command: list[str], ranks: int, folder: Path) -> None:
        """Run a command on ranks that torchrun would start."""
        for rank in self._interpreter.start_ranks(command, ranks, cwd=folder):
            assert rank.wait(60).returncode == 0, rank.stderr[-2000:]


@pytest.fixture(scope="module")
def alone(
    interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    return Reference(interpreter, tmp_path_factory.mktemp("alone"))


class Job:
    """A submitted script of launch/slurm, and its output over all its lives."""

    def __init__(
        self, cluster: Cluster, folder: Path, script: str, *options: str
    ) -> None:
        self.cluster, self.folder = cluster, folder
        self._hastened = {"PENDING 0"}
        command = ["sbatch", "--parsable", *options, str(LAUNCH / script), "config.py"]
        self.number = cluster.call(*command, cwd=folder)

    @property
    def text(self) -> str:
        return "".join(
            path.read_text() for path in self.folder.glob(f"*-{self.number}.out")
        )

    @property
    def state(self) -> str:
        return self.cluster.state(self.number)

    def start_soon(self) -> None:
        """Hasten a job that is queued again, once each time."""
        state = self.state
        if state.startswith("PENDING") and state not in self._hastened:
            self._hastened.add(state)
            self.cluster.start_soon(self.number)

    def update(self, setting: str) -> None:
        self.cluster.call("scontrol", "update", f"JobId={self.number}", setting)

    def wait_for_pause(self, life: int) -> None:
        def paused() -> bool:
            assert not self.state.startswith(("FAILED", "COMPLETED")), self.text[-3000:]
            self.start_soon()
            return f"pause in life {life}" in self.text

        wait_until(paused, lambda: f"no life {life}: {self.text[-3000:]}")

    def wait_for_state(self, state: str) -> None:
        def there() -> bool:
            return self.state == state

        wait_until(there, lambda: f"{self.state}, not {state}\n{self.text[-3000:]}")


def test_a_rank_and_a_node_are_lost(
    cluster: Cluster, alone: Reference, tmp_path: Path
) -> None:
    expected = alone.rows(2)
    write_run(tmp_path, CONFIG + PAUSES.format(lives=2))
    job = Job(cluster, tmp_path, "many_nodes.sh", *TWO_NODES)
    job.wait_for_pause(0)
    (rank,) = cluster.tasks(job.number, "n2")
    os.kill(rank, signal.SIGKILL)
    job.wait_for_pause(1)
    # The rank that was left has named the other, and the script has asked for the new life.
    assert "rank 1 on " in job.text and " is lost" in job.text
    assert f"srun ended with 137: job {job.number} is queued again" in job.text
    # With the node of the batch script: nobody but Slurm can queue the job again.
    cluster.kill_node(job.number, "n1")
    job.wait_for_state("PENDING 2")
    cluster.start_node("n1")
    job.start_soon()
    job.wait_for_state("COMPLETED 2")
    assert job.text.count("is queued again") == 1
    assert rows(tmp_path) == expected and len(expected) == STEPS


def test_a_job_that_is_preempted_out_of_time_and_canceled_saves(
    cluster: Cluster, alone: Reference, tmp_path: Path
) -> None:
    expected = alone.rows(1)
    write_run(tmp_path, CONFIG + PAUSES.format(lives=3))
    single = ("--ntasks-per-node=1", "--gpus-per-node=1", "--partition=llm")
    job = Job(cluster, tmp_path, "single_node.sh", *single)
    job.wait_for_pause(0)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"]
    cluster.call(*urgent, "--output=/dev/null", "--wrap=true")
    job.wait_for_pause(1)
    assert "stopped by SIGTERM after step 2: rerun" in job.text
    # Slurm looks at time limits every 30 s; five minutes before this one, the script has it send SIGUSR1.
    job.update("TimeLimit=4")
    wait_until(lambda: job.state == "PENDING 2", lambda: job.state)
    job.update("TimeLimit=60")
    job.wait_for_pause(2)
    assert "stopped by SIGUSR1 after step 5: rerun" in job.text
    assert job.text.count(f"srun ended with 75: job {job.number} is queued again") == 2
    # Who cancels a job does not want it back.
    cluster.call("scancel", job.number)
    wait_until(lambda: job.state.startswith("CANCEL"), lambda: job.state)
    assert "stopped by SIGTERM after step 8: rerun" in job.text
    assert job.text.count("is queued again") == 2
    found = rows(tmp_path)
    assert list(found) == list(range(9))
    assert found == {step: expected[step] for step in found}


def test_torchrun_on_each_node(
    cluster: Cluster, alone: Reference, tmp_path: Path
) -> None:
    expected = alone.rows(2)
    write_run(tmp_path, CONFIG)
    script = LAUNCH / "many_nodes_torchrun.sh"
    # What a team edits in its copy of the script; the rest is given to sbatch.
    copy = tmp_path / "copy.sh"
    copy.write_text(script.read_text().replace("NPROC_PER_NODE=8", "NPROC_PER_NODE=1"))
    job = Job(cluster, tmp_path, str(copy), "--gpus-per-node=1")
    job.wait_for_state("COMPLETED 0")
    assert "data parallel size: 2" in job.text
    assert rows(tmp_path) == expected


GUIDE = "srun -p llm -N 2 -n {ranks} --ntasks-per-node={each} --gpus-per-task=1 python {script} --config ./config.py"
GENERATION = """
generation = dict(
    ckpt_folder="ckpts", output_folder="out", data_folder="data/valid", batch_size=2, eos_id=[2, 0], bos_id=1,
    max_length=24, do_sample=True, temperature=2.0,
)
"""


def test_the_guides_lines(cluster: Cluster, alone: Reference, tmp_path: Path) -> None:
    """InternEvo's usage guide, with 4 ranks for its 16, and then answers from what was trained."""
    expected = alone.rows(4)
    write_run(tmp_path, CONFIG + GENERATION)
    train = GUIDE.format(ranks=4, each=2, script=ROOT / "train.py")
    text = cluster.call(*train.split(), cwd=tmp_path)
    assert "data parallel size: 4" in text
    assert rows(tmp_path) == expected
    answers = tmp_path / "out"
    generate = GUIDE.format(ranks=2, each=1, script=ROOT / "generate.py")
    cluster.call(*generate.split(), cwd=tmp_path)
    by_two = {path.name: path.read_bytes() for path in answers.iterdir()}
    shutil.rmtree(answers)
    alone.start(["evomesh", "generate", "config.py"], 1, tmp_path)
    assert {path.name: path.read_bytes() for path in answers.iterdir()} == by_two
    assert sum(name.endswith(".jsonl") for name in by_two) == 2


XTUNER = """
evomesh xtuner train c.py --work-dir RUN --deepspeed deepspeed_zero1
--cfg-options optim_wrapper.dtype=float32 data.total_steps=3 --launcher
"""


def write_xtuner_run(folder: Path) -> None:
    """Write a config of XTuner for a tiny pretrained model, and token files."""
    sizes = {key: value for key, value in TINY_MODEL.items() if key != "architectures"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(folder / "tiny")
    token_files(folder / "data", {"en/a/x.bin": 40})
    edits = {
        '"internlm/internlm2-7b"': '"tiny"',
        "/path/to/sft/data/folder": "data",
        "max_length = 32768": "max_length = 64",
        "accumulative_counts = 1\n": "accumulative_counts = 2\n",
    }
    write_config(folder / "c.py", *edits.items())


def test_the_line_of_xtuners_guide(
    cluster: Cluster, alone: Reference, tmp_path: Path
) -> None:
    write_xtuner_run(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "slurm")
    alone.start([*XTUNER.split(), "pytorch"], 2, tmp_path / "alone")
    srun = ["srun", "-N", "2", "-n", "2", "--ntasks-per-node=1", "--gpus-per-task=1"]
    text = cluster.call(*srun, *XTUNER.split(), "slurm", cwd=tmp_path / "slurm")
    assert "data parallel size: 2" in text
    expected = rows(tmp_path / "alone")
    assert rows(tmp_path / "slurm") == expected and len(expected) == 3


STUB = """#!/bin/bash
echo "$SLURM_RESTART_COUNT|$*" >> calls
echo "$*" | grep --quiet "lr=1e-5" && exit 2
[ -n "$SLURM_RESTART_COUNT" ] || exit 75
"""


def test_an_array_sweeps(cluster: Cluster, tmp_path: Path) -> None:
    """Each task has one value and separate folders; 75 is queued again, a user's mistake is not."""
    stub = tmp_path / "bin/evomesh"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    path = f"--export=ALL,PATH={stub.parent}:/usr/bin:/bin"
    few = ("--array=0-1", "--ntasks-per-node=1", "--gpus-per-node=1", path)
    job = Job(cluster, tmp_path, "sweep.sh", *few)
    states = [f"{job.number}_0", f"{job.number}_1"]
    ends = ["FAILED 0", "COMPLETED 1"]
    wait_until(
        lambda: [cluster.state(task) for task in states] == ends,
        lambda: f"{[cluster.state(task) for task in states]}, not {ends}",
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    common = "train config.py --set adam.lr={0} --set ckpt.save_ckpt_folder=local:sweep/adam.lr={0} --run-dir "
    runs = f"RUN/sweep-{job.number}/adam.lr="
    assert sorted(calls) == [
        "1|" + common.format("2e-5") + runs + "2e-5",
        "|" + common.format("1e-5") + runs + "1e-5",
        "|" + common.format("2e-5") + runs + "2e-5",
    ]
