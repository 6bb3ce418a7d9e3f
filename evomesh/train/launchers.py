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

from rich.console import Console

from evomesh.errors import UserError
from evomesh.monitor.log import setup_logging
from evomesh.parallel.rendezvous import JobAddress, is_port
from evomesh.train.signals import signals_held_for_next_program

logger = logging.getLogger(__name__)

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NPROCS", "SLURM_JOB_NODELIST")
# The tasks of this step, of which `srun -n 1` in an allocation of eight has one; the
# other two may be those of the whole job.
SLURM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NPROCS", "SLURM_NTASKS")
FIRST_SHELL_STEP = 0xFFFFFFFA  # numbers from here on are no srun: salloc's shell, batch
LARGEST_NUMBER = 1_000_000  # of ranks, nodes and ports: more is a typing error
# Aliyun DLC sets it: processes per node.
DLC_PROCESSES = "KUBERNETES_CONTAINER_RESOURCE_GPU"
# Names with an underscore are none of the internet's, but some clusters have them.
HOST_NAME = re.compile(r"[\w.-]+")
IPV6_ADDRESS = re.compile(r"[0-9A-Fa-f:.]+(%[\w.-]+)?")
SUPERVISOR = "evomesh.cli.supervise"  # torchrun with evomesh's exit codes and signals
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
            code="EVO-CLI-002",
        )
    # RANK without the other variables is a broken launch, not a single process.
    env = _non_empty(env)
    is_auto = launcher == "auto"
    has_torchrun = "RANK" in env or "LOCAL_RANK" in env
    has_slurm = "SLURM_PROCID" in env and _is_srun_step(env)
    if launcher == "torch" or (is_auto and has_torchrun):
        return _from_torchrun(env)
    if launcher == "slurm" or (is_auto and has_slurm):
        return _from_slurm(env, port)
    return ProcessInfo()


def idle_tasks(env: Mapping[str, str], process: ProcessInfo) -> list[str]:
    """Return a warning if this one process is the shell of a Slurm job, whose further tasks would do nothing."""
    tasks = env.get("SLURM_NTASKS", "")
    is_shell = "SLURM_JOB_ID" in env and not _is_srun_step(env)
    if process.world_size > 1 or not is_shell or tasks in ("", "1"):
        return []
    return [
        f"this Slurm job has {tasks} tasks, but was not started with srun: it trains with one process; to use all of "
        "them: srun python train.py --config CONFIG"
    ]


def _non_empty(env: Mapping[str, str]) -> dict[str, str]:
    """Leave out variables without a value, which job scripts use to unset one."""
    return {name: value for name, value in env.items() if value.strip()}


def _is_srun_step(env: Mapping[str, str]) -> bool:
    """Return whether srun started this process as a task.

    A batch script belongs to no step; the shell of an interactive allocation is a
    step with a reserved number, and carries the job's count of tasks.
    """
    if "SLURM_STEP_ID" not in env:
        return False
    step = env["SLURM_STEP_ID"]
    return not (step.isdecimal() and int(step) >= FIRST_SHELL_STEP)


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
        _host(env["MASTER_ADDR"], "MASTER_ADDR"),
        _whole_number(env, "MASTER_PORT"),
    )
    _check_port(process.port, "MASTER_PORT")
    if "LOCAL_WORLD_SIZE" in env:
        on_node = _whole_number(env, "LOCAL_WORLD_SIZE")
        _check_range(process.local_rank, on_node, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    _check_range(process.rank, process.world_size, "RANK", "WORLD_SIZE")
    return process


def _from_slurm(env: Mapping[str, str], port: int) -> ProcessInfo:
    tasks = next((name for name in SLURM_TASKS if name in env), "SLURM_NPROCS")
    names = tuple(tasks if name == "SLURM_NPROCS" else name for name in SLURM)
    _require(
        env,
        names,
        "slurm",
        "srun -n N --ntasks-per-node=G --gpus-per-task=1 python train.py --config C",
    )
    rank = _whole_number(env, "SLURM_PROCID")
    world_size = _whole_number(env, tasks)
    local_rank = _whole_number(env, "SLURM_LOCALID")
    _check_range(rank, world_size, "SLURM_PROCID", tasks)
    if world_size == 1:  # meets nobody: whatever the addresses are, they do not matter
        return ProcessInfo(local_rank=local_rank)

    nodes = env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])
    address = env.get("MASTER_ADDR")
    host = _host(address, "MASTER_ADDR") if address else node_address(first_node(nodes))
    if "MASTER_PORT" in env:
        port = _whole_number(env, "MASTER_PORT")
        _check_port(port, "MASTER_PORT")
    else:
        _check_port(port, "--port")
    return ProcessInfo(rank, world_size, local_rank, host, port)


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
            code="EVO-PARALLEL-010",
        )


def _whole_number(env: Mapping[str, str], name: str) -> int:
    """Return a count or an index; int() alone would also take "1_0" and "-1"."""
    text = env[name].strip()
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if not 0 <= number <= LARGEST_NUMBER:
        raise UserError(
            f"{name}={env[name]!r} is not a number",
            where="environment",
            expected=f"a whole number from 0 to {LARGEST_NUMBER:,}",
            fix=f"unset {name}, or let the launcher set it",
            code="EVO-PARALLEL-010",
        )
    return number


