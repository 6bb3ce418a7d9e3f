"""Partitions of this cluster, as ``sinfo`` lists them, and whether a job fits into one."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from evomesh.cluster.slurm import SlurmJob
from evomesh.cluster.slurm_time import seconds_of
from evomesh.errors import UserError

SINFO_LIMIT_S = 20


@dataclass(frozen=True)
class Partition:
    """A partition, or the nodes of one that are alike.

    Attributes:
        gpus: of each node.
        limit: the longest time of a job, as Slurm writes it.
    """

    name: str
    limit: str
    nodes: int
    gpus: int
    is_default: bool = False


def read_partitions() -> list[Partition] | None:
    """Return the cluster's partitions; None where ``sinfo`` is absent or does not answer."""
    if not shutil.which("sinfo"):
        return None
    try:
        # One line for each kind of nodes in a partition: name, limit, nodes, GPUs.
        listed = subprocess.run(
            ["sinfo", "--noheader", "--format=%P|%l|%D|%G"],
            capture_output=True,
            text=True,
            check=False,
            timeout=SINFO_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if listed.returncode != 0:
        return None
    return [_parse(line) for line in listed.stdout.splitlines() if line.strip()]


def check_partition(job: SlurmJob, partitions: list[Partition]) -> None:
    """Check that the job's partition exists and could run it.

    Raises:
        UserError: no such partition, or too few nodes, GPUs or hours in it.
    """
    kinds = _kinds(job, partitions)
    name = kinds[0].name
    nodes = sum(kind.nodes for kind in kinds if kind.gpus >= job.gpus_per_node)
    if nodes == 0:
        most = max(kind.gpus for kind in kinds)
        raise UserError(
            f"the nodes of partition {name!r} have {most} GPUs at most, not {job.gpus_per_node}",
            where="--gpus-per-node",
            expected=_expected(most, kinds, partitions),
            code="EVO-CLUSTER-004",
        )
    if job.nodes > nodes:
        raise UserError(
            f"partition {name!r} has {nodes} nodes with {job.gpus_per_node} GPUs, not {job.nodes}",
            where="--nodes",
            expected=_expected(nodes, kinds, partitions),
            code="EVO-CLUSTER-004",
        )
    if seconds_of(job.time) > _limit_s(kinds[0]):
        raise UserError(
            f"{job.time} is more than partition {name!r} allows, which is {kinds[0].limit}",
            where="--time",
            fix=f"--time {kinds[0].limit}: the job saves before its limit and is queued again",
            code="EVO-CLUSTER-002",
        )


def _kinds(job: SlurmJob, partitions: list[Partition]) -> list[Partition]:
    """Return the kinds of nodes in the job's partition, at least one."""
    if job.partition:
        kinds = [kind for kind in partitions if kind.name == job.partition]
    else:
        kinds = [kind for kind in partitions if kind.is_default]
    if not kinds:
        raise _no_such_partition(job, partitions)
    return kinds


def _parse(line: str) -> Partition:
    name, limit, nodes, gres = line.split("|", 3)
    # The default partition has a star after its name. GPUs: "gpu:4", "gpu:a100:8(S:0-1)".
    counts = re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres)
    gpus = sum(map(int, counts))
    return Partition(name.rstrip("*"), limit, int(nodes), gpus, name.endswith("*"))


def _limit_s(partition: Partition) -> float:
    """Return a partition's time limit in seconds; infinity for words such as ``n/a``."""
    try:
        return seconds_of(partition.limit)
    except UserError:
        return math.inf


def _no_such_partition(job: SlurmJob, partitions: list[Partition]) -> UserError:
    found = f"this cluster has no partition {job.partition!r}"
    if not job.partition:
        found = "this cluster has no default partition"
    return UserError(
        found,
        where="--partition",
        expected=f"one of {_listed(partitions)}",
        fix="see what each has: sinfo",
        code="EVO-CLUSTER-004",
    )


def _expected(
    most: int, kinds: Sequence[Partition], partitions: Sequence[Partition]
) -> str:
    """Return what the job's partition can give, and the partitions beside it."""
    name = kinds[0].name
    others = [kind for kind in partitions if kind.name != name]
    choices = []
    if most:
        choices.append(f"up to {most}")
    if others:
        choices.append(f"another partition: {_listed(others)}")
    return ", or ".join(choices) or "nodes with GPUs, which no partition here has"


def _listed(partitions: Sequence[Partition]) -> str:
    return ", ".join(dict.fromkeys(kind.name for kind in partitions)) or "none"
