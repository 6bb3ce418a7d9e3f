"""Batch scripts and what is checked before one is written: time limits, partitions, layouts."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest

from evomesh.cluster.partitions import Partition, check_partition
from evomesh.cluster.slurm import SlurmJob, Sweep
from evomesh.cluster.slurm_time import seconds_of
from evomesh.errors import UserError
from tools import launch_scripts

PARTITIONS = [
    Partition("llm", "2-00:00:00", 4, 8, is_default=True),
    Partition("llm", "2-00:00:00", 2, 0, is_default=True),
    Partition("debug", "30:00", 1, 2),
]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30 * 60),
        ("30:15", 30 * 60 + 15),
        ("1:30:15", 3600 + 30 * 60 + 15),
        ("2-0", 2 * 86400),
        ("0-1:30", 3600 + 30 * 60),
        ("1-2:3:4", 86400 + 2 * 3600 + 3 * 60 + 4),
        ("UNLIMITED", math.inf),
    ],
)
def test_a_time_limit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "1h", "1:2:3:4", "-1", "1.5", "0", "0:00:00", "１０", "1-", "24:00:", " 3"],
)
def test_no_time_limit(text: str) -> None:
    with pytest.raises(UserError, match=r"--time: .* is not a time limit\n.*MINUTES"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (SlurmJob("c.py", partition="lmm"), "no partition 'lmm'\n  expected: one of llm, debug"),
        (SlurmJob("c.py", nodes=5), "partition 'llm' has 4 nodes with 8 GPUs, not 5"),
        (SlurmJob("c.py", gpus_per_node=16), "the nodes of partition 'llm' have 8 GPUs at most, not 16"),
        (SlurmJob("c.py", time="3-0"), "3-0 is more than partition 'llm' allows, which is 2-00:00:00"),
        (SlurmJob("c.py", partition="debug", gpus_per_node=2, time="1:00:00"), "more than partition 'debug' allows"),
    ],
)  # fmt: skip
def test_a_job_that_its_partition_cannot_run(job: SlurmJob, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_partition(job, PARTITIONS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("gpus", "others", "expected"),
    [
        (4, [Partition("big", "1-0", 2, 8, False)], "up to 4, or another partition: big"),
        (4, [], "up to 4"),
        (0, [Partition("big", "1-0", 2, 8, False)], "another partition: big"),
        (0, [], "nodes with GPUs, which no partition here has"),
    ],
)  # fmt: skip
def test_what_is_expected_never_names_the_same_partition(
    gpus: int, others: list[Partition], expected: str
) -> None:
    partitions = [Partition("llm", "1-0", 4, gpus, True), *others]
    with pytest.raises(UserError) as error:
        check_partition(SlurmJob("c.py", gpus_per_node=8), partitions)
    assert error.value.expected == expected


def test_a_job_that_fits() -> None:
    check_partition(SlurmJob("c.py", nodes=4, time="2-0"), PARTITIONS)
    check_partition(
        SlurmJob("c.py", partition="debug", gpus_per_node=2, time="30"), PARTITIONS
    )


@pytest.mark.parametrize("option", ["partition", "account", "qos", "name"])
def test_a_value_cannot_add_a_line_to_the_script(option: str) -> None:
    with pytest.raises(UserError, match="is not one word"):
        SlurmJob("c.py", **{option: "a\n#SBATCH --nodes=9"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not one word"):
        SlurmJob("c.py", sbatch=("--exclude=n1\nrm",))


@pytest.mark.parametrize("text", ["adam.lr", "adam.lr=", "=1", "adam.lr=1,,2", "a;b=1"])
def test_no_sweep(text: str) -> None:
    with pytest.raises(UserError, match="is not a sweep"):
        Sweep.parse(text, None)
    with pytest.raises(UserError, match="has a value twice"):
        Sweep.parse("adam.lr=1,2,1", None)


def options(job: SlurmJob) -> list[str]:
    """The options of sbatch in a script."""
    lines = job.script().splitlines()
    return [
        line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")
    ]


def test_what_a_script_asks_for() -> None:
    full = SlurmJob(
        "c.py", 4, 8, "1-0", "run", "llm", "lab", "high", 12, "srun", 600, 5, ("--exclude=n3",)
    )  # fmt: skip
    assert options(full) == [
        "--job-name=run", "--partition=llm", "--account=lab", "--qos=high", "--nodes=4", "--ntasks-per-node=8",
        "--gpus-per-node=8", "--cpus-per-task=12", "--time=1-0", "--signal=USR1@600", "--output=%x-%j.out",
        "--open-mode=append", "--requeue", "--exclude=n3",
    ]  # fmt: skip
    plain = SlurmJob("c.py", starter="torchrun", signal_before=0, max_requeues=0)
    assert options(plain) == [
        "--job-name=evomesh", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=24:00:00",
        "--output=%x-%j.out", "--open-mode=append", "--no-requeue",
    ]  # fmt: skip
    assert "scontrol requeue" not in plain.script()


RUN = """
srun() {{ printf '%s|' "$@"; printf 'port=%s\\n' "$MASTER_PORT"; return {code}; }}
scontrol() {{ echo "requeued $2"; }}
"""


def run_script(
    job: SlurmJob, folder: Path, code: int, *arguments: str, **env: str
) -> str:
    """What the script prints when srun and scontrol are functions of the shell."""
    (folder / "job.sh").write_text(RUN.format(code=code) + job.script())
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NAME": "x"}
    done = subprocess.run(
        ["bash", "job.sh", *arguments],
        cwd=folder,
        env=variables | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [
        (0, "0", False), (1, "0", False), (2, "0", False), (6, "0", False), (130, "0", False),
        (75, "0", True), (129, "0", True), (138, "0", True), (137, "99", True), (75, "100", False),
    ],
)  # fmt: skip
def test_which_ends_are_requeued(
    tmp_path: Path, code: int, restarts: str, is_requeued: bool
) -> None:
    printed = run_script(SlurmJob("c.py"), tmp_path, code, SLURM_RESTART_COUNT=restarts)
    assert ("requeued 7" in printed) == is_requeued


def test_words_reach_the_command_as_they_are(tmp_path: Path) -> None:
    job = SlurmJob("my config.py", overrides=("JOB_NAME=it's $HOME",))
    start = ["--kill-on-bad-exit=0", "--wait=600", "evomesh", "train"]
    printed = run_script(job, tmp_path, 0).splitlines()[-1]
    words = [*start, "my config.py", "--set", "JOB_NAME=it's $HOME", "port=10007"]
    assert printed == "|".join(words)
    printed = run_script(job, tmp_path, 0, "other.py", "--seed", "3").splitlines()[-1]
    words = [*start, "other.py", *words[5:7], "--seed", "3", "port=10007"]
    assert printed == "|".join(words)


@pytest.mark.parametrize("name", launch_scripts.JOBS)
def test_the_shipped_scripts_are_what_the_command_writes(name: str) -> None:
    script = (launch_scripts.FOLDER / name).read_text()
    assert script == launch_scripts.JOBS[name].script(), (
        "python tools/launch_scripts.py"
    )


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs Debian's shellcheck")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    files = []
    for number, job in enumerate(
        [*launch_scripts.JOBS.values(), SlurmJob("c.py", max_requeues=0)]
    ):
        files.append(tmp_path / f"{number}.sh")
        files[-1].write_text(job.script())
    done = subprocess.run(
        ["shellcheck", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
