"""Training on two hosts: network namespaces, with torchrun on each and a virtual link between them that is cut."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_torchrun import QUICK, Job
from tests.support import netns
from tests.support.interpreter import Interpreter
from tests.support.netns import ADDRESSES, Link
from tests.support.runs import losses, write_run

STEPS = 6
CONFIG = f"""
model |= dict(num_layers=1, hidden_size=16, num_attention_heads=2, num_kv_attention_heads=1)
data["total_steps"] = lr_scheduler["total_steps"] = {STEPS}
ckpt["checkpoint_every"] = 2
"""
# Until there is a file "repaired", the second rank waits before step 3.
PAUSE = """
import os, time
from evomesh.train.trainer import Trainer
def _step_or_pause(trainer, poll, step=Trainer._one_step):
    if trainer.state.step == 3 and trainer.run.grid.dp.rank == 1 and not os.path.exists("repaired"):
        print("pause", flush=True)
        time.sleep(600)
    step(trainer, poll)
Trainer._one_step = _step_or_pause
"""
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)
pytestmark = pytest.mark.xdist_group("two hosts")


@pytest.fixture
def link() -> Iterator[Link]:
    if reason := netns.missing():
        pytest.skip(reason)
    with netns.two_hosts() as link:
        yield link


class HostJob(Job):
    """A process on one of the hosts."""

    def __init__(self, link: Link, host: int, folder: Path, **env: str) -> None:
        command = link.inside(
            host, sys.executable, "-m", "evomesh", "train", "config.py"
        )
        super().__init__(folder, command, program=(), **env)


def train_on_the_host_of_this_rank() -> None:
    """Enter the rank's namespace and train."""
    from evomesh.cli.main import main

    with open(os.environ["HOST"]) as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), NEW_NETWORK) == 0
    sys.argv = ["evomesh", "train", "config.py"]
    main()


def run_ranks(interpreter: Interpreter, folder: Path, link: Link) -> None:
    """Train to the end with one rank on each host."""
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29600"}  # fmt: skip
    ranks = []
    for rank, host in enumerate(link.hosts):
        env = world | {"RANK": str(rank), "HOST": f"/run/netns/{host}"}
        ranks.append(
            interpreter.start(train_on_the_host_of_this_rank, cwd=folder, env=env)
        )
    for running in ranks:
        finished = running.wait(60)
        assert finished.returncode == 0, finished.stderr[-2000:]


def test_a_link_that_is_cut(
    link: Link, interpreter: Interpreter, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    write_run(alone, CONFIG)
    run_ranks(interpreter, alone, link)
    expected = losses(alone)

    write_run(tmp_path, QUICK + CONFIG + PAUSE)
    common = {"NPROC_PER_NODE": "1", "NNODES": "2", "ADDR": ADDRESSES[0], "PORT": "29500"}  # fmt: skip
    jobs = [
        HostJob(link, host, tmp_path, NODE_RANK=str(host), **common) for host in (0, 1)
    ]
    try:
        jobs[1].wait_for("pause")
        link.cut()
        codes = [job.end() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert codes == [75, 75], jobs[0].text[-3000:] + jobs[1].text[-3000:]
    # This host's name leads to the loopback interface, on which gloo would find nobody.
    assert "gloo uses the interface cable, which leads to 10.77.0.1" in jobs[0].text
    for job, lost in zip(jobs, (1, 0), strict=True):
        named = rf"rank {lost} on \S+ is lost: it \(pid \d+\) has not answered for"
        assert re.search(named, job.text), job.text[-3000:]
        assert "Traceback" not in job.text
    link.repair()
    (tmp_path / "repaired").touch()
    run_ranks(interpreter, tmp_path, link)
    found = {}
    for folder in tmp_path.glob("RUN/*/*"):
        found |= losses(folder)
    assert found == expected and len(found) == STEPS
