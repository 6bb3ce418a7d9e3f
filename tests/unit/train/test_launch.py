"""Launchers by their variables alone."""

from __future__ import annotations

import re

import pytest

from evomesh.errors import UserError
from evomesh.train.launchers import (
    ProcessInfo,
    detect,
    first_node,
    idle_tasks,
    planned_world_size,
    torchrun_command,
)
from tests.support.covers import covers

pytestmark = covers("promise:nproc-per-node")

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NPROCS": "4",
    "SLURM_JOB_NODELIST": "localhost,n[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "7",
}


@pytest.mark.parametrize("launcher", ["auto", "torch"])
def test_torchrun(launcher: str) -> None:
    assert detect(TORCHRUN, launcher) == ProcessInfo(5, 8, 1, "10.0.0.1", 29500)


@pytest.mark.parametrize("launcher", ["auto", "slurm"])
def test_slurm(launcher: str) -> None:
    assert detect(SLURM, launcher, port=9999) == ProcessInfo(3, 4, 1, "localhost", 9999)
    assert detect({**SLURM, "MASTER_ADDR": "10.0.0.9"}, launcher).host == "10.0.0.9"


@pytest.mark.parametrize(
    ("typed", "host"),
    [
        ("[::1]", "::1"),
        (" [fe80::1%eth0] ", "fe80::1%eth0"),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1"),
        ("[10.0.0.1]", "10.0.0.1"),
        (" n1.cluster ", "n1.cluster"),
        ("gpu_01", "gpu_01"),
    ],
)
def test_a_host_is_a_name_or_an_address_with_or_without_brackets(
    typed: str, host: str
) -> None:
    address = {"MASTER_ADDR": typed}
    assert detect({**TORCHRUN, **address}).host == host
    assert detect({**SLURM, **address}, "slurm").host == host
    nodes = {"NPROC_PER_NODE": "2", "NNODES": "2", "MASTER_PORT": "29500", **address}
    command = torchrun_command(nodes, [])
    assert command is not None and f"--master_addr={host}" in command


@pytest.mark.parametrize(
    "typed",
    ["tcp://n1", "n1:29500", "10.0.0.1:29500", "[::1]:29500", "[::1", "a b", "a,b"],
)
def test_what_no_lookup_can_resolve_is_refused_at_once(typed: str) -> None:
    for env in (TORCHRUN, {**SLURM, "SLURM_NPROCS": "4"}):
        with pytest.raises(UserError, match=re.escape(f"{typed!r} is not a host")):
            detect({**env, "MASTER_ADDR": typed})
    nodes = {"NPROC_PER_NODE": "2", "NNODES": "2", "PORT": "29500", "ADDR": typed}
    with pytest.raises(UserError, match=re.escape(f"ADDR={typed!r} is not a host")):
        torchrun_command(nodes, [])


def test_torchrun_inside_slurm_is_torchrun() -> None:
    assert detect({**SLURM, **TORCHRUN}).world_size == 8
    assert detect({**SLURM, **TORCHRUN}, "slurm").world_size == 4


