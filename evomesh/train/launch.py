"""Who am I among how many: from the launcher's variables to this rank's grid and device."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch
import torch.distributed as dist

from evomesh.config.layout import axis_sizes, check_world
from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.monitor.log import ALL_RANKS, setup_logging
from evomesh.parallel.build import build_grid
from evomesh.parallel.device import device_of_rank
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES, TensorMode

logger = logging.getLogger(__name__)

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NPROCS", "SLURM_JOB_NODELIST")
LAUNCHERS = ("auto", "torch", "slurm")


@dataclass(frozen=True)
class Rank:
    """One process among ``world_size``; ``host:port`` is where they meet ("" for a single process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class RunContext:
    """Attributes:
    grid: the process groups that this rank is on.
    device: where this rank computes.
    mode: how tensors are cut.
    started: when the run started: the same on every rank.
    """

    grid: Grid
    device: torch.device
    mode: TensorMode
    rank: int
    world_size: int
    started: datetime


@contextmanager
def launch(
    config: Config, launcher: str = "auto", *, port: int = 8888, seed: int | None = None
) -> Iterator[RunContext]:
    """Joins the other ranks, if any; leaving the context parts from them again.

    Raises:
        UserError: the launcher's variables are missing or wrong, or the layout does not fit so many processes. Both
            are found before any process group exists.
    """
    place = detect(os.environ, launcher, port)
    setup_logging(shows=place.rank == 0)  # until the run folder is known
    warnings = check_world(config, place.world_size)
    sizes = axis_sizes(config.parallel, place.world_size)
    device = device_of_rank(place.local_rank)
    torch.backends.cudnn.benchmark = config.run.cudnn_benchmark
    torch.backends.cudnn.deterministic = config.run.cudnn_deterministic
    if place.world_size > 1:
        _join(place, device)
    try:
        grid = build_grid(config.parallel, place.world_size, place.rank)
        started = _same_time(place.world_size)
        if place.rank == 0:
            for warning in warnings:
                logger.warning(warning)
            logger.info(
                f"Distributed environment is initialized, data parallel size: {sizes.dp}, "
                f"pipeline parallel size: {sizes.pp}, tensor parallel size: {sizes.tp}"
            )
        set_seed(config.run.seed if seed is None else seed, place.rank)
        logger.info(
            f"===========New Run {started:%b%d_%H-%M-%S} on host:{socket.gethostname()},"
            f"tp:{grid.tp.rank},pp={grid.pp.rank},dp={grid.dp.rank}===========",
            extra=ALL_RANKS,
        )
        mode = MODES[config.parallel.tensor.mode]
        yield RunContext(grid, device, mode, place.rank, place.world_size, started)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def set_seed(seed: int, rank: int) -> None:
    """Seeds every generator; weights and data do not draw from them (invariants 9 and 10), a user's model may."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if rank == 0:
        logger.info(
            f"initialized seed on rank {rank}, numpy: {seed}, python random: {seed}, ParallelMode.DATA: {seed}, "
            f"ParallelMode.TENSOR: {seed},the default parallel seed is ParallelMode.DATA."
        )


def detect(env: Mapping[str, str], launcher: str = "auto", port: int = 8888) -> Rank:
    """This process's place by the launcher's variables: torchrun first, then slurm, else one process.

    Args:
        env: the environment.
        launcher: "auto", or the one whose variables must be there.
        port: where slurm tasks meet on the first node.
    """
    if launcher not in LAUNCHERS:
        raise UserError(f"unknown launcher {launcher!r}", where="--launcher", expected=" | ".join(LAUNCHERS))
    # RANK without the rest is a broken launch, not a single process; a batch script outside srun has no step.
    if launcher == "torch" or (launcher == "auto" and ("RANK" in env or "LOCAL_RANK" in env)):
        return _from_torchrun(env)
    if launcher == "slurm" or (launcher == "auto" and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env):
        return _from_slurm(env, port)
    return Rank()


def _from_torchrun(env: Mapping[str, str]) -> Rank:
    _require(env, TORCHRUN, "torchrun", "torchrun --nproc_per_node=N train.py --config C --launcher torch")
    place = Rank(
        _number(env, "RANK"),
        _number(env, "WORLD_SIZE"),
        _number(env, "LOCAL_RANK"),
        env["MASTER_ADDR"],
        _number(env, "MASTER_PORT"),
    )
    return _checked(place, "RANK", "WORLD_SIZE")


def _from_slurm(env: Mapping[str, str], port: int) -> Rank:
    _require(
        env, SLURM, "slurm", "srun -n N --ntasks-per-node=G --gpus-per-task=1 python train.py --config C"
    )
    nodes = env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])
    host = env.get("MASTER_ADDR") or node_address(first_node(nodes))
    number = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else port
    world_size, local_rank = _number(env, "SLURM_NPROCS"), _number(env, "SLURM_LOCALID")
    return _checked(
        Rank(_number(env, "SLURM_PROCID"), world_size, local_rank, host, number),
        "SLURM_PROCID",
        "SLURM_NPROCS",
    )


def _require(env: Mapping[str, str], names: tuple[str, ...], launcher: str, command: str) -> None:
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise UserError(
            f"{launcher} variables are missing: {', '.join(missing)}",
            where="environment",
            expected=f"all of {', '.join(names)}, as {launcher} sets them",
            fix=f"start with: {command}   (or without --launcher for one process)",
        )


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(
            f"{name}={env[name]!r} is not a number", where="environment", expected="a whole number >= 0"
        )
    return value


def _checked(place: Rank, rank: str, world: str) -> Rank:
    if place.rank >= place.world_size:
        raise UserError(
            f"{rank}={place.rank} with {world}={place.world_size}",
            where="environment",
            expected=f"{rank} from 0 to {world} - 1",
        )
    return place


def first_node(nodes: str) -> str:
    """The first name of a slurm node list: ``gpu[03-05,9],x1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise UserError(
            f"cannot read the node list {nodes!r}", where="SLURM_JOB_NODELIST", expected="such as n[1-4]"
        )
    return "".join(part or "" for part in match.groups())


def node_address(node: str) -> str:
    """The node's name where it resolves, else the address that slurm knows it by."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        if shutil.which("scontrol"):
            shown = subprocess.run(
                ["scontrol", "show", "node", node], capture_output=True, text=True, check=False
            )
            if match := re.search(r"NodeAddr=(\S+)", shown.stdout):
                return match[1]
        raise UserError(
            f"the first node {node!r} has no address here",
            where="SLURM_JOB_NODELIST",
            fix="export MASTER_ADDR=ADDRESS",
        ) from None
    return node


def _join(place: Rank, device: torch.device) -> None:
    host = f"[{place.host}]" if ":" in place.host else place.host  # IPv6
    dist.init_process_group(
        backend(device),
        init_method=f"tcp://{host}:{place.port}" if "TORCHELASTIC_RUN_ID" not in os.environ else "env://",
        rank=place.rank,
        world_size=place.world_size,
    )


def backend(device: torch.device) -> str:
    """NCCL for CUDA tensors, gloo for CPU tensors; gloo for both where torchrun puts several ranks on one device."""
    if device.type != "cuda":
        return "gloo"
    crowded = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    return "gloo" if crowded else "cpu:gloo,cuda:nccl"


def _same_time(world_size: int) -> datetime:
    started = [time.time()]
    if world_size > 1:
        dist.broadcast_object_list(started, src=0)
    return datetime.fromtimestamp(started[0])


def torchrun_command(env: Mapping[str, str], argv: list[str], launcher: str = "auto") -> list[str] | None:
    """The torchrun command that starts this node's ranks, when the environment asks for several and none exists yet.

    Two environments do: ``NPROC_PER_NODE`` (with NNODES, NODE_RANK, ADDR, PORT), and Aliyun DLC, whose RANK and
    WORLD_SIZE count nodes and whose KUBERNETES_CONTAINER_RESOURCE_GPU counts processes.

    Args:
        argv: ``sys.argv`` of this process.
    """
    on_dlc = "KUBERNETES_CONTAINER_RESOURCE_GPU" in env
    if launcher == "slurm" or "LOCAL_RANK" in env or not (on_dlc or "NPROC_PER_NODE" in env):
        return None
    processes = _number(
        env, "NPROC_PER_NODE" if "NPROC_PER_NODE" in env else "KUBERNETES_CONTAINER_RESOURCE_GPU"
    )
    nodes_name, rank_name = (
        ("WORLD_SIZE", "RANK") if on_dlc and "NNODES" not in env else ("NNODES", "NODE_RANK")
    )
    nodes = _number(env, nodes_name) if nodes_name in env else 1
    node_rank = _number(env, rank_name) if rank_name in env else 0
    if processes * nodes <= 1 and not on_dlc:
        return None
    where = ["--standalone"] if nodes == 1 else _rendezvous(env, nodes, node_rank)
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *where,
        f"--nproc_per_node={max(processes, 1)}",
        *argv,
    ]


def _rendezvous(env: Mapping[str, str], nodes: int, node_rank: int) -> list[str]:
    address, port = env.get("MASTER_ADDR") or env.get("ADDR"), env.get("MASTER_PORT") or env.get("PORT")
    if not address or not port:  # a port of each node's own choosing would never meet
        raise UserError(
            f"{nodes} nodes, but no place for them to meet",
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
    """Replaces this process by torchrun when the environment asks for that (``torchrun_command``); else returns."""
    command = torchrun_command(os.environ, sys.argv, launcher)
    if command is not None:
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        setup_logging()
        logger.info("starting %s", " ".join(command[1:]))
        sys.stdout.flush()
        os.execve(command[0], command, env)
