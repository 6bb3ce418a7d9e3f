"""Launchers by their environment variables: who this process is among how many, or how to start that many."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from evomesh.errors import UserError
from evomesh.monitor.log import setup_logging
from evomesh.parallel.rendezvous import JobAddress, is_port

logger = logging.getLogger(__name__)

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NPROCS", "SLURM_JOB_NODELIST")
DLC_PROCESSES = (
    "KUBERNETES_CONTAINER_RESOURCE_GPU"  # Aliyun DLC sets it: processes per node
)
LAUNCHERS = ("auto", "torch", "slurm")


@dataclass(frozen=True)
class ProcessInfo:
    """One process among ``world_size``; they connect at ``host:port`` ("" for a single process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = ""
    port: int = 0

    @property
    def address(self) -> JobAddress:
        """Return where this process meets the others."""
        return JobAddress(self.rank, self.world_size, self.host, self.port)


def detect(
    env: Mapping[str, str], launcher: str = "auto", port: int = 8888
) -> ProcessInfo:
    """Read rank and world size from the launcher's variables: torchrun first, then slurm, else one process.

    Args:
        env: the environment.
        launcher: "auto", or the launcher whose variables are required.
        port: on the first node, where slurm tasks connect.
    """
    if launcher not in LAUNCHERS:
        raise UserError(
            f"unknown launcher {launcher!r}",
            where="--launcher",
            expected=" | ".join(LAUNCHERS),
        )
    # RANK without the other variables is a broken launch, not a single process. A batch script outside srun has no
    # SLURM_STEP_ID: it is one process.
    is_auto = launcher == "auto"
    has_torchrun = "RANK" in env or "LOCAL_RANK" in env
    has_slurm = "SLURM_PROCID" in env and "SLURM_STEP_ID" in env
    if launcher == "torch" or (is_auto and has_torchrun):
        return _from_torchrun(env)
    if launcher == "slurm" or (is_auto and has_slurm):
        return _from_slurm(env, port)
    return ProcessInfo()


def idle_tasks(env: Mapping[str, str], process: ProcessInfo) -> list[str]:
    """Return a warning if this one process is a Slurm job's batch script, whose further tasks would do nothing."""
    tasks = env.get("SLURM_NTASKS", "")
    is_batch_script = "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env
    if process.world_size > 1 or not is_batch_script or tasks in ("", "1"):
        return []
    return [
        f"this Slurm job has {tasks} tasks, but was not started with srun: it trains with one process; to use all of "
        "them: srun python train.py --config CONFIG"
    ]


def _from_torchrun(env: Mapping[str, str]) -> ProcessInfo:
    _require(
        env,
        TORCHRUN,
        "torchrun",
        "torchrun --nproc_per_node=N train.py --config C --launcher torch",
    )
    process = ProcessInfo(
        _whole_number(env, "RANK"),
        _whole_number(env, "WORLD_SIZE"),
        _whole_number(env, "LOCAL_RANK"),
        env["MASTER_ADDR"],
        _whole_number(env, "MASTER_PORT"),
    )
    _check_port(process.port, "MASTER_PORT")
    return _check_range(process, "RANK", "WORLD_SIZE")


def _from_slurm(env: Mapping[str, str], port: int) -> ProcessInfo:
    _require(
        env,
        SLURM,
        "slurm",
        "srun -n N --ntasks-per-node=G --gpus-per-task=1 python train.py --config C",
    )
    nodes = env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])
    host = env.get("MASTER_ADDR") or node_address(first_node(nodes))
    number = _whole_number(env, "MASTER_PORT") if "MASTER_PORT" in env else port
    _check_port(number, "MASTER_PORT" if "MASTER_PORT" in env else "--port")
    world_size, local_rank = (
        _whole_number(env, "SLURM_NPROCS"),
        _whole_number(env, "SLURM_LOCALID"),
    )
    return _check_range(
        ProcessInfo(
            _whole_number(env, "SLURM_PROCID"), world_size, local_rank, host, number
        ),
        "SLURM_PROCID",
        "SLURM_NPROCS",
    )


def _require(
    env: Mapping[str, str], names: tuple[str, ...], launcher: str, command: str
) -> None:
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise UserError(
            f"{launcher} variables are missing: {', '.join(missing)}",
            where="environment",
            expected=f"all of {', '.join(names)}, as {launcher} sets them",
            fix=f"start with: {command}   (or without --launcher for one process)",
        )


def _whole_number(env: Mapping[str, str], name: str) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(
            f"{name}={env[name]!r} is not a number",
            where="environment",
            expected="a whole number >= 0",
        )
    return value


def _check_port(number: int, name: str) -> None:
    if not is_port(number):
        raise UserError(
            f"{name}={number} is not a port",
            where="environment" if name.isupper() else "arguments",
            expected="a number from 1 to 65535; up to 1023 only for root",
        )