def test_a_step_of_fewer_tasks_than_its_job() -> None:
    """``srun -n 1`` in an allocation of four tasks meets nobody."""
    step = {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    step["SLURM_JOB_NODELIST"] = "no-such-node.invalid"
    assert detect(step, "slurm") == ProcessInfo(local_rank=1)
    without_ntasks = {**SLURM, "SLURM_STEP_NUM_TASKS": "4"}
    del without_ntasks["SLURM_NPROCS"]
    assert detect(without_ntasks).world_size == 4
    only_ntasks = {**SLURM, "SLURM_NTASKS": "4"}
    del only_ntasks["SLURM_NPROCS"]
    assert detect(only_ntasks).world_size == 4


# The reserved numbers of slurm.h: an interactive allocation's shell and a batch script.
@pytest.mark.parametrize("step", ["4294967290", "4294967291"])
def test_the_shell_of_an_allocation_is_one_process(step: str) -> None:
    assert detect({**SLURM, "SLURM_STEP_ID": step}) == ProcessInfo()


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_is_none(value: str) -> None:
    emptied = dict.fromkeys((*TORCHRUN, "NPROC_PER_NODE"), value)
    assert detect(emptied) == ProcessInfo()
    assert torchrun_command(emptied, ["train.py"]) is None
    assert planned_world_size(emptied) == 1


def test_plain_python_is_one_process() -> None:
    assert detect({}) == ProcessInfo()
    batch_script = {
        name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"
    }
    assert detect(batch_script) == ProcessInfo(), (
        "a batch script that calls python without srun is one process"
    )
    batch_script["SLURM_NTASKS"] = "4"
    (warning,) = idle_tasks(batch_script, ProcessInfo())
    assert "4 tasks" in warning and "srun" in warning


@pytest.mark.parametrize(
    "env", [{}, {**SLURM, "SLURM_NTASKS": "1"}, {"SLURM_JOB_ID": "7"}]
)
def test_no_task_is_idle_in_a_step_or_outside_slurm(env: dict[str, str]) -> None:
    assert idle_tasks(env, ProcessInfo()) == []
    assert idle_tasks({**SLURM, "SLURM_NTASKS": "4"}, detect(SLURM)) == []


@pytest.mark.parametrize(
    ("env", "launcher", "message"),
    [
        (
            {},
            "torch",
            "torchrun variables are missing: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
        ),
        (
            {},
            "slurm",
            "slurm variables are missing: SLURM_PROCID, SLURM_LOCALID, SLURM_NPROCS, SLURM_JOB_NODELIST",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "auto",
            "missing: LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
        ),
        ({**TORCHRUN, "RANK": "x"}, "auto", "RANK='x' is not a number"),
        ({**TORCHRUN, "RANK": "-1"}, "auto", "RANK='-1' is not a number"),
        ({**TORCHRUN, "RANK": "8"}, "auto", "RANK=8 with WORLD_SIZE=8"),
        ({**TORCHRUN, "WORLD_SIZE": "1_0"}, "auto", "WORLD_SIZE='1_0' is not a number"),
        ({**TORCHRUN, "WORLD_SIZE": "9" * 20}, "auto", "999' is not a number"),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "1"},
            "auto",
            "LOCAL_RANK=1 with LOCAL_WORLD_SIZE=1",
        ),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "two"},
            "auto",
            "LOCAL_WORLD_SIZE='two' is not a number",
        ),
        (
            {**TORCHRUN, "MASTER_PORT": "http"},
            "auto",
            "MASTER_PORT='http' is not a number",
        ),
        ({**SLURM, "SLURM_PROCID": "4"}, "auto", "SLURM_PROCID=4 with SLURM_NPROCS=4"),
        (
            {**SLURM, "SLURM_JOB_NODELIST": "no-such-node.invalid"},
            "auto",
            "'no-such-node.invalid', does not resolve on this host",
        ),
        (TORCHRUN, "mpi", "unknown launcher 'mpi'"),
    ],
)
def test_wrong_variables_give_one_message(
    env: dict[str, str], launcher: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        detect(env, launcher)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9],x1", "gpu03"),
        ("a[7]", "a7"),
        ("rack[1-2]-node", "rack1-node"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def options(command: list[str] | None) -> list[str]:
    assert command is not None
    assert command[1:3] == ["-m", "evomesh.cli.supervise"]
    return command[3:]


def test_nproc_per_node_spawns() -> None:
    argv = ["evomesh", "train", "c.py"]
    assert options(torchrun_command({"NPROC_PER_NODE": "4"}, argv)) == [
        "--standalone",
        "--nproc_per_node=4",
        *argv,
    ]
    env = {
        "NPROC_PER_NODE": "4",
        "NNODES": "2",
        "NODE_RANK": "1",
        "ADDR": "10.0.0.1",
        "PORT": "29400",
    }
    assert options(torchrun_command(env, argv)) == [
        *(
            "--nnodes=2",
            "--node_rank=1",
            "--master_addr=10.0.0.1",
            "--master_port=29400",
            "--nproc_per_node=4",
        ),
        *argv,
    ]
    for changed, message in (
        ({"PORT": ""}, "no address where they connect"),
        ({"PORT": "99999"}, "PORT=99999 is not a port"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2 with NNODES=2"),
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE='gpu' is not a number"),
    ):
        with pytest.raises(UserError, match=message):
            torchrun_command({**env, **changed}, argv)


def test_aliyun_counts_nodes() -> None:
    env = {"KUBERNETES_CONTAINER_RESOURCE_GPU": "8", "WORLD_SIZE": "2", "RANK": "1"}
    env |= {"MASTER_ADDR": "dlc-master-0", "MASTER_PORT": "23456"}
    assert options(torchrun_command(env, ["train.py"])) == [
        *(
            "--nnodes=2",
            "--node_rank=1",
            "--master_addr=dlc-master-0",
            "--master_port=23456",
            "--nproc_per_node=8",
        ),
        "train.py",
    ]


def test_nothing_is_spawned_twice_or_for_one_process() -> None:
    assert torchrun_command({}, ["train.py"]) is None
    assert torchrun_command({"NPROC_PER_NODE": "1"}, ["train.py"]) is None
    assert torchrun_command({**TORCHRUN, "NPROC_PER_NODE": "4"}, ["train.py"]) is None
    assert torchrun_command({"NPROC_PER_NODE": "4"}, ["train.py"], "slurm") is None


ON_A_NODE = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "localhost,n2",
    "SLURM_NODEID": "1",
    "MASTER_PORT": "10007",
    "NPROC_PER_NODE": "4",
}


def test_one_task_of_srun_on_each_node_starts_the_ranks_of_its_node() -> None:
    assert options(torchrun_command(ON_A_NODE, ["train.py"])) == [
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=localhost",
        "--master_port=10007",
        "--nproc_per_node=4",
        "train.py",
    ]
    assert planned_world_size(ON_A_NODE) == 8
    # What the user sets counts; and with more tasks than nodes Slurm has started the ranks.
    alone = torchrun_command(ON_A_NODE | {"NNODES": "1"}, [])
    assert options(alone)[0] == "--standalone"
    more = torchrun_command(ON_A_NODE | {"SLURM_STEP_NUM_TASKS": "8"}, [])
    assert options(more)[0] == "--standalone"
