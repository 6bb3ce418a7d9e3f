"""Jobs of real processes: started by torchrun, or by evomesh itself, then stopped, killed or broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.interpreter import free_port
from tests.support.runs import losses, write_run

ROOT = Path(__file__).parents[2]
ENDLESS = 'data["total_steps"] = 100000\nckpt["checkpoint_every"] = 100000\n'
SHORT = 'data["total_steps"] = 2\nckpt["checkpoint_every"] = 2\n'
QUICK = "from evomesh.parallel import peer_watch\npeer_watch.SILENT_S, peer_watch.LOST_S = 3.0, 4.0\n"
# Torchrun ends the other rank, whose error this is too, before it is printed.
SLOW_TO_PRINT = """
import time
from evomesh.cli import run
at_once = run._fail
run._fail = lambda error: (error.printed_elsewhere or time.sleep(2), at_once(error))
"""
TRAIN = ["-m", "evomesh", "train", "config.py"]


class Job:
    """A process and what it prints; it and all that it started end with the test."""

    def __init__(
        self,
        folder: Path,
        command: list[str],
        program: Sequence[str] = (sys.executable,),
        **env: str,
    ) -> None:
        self.log = folder / f"log{free_port()}"
        base = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*program, *command],
                cwd=folder,
                env=os.environ | base | env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 120
        while words not in self.text:
            assert self.process.poll() is None, self.text[-3000:]
            assert time.monotonic() < deadline, self.text[-3000:]
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank that this job has started, from /proc."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                environment = (folder / "environ").read_text().split("\0")
            except OSError:
                continue
            rank = [line for line in environment if line.startswith("RANK=")]
            if int(parent) == self.process.pid and rank:
                found[int(rank[0].removeprefix("RANK="))] = int(folder.name)
        return found

    def end(self) -> int:
        return self.process.wait(120)

    def kill(self) -> None:
        for pid in [*self.ranks().values(), self.process.pid]:
            if self.process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.kill()


def test_two_nodes(tmp_path: Path, jobs: list[Job]) -> None:
    """Two agents of torchrun on one host, each with one rank, train as one job."""
    write_run(tmp_path, SHORT)
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    rendezvous.append(f"--master_port={free_port()}")
    for node in range(2):
        agent = ["-m", "torch.distributed.run", *rendezvous, f"--node_rank={node}"]
        jobs.append(Job(tmp_path, [*agent, *TRAIN]))
    assert [job.end() for job in jobs] == [0, 0], jobs[0].text[-3000:]
    assert "data parallel size: 2" in jobs[0].text
    assert losses(tmp_path).keys() == {0, 1}


def test_a_signal_to_the_supervisor_stops_and_saves(
    tmp_path: Path, jobs: list[Job]
) -> None:
    """SIGUSR1, which Slurm sends before a time limit, and of which torchrun itself would die alone."""
    write_run(tmp_path, ENDLESS)
    job = Job(tmp_path, TRAIN, NPROC_PER_NODE="2")
    jobs.append(job)
    job.wait_for("step=2,")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 75, job.text[-3000:]
    assert "committed: ckpts/step-" in job.text
    assert "Traceback" not in job.text


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_signal_while_the_supervisor_starts(
    seconds: float, tmp_path: Path, jobs: list[Job]
) -> None:
    """While the process becomes it, and while it imports torch, whose agent then takes the signals."""
    write_run(tmp_path, ENDLESS)
    job = Job(tmp_path, TRAIN, NPROC_PER_NODE="2")
    jobs.append(job)
    job.wait_for("starting -m evomesh.cli.supervise")
    time.sleep(seconds)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.text[-3000:]
    assert "stopped by SIGTERM before the first step" in job.text


def test_a_killed_rank_ends_the_job(tmp_path: Path, jobs: list[Job]) -> None:
    write_run(tmp_path, QUICK + ENDLESS)
    job = Job(tmp_path, TRAIN, NPROC_PER_NODE="2")
    jobs.append(job)
    job.wait_for("step=2,")
    ranks = job.ranks()
    os.kill(ranks[0], signal.SIGKILL)
    assert job.end() == 75, job.text[-3000:]
    assert "rank 0 was killed by SIGKILL" in job.text
    assert "Traceback" not in job.text and "frame #" not in job.text
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_a_rank_that_fails_at_its_start_ends_the_job(
    tmp_path: Path, jobs: list[Job]
) -> None:
    only_one = (
        'import os\nif os.environ.get("RANK") == "1":\n    data["seq_len"] = -1\n'
    )
    write_run(tmp_path, only_one)
    job = Job(tmp_path, TRAIN, NPROC_PER_NODE="2")
    jobs.append(job)
    assert job.end() == 2, job.text[-3000:]
    assert "data.seq_len" in job.text
    assert "Traceback" not in job.text


def test_a_lost_store_prints_no_frames_of_torch(
    tmp_path: Path, jobs: list[Job]
) -> None:
    """Without torchrun the store is in rank 0, and every other rank's connection to it breaks."""
    write_run(tmp_path, QUICK + ENDLESS)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(free_port())
    for rank in ("0", "1"):
        jobs.append(Job(tmp_path, TRAIN, RANK=rank, LOCAL_RANK=rank, **world))
    jobs[0].wait_for("step=2,")
    jobs[0].process.kill()
    assert jobs[1].end() == 75
    assert "error: rank 0 on " in jobs[1].text
    assert "frame #" not in jobs[1].text and "Exception raised" not in jobs[1].text


def test_ranks_that_fail_alike_show_one_error_which_stands_last(
    tmp_path: Path, jobs: list[Job]
) -> None:
    write_run(tmp_path, SLOW_TO_PRINT)
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = Job(tmp_path, [*agent, *TRAIN, "--set", "data.train_folder=nowhere"])
    jobs.append(job)
    assert job.end() == 1, job.text
    first, summary = job.text.split("FAILED", 1)
    error = "cannot read the folder nowhere"
    assert first.count(error) == summary.count(error) == 1, job.text
    others, root_cause = summary.split("Root Cause")
    assert error in root_cause and "the same error as of another rank" in others