def _check_range(process: ProcessInfo, rank: str, world: str) -> ProcessInfo:
    if process.rank >= process.world_size:
        raise UserError(
            f"{rank}={process.rank} with {world}={process.world_size}",
            where="environment",
            expected=f"{rank} from 0 to {world} - 1",
        )
    return process


def first_node(nodes: str) -> str:
    """Return the first name of a slurm node list: ``gpu[03-05,9],x1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise UserError(
            f"cannot read the node list {nodes!r}",
            where="SLURM_JOB_NODELIST",
            expected="such as n[1-4]",
        )
    return "".join(part or "" for part in match.groups())


def node_address(node: str) -> str:
    """Return the node's name where it resolves, else the address that slurm has for it."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        if shutil.which("scontrol"):
            shown = subprocess.run(
                ["scontrol", "show", "node", node],
                capture_output=True,
                text=True,
                check=False,
            )
            if match := re.search(r"NodeAddr=(\S+)", shown.stdout):
                return match[1]
        raise UserError(
            f"the name of the first node, {node!r}, does not resolve on this host",
            where="SLURM_JOB_NODELIST",
            fix="export MASTER_ADDR=ADDRESS",
        ) from None
    return node


def torchrun_command(
    env: Mapping[str, str],
    argv: list[str],
    launcher: str = "auto",
) -> list[str] | None:
    """Return the torchrun command that starts this node's ranks; None if the environment does not require one.

    Two environments do: ``NPROC_PER_NODE`` (with NNODES, NODE_RANK, ADDR, PORT), and
    Aliyun DLC, whose RANK and WORLD_SIZE count nodes and whose
    KUBERNETES_CONTAINER_RESOURCE_GPU counts processes. A process that has a LOCAL_RANK
    was started by torchrun already.

    Args:
        argv: ``sys.argv`` of this process.
    """
    on_dlc = DLC_PROCESSES in env
    is_counted = "NPROC_PER_NODE" in env
    is_started = launcher == "slurm" or "LOCAL_RANK" in env
    if is_started or not (on_dlc or is_counted):
        return None
    variable = "NPROC_PER_NODE" if is_counted else DLC_PROCESSES
    processes = _whole_number(env, variable)
    nodes, node_rank = _node_count_and_rank(env, on_dlc)
    if processes * nodes <= 1 and not on_dlc:
        return None
    rendezvous = ["--standalone"]
    if nodes != 1:
        rendezvous = _rendezvous(env, nodes, node_rank)
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc_per_node={max(processes, 1)}",
        *argv,
    ]


def planned_world_size(env: Mapping[str, str], launcher: str = "auto") -> int:
    """Return the processes of the run, counting those that ``spawn_ranks`` has still to start."""
    if torchrun_command(env, [], launcher) is None:
        return detect(env, launcher).world_size
    on_dlc = DLC_PROCESSES in env
    processes = _whole_number(
        env, "NPROC_PER_NODE" if "NPROC_PER_NODE" in env else DLC_PROCESSES
    )
    nodes, _ = _node_count_and_rank(env, on_dlc)
    return max(processes, 1) * nodes


def _node_count_and_rank(env: Mapping[str, str], on_dlc: bool) -> tuple[int, int]:
    names = (
        ("WORLD_SIZE", "RANK")
        if on_dlc and "NNODES" not in env
        else ("NNODES", "NODE_RANK")
    )
    nodes = _whole_number(env, names[0]) if names[0] in env else 1
    node_rank = _whole_number(env, names[1]) if names[1] in env else 0
    return nodes, node_rank


def _rendezvous(env: Mapping[str, str], nodes: int, node_rank: int) -> list[str]:
    address, port = (
        env.get("MASTER_ADDR") or env.get("ADDR"),
        env.get("MASTER_PORT") or env.get("PORT"),
    )
    if not address or not port:  # nodes that choose their own ports would never connect
        raise UserError(
            f"{nodes} nodes, but no address where they connect",
            where="environment",
            expected="MASTER_ADDR (or ADDR) and MASTER_PORT (or PORT), the same on every node",
        )
    return [
        f"--nnodes={nodes}",
        f"--node_rank={node_rank}",
        f"--master_addr={address}",
        f"--master_port={port}",
    ]


def spawn_ranks(launcher: str = "auto") -> None:
    """Replace this process by torchrun where the environment requires it (``torchrun_command``); else return.

    torchrun answers signals from then on.
    """
    command = torchrun_command(os.environ, sys.argv, launcher)
    if command is None:
        return
    # On Aliyun DLC these count nodes; torchrun sets them anew, to count ranks.
    env = dict(os.environ)
    env.pop("RANK", None)
    env.pop("WORLD_SIZE", None)
    setup_logging()
    arguments = " ".join(command[1:])
    logger.info("starting %s", arguments)
    sys.stdout.flush()
    os.execve(command[0], command, env)