def _host(text: str, name: str) -> str:
    """Return a host without the brackets that an IPv6 address has in a URL, ``[::1]``.

    Raises:
        UserError: a URL, a host with its port, or anything else that no lookup can resolve.
    """
    host = text.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    # Two colons or more are an IPv6 address; a zone follows a percent sign.
    is_address = host.count(":") > 1 and IPV6_ADDRESS.fullmatch(host)
    if is_address or HOST_NAME.fullmatch(host):
        return host
    raise UserError(
        f"{name}={text!r} is not a host",
        where="environment",
        expected="a name or address alone, such as n1, 10.0.0.1 or fe80::1%eth0; the port is in MASTER_PORT",
        code="EVO-PARALLEL-010",
    )


def _check_port(number: int, name: str) -> None:
    if not is_port(number):
        raise UserError(
            f"{name}={number} is not a port",
            where="environment" if name.isupper() else "arguments",
            expected="a number from 1 to 65535; up to 1023 only for root",
            code="EVO-PARALLEL-010",
        )


def _check_range(index: int, count: int, index_name: str, count_name: str) -> None:
    if index >= count:
        raise UserError(
            f"{index_name}={index} with {count_name}={count}",
            where="environment",
            expected=f"{index_name} from 0 to {count_name} - 1",
            fix=f"unset both, or let the launcher set them: an earlier one may have left {index_name}",
            code="EVO-PARALLEL-010",
        )


def first_node(nodes: str) -> str:
    """Return the first name of a slurm node list: ``gpu[03-05,9],x1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise UserError(
            f"cannot read the node list {nodes!r}",
            where="SLURM_JOB_NODELIST",
            expected="such as n[1-4]",
            code="EVO-PARALLEL-010",
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
            code="EVO-PARALLEL-003",
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
    env = _non_empty(env)
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
        SUPERVISOR,
        *rendezvous,
        f"--nproc_per_node={max(processes, 1)}",
        *argv,
    ]


def planned_world_size(env: Mapping[str, str], launcher: str = "auto") -> int:
    """Return the processes of the run, counting those that ``spawn_ranks`` has still to start."""
    if torchrun_command(env, [], launcher) is None:
        return detect(env, launcher).world_size
    env = _non_empty(env)
    on_dlc = DLC_PROCESSES in env
    processes = _whole_number(
        env, "NPROC_PER_NODE" if "NPROC_PER_NODE" in env else DLC_PROCESSES
    )
    nodes, _ = _node_count_and_rank(env, on_dlc)
    return max(processes, 1) * nodes


def _node_count_and_rank(env: Mapping[str, str], on_dlc: bool) -> tuple[int, int]:
    """Return how many nodes this job has, and which of them this is; (1, 0) where no variable counts them."""
    count_name, index_name = "NNODES", "NODE_RANK"
    if count_name not in env and _has_one_task_per_node(env):
        count_name, index_name = "SLURM_STEP_NUM_NODES", "SLURM_NODEID"
    if on_dlc and count_name not in env:
        count_name, index_name = "WORLD_SIZE", "RANK"
    nodes = 1
    if count_name in env:
        nodes = _whole_number(env, count_name)
    node_rank = 0
    if index_name in env:
        node_rank = _whole_number(env, index_name)
    _check_range(node_rank, nodes, index_name, count_name)
    return nodes, node_rank


def _has_one_task_per_node(env: Mapping[str, str]) -> bool:
    """Return whether srun has started one process on each of several nodes, which can start the node's ranks."""
    tasks, nodes = (
        env.get(f"SLURM_STEP_NUM_{what}", "1") for what in ("TASKS", "NODES")
    )
    return _is_srun_step(env) and nodes != "1" and tasks == nodes


def _rendezvous(env: Mapping[str, str], nodes: int, node_rank: int) -> list[str]:
    """Return torchrun's options for the address at which the nodes meet."""
    address_name = "MASTER_ADDR" if "MASTER_ADDR" in env else "ADDR"
    port_name = "MASTER_PORT" if "MASTER_PORT" in env else "PORT"
    if address_name not in env and _has_one_task_per_node(env):
        first = first_node(env.get("SLURM_STEP_NODELIST", ""))
        env = {**env, address_name: node_address(first)}
    # Nodes that choose their own ports would never connect.
    if address_name not in env or port_name not in env:
        raise UserError(
            f"{nodes} nodes, but no address where they connect",
            where="environment",
            expected="MASTER_ADDR (or ADDR) and MASTER_PORT (or PORT), the same on every node",
            code="EVO-PARALLEL-010",
        )
    address = _host(env[address_name], address_name)
    port = _whole_number(env, port_name)
    _check_port(port, port_name)
    return [
        f"--nnodes={nodes}",
        f"--node_rank={node_rank}",
        f"--master_addr={address}",
        f"--master_port={port}",
    ]


def spawn_ranks(
    launcher: str = "auto", *, announces: bool = True, console: Console | None = None
) -> None:
    """Replace this process by torchrun where the environment requires it (``torchrun_command``); else return.

    torchrun answers signals from then on.

    Args:
        announces: log the command.
        console: where it is logged, as in ``launch``: standard output by default.
    """
    command = torchrun_command(os.environ, sys.argv, launcher)
    if command is None:
        return
    # On Aliyun DLC these count nodes; torchrun sets them anew, to count ranks.
    env = dict(os.environ)
    env.pop("RANK", None)
    env.pop("WORLD_SIZE", None)
    if announces:
        setup_logging(console=console)
        arguments = " ".join(command[1:])
        logger.info("starting %s", arguments)
    sys.stdout.flush()
    with signals_held_for_next_program():
        os.execve(command[0], command, env)
