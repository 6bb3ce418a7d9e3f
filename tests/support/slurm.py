"""A Slurm cluster on this machine: a controller and two virtual nodes with four pretended GPUs each, on loopback only.

Needs root and Debian's packages slurm-wlm and munge; ``.ci/run`` installs them where it may.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.interpreter import free_port

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
LIMIT_S = 90  # what a test waits for takes a few seconds; more only on a busy machine
# SlurmdTimeout and the two limits of messages are how long Slurm takes to declare a silent node down, and to give up
# telling it of its job's end.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=3
MessageTimeout=2
TCPTimeout=1
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=llm Nodes=n[1-2] Default=YES MaxTime=2-00:00:00 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 Gres=gpu:4"


def missing() -> str:
    """Why no cluster can be started here; "" where one can."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return "needs Debian's slurm-wlm and munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def wait_until(
    is_so: Callable[[], bool], what: Callable[[], str] | str, limit_s: float = LIMIT_S
) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(what if isinstance(what, str) else what())
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """The cluster whose configuration and process ids are in ``folder``."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user who has evomesh installed."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return os.environ | {
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str, cwd: Path = ROOT, code: int | None = 0) -> str:
        """Run a command of Slurm, or of its user, and return what it prints; any end will do where ``code`` is None."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.env,
            text=True,
            check=False,
            timeout=120,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert code in (None, done.returncode), f"{' '.join(command)}\n{done.stdout}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job, with its number of restarts: ``RUNNING 1``."""
        shown = self.call("scontrol", "show", "job", job)
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        return f"{fields['JobState']} {fields['Restarts']}"

    def start_soon(self, job: str) -> None:
        """Let a job that is queued again start, as an operator can: Slurm holds it back for cred_expire, 5 s at least.

        The next second and not this one: a node refuses credentials of the second in
        which it revoked the last ones. Slurm refuses it for a job that has just started.
        """
        update = ["scontrol", "update", f"JobId={job}", "StartTime=now+1"]
        self.call(*update, code=None)

    def tasks(self, job: str, node: str) -> list[int]:
        """Process ids of a job's ranks on a node."""
        return self._processes(
            f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}", "SLURM_STEP_ID=0"
        )

    def _processes(self, *variables: str) -> list[int]:
        """Process ids of those that have all of these variables."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if set(variables) <= set(environment):
                found.append(int(folder.name))
        return found

    def start_node(self, name: str) -> None:
        self.call("slurmd", "-N", name, "-f", f"{self.folder}/slurm.conf")

    def kill_node(self, job: str, name: str) -> None:
        """End a node as a power cut would: its daemon, the keepers of its steps, and all processes of the job there."""
        pids = self._processes(f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={name}")
        keepers = set()
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            parent = int(fields[1])
            if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                keepers.add(parent)
        daemon = int((self.folder / f"{name}.pid").read_text())
        _kill([daemon, *keepers, *pids])

    def cancel_all(self) -> None:
        """End all jobs at once, so that nothing of them outlives the daemons."""
        jobs = self.call("squeue", "--noheader", "--format=%A").split()
        for job in jobs:
            self.call("scancel", job)
            for name in NODES:
                _kill(self.tasks(job, name))
        wait_until(lambda: not self.call("squeue", "--noheader"), "an empty queue")

    def idle_nodes(self) -> int:
        return (
            self.call("sinfo", "-h", "-N", "-p", "llm", "-o", "%T")
            .split()
            .count("idle")
        )


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start everything, and end by process id what was started."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        folder.chmod(0o755)
        _write_settings(folder)
        started = Cluster(folder)
        _start(started)
        yield started
        started.cancel_all()
    finally:
        pids = []
        for name in (*NODES, "slurmctld", "munge"):
            file = folder / f"{name}.pid"
            if file.exists():
                pids.append(int(file.read_text()))
        _kill(pids)
        shutil.rmtree(folder, ignore_errors=True)


def _write_settings(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    for name in (*NODES, "state"):
        (folder / name).mkdir()
    # slurmd sets CUDA_VISIBLE_DEVICES for device files only; these are /dev/null by another name.
    for number in range(4):
        os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    lines = [NODE.format(name=name, host=host, port=free_port()) for name in NODES]
    text = CONFIG.format(
        host=host, port=free_port(), folder=folder, nodes="\n".join(lines)
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text(
        f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-3]\n"
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    files = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    options = [f"--{name}={folder}/{file}" for name, file in files.items()]
    cluster.call("munged", "--force", *options)
    cluster.call("slurmctld", "-c", "-f", f"{folder}/slurm.conf")
    for name in NODES:
        cluster.start_node(name)
    wait_until(lambda: cluster.idle_nodes() == len(NODES), "two idle nodes")


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
