"""A Slurm job and its batch script, which ``evomesh slurm`` prints; those in ``launch/slurm`` are written here too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from evomesh.errors import EXIT_RESTART, UserError

Starter = Literal["srun", "torchrun"]

# What ``srun`` returns when a restart may help: stopped and saved, or 128 + the signal
# that killed a rank: SIGHUP, SIGABRT, SIGBUS, SIGKILL, SIGUSR1, SIGSEGV, SIGTERM. A rank that
# gets one of those that ask it to save while Python itself still starts is killed by it.
RESTART_CODES = (EXIT_RESTART, 129, 134, 135, 137, 138, 139, 143)


@dataclass(frozen=True)
class Sweep:
    """One run for each value of a config key: a job array.

    Attributes:
        key: the config key, such as ``adam.lr``.
        save_folder: each run saves in a folder below it, named after its value.
    """

    key: str
    values: Sequence[str]
    save_folder: str

    @staticmethod
    def parse(text: str, save_folder: str | None) -> Sweep:
        """Read ``adam.lr=1e-4,3e-4``.

        Raises:
            UserError: no key, no values, or one twice.
        """
        key, _, listed = text.partition("=")
        values = listed.split(",")
        if not re.fullmatch(r"[\w.]+", key) or "" in values:
            raise UserError(
                f"{text!r} is not a sweep",
                where="--sweep",
                expected="KEY=VALUE,VALUE,..., such as --sweep adam.lr=1e-4,3e-4",
                code="EVO-CLUSTER-005",
            )
        if len(set(values)) < len(values):
            raise UserError(
                f"{text!r} has a value twice",
                where="--sweep",
                expected="different values: each names the folder of its run",
                code="EVO-CLUSTER-005",
            )
        return Sweep(key, values, save_folder or "local:sweep")


@dataclass(frozen=True)
class SlurmJob:
    """A job: what its batch script asks of Slurm, and what it starts.

    Attributes:
        time: limit, as Slurm writes it.
        starter: "srun" starts one task per rank; "torchrun" one per node, which starts the ranks of its node.
        signal_before: seconds before the time limit at which the ranks are asked to save.
        max_requeues: lives of the job after the first; 0 is none.
        sbatch: further options of ``sbatch``, such as ``--exclude=n3``.
        overrides: ``--set`` options of ``evomesh train``.
    """

    config: str
    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    name: str = "evomesh"
    partition: str = ""
    account: str = ""
    qos: str = ""
    cpus_per_task: int = 0
    starter: Starter = "srun"
    signal_before: int = 300
    max_requeues: int = 100
    sbatch: Sequence[str] = ()
    overrides: Sequence[str] = field(default=())
    sweep: Sweep | None = None

    def __post_init__(self) -> None:
        """Refuse values that would end their line of the script."""
        words = {
            "--partition": self.partition,
            "--account": self.account,
            "--qos": self.qos,
            "--job-name": self.name,
        }
        words |= {f"--sbatch {option}": option for option in self.sbatch}
        for option, value in words.items():
            if re.search(r"\s", value) or not value.isprintable():
                raise UserError(
                    f"{value!r} is not one word",
                    where=option.partition(" ")[0],
                    code="EVO-CLI-002",
                )
        for option in self.sbatch:
            if not option.startswith("-"):
                raise UserError(
                    f"{option!r} is not an option of sbatch",
                    where="--sbatch",
                    expected="such as --sbatch=--exclude=n3",
                    code="EVO-CLI-002",
                )

    @property
    def output(self) -> str:
        """File that all lives of a job print to: %x is its name, %j its number, %A and %a those of an array."""
        return "%x-%A_%a.out" if self.sweep else "%x-%j.out"

    def log(self, number: str) -> str:
        """Return the output file of a submitted job; of an array, that of its first task."""
        known = {"%x": self.name, "%j": number, "%A": number, "%a": "0"}
        return re.sub("%.", lambda match: known[match[0]], self.output)

    def script(self) -> str:
        """Return the batch script."""
        parts = [self._header(), self._settings(), self._start(), _END]
        if self.max_requeues:
            codes = " | ".join(map(str, RESTART_CODES))
            parts[-1:] = [_REQUEUE.format(codes=codes, most=self.max_requeues), _END]
        return "\n".join(parts)

    def _header(self) -> str:
        """Return the comment lines and the options of sbatch."""
        tasks = 1
        if self.starter == "srun":
            tasks = self.gpus_per_node
        options = {
            "job-name": self.name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "nodes": self.nodes,
            "ntasks-per-node": tasks,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "signal": f"USR1@{self.signal_before}" if self.signal_before else "",
            "output": self.output,
            "open-mode": "append",
        }
        if self.sweep is not None:
            options["array"] = f"0-{len(self.sweep.values) - 1}"
        lines = [f"--{name}={value}" for name, value in options.items() if value]
        lines.append("--requeue" if self.max_requeues else "--no-requeue")
        lines += self.sbatch
        return _HEADER + "".join(f"#SBATCH {line}\n" for line in lines)

    def _settings(self) -> str:
        config = shlex.quote(self.config)
        options = ""
        for override in self.overrides:
            options += f"--set {shlex.quote(override)} "
        return _SETTINGS.format(config=config, options=options)

    def _start(self) -> str:
        """Return the lines that start the ranks."""
        lines = _WAITS if self.max_requeues else _WAITS_ONLY
        if self.sweep is not None:
            values = " ".join(shlex.quote(value) for value in self.sweep.values)
            lines += _SWEEP.format(
                key=self.sweep.key,
                values=values,
                folder=shlex.quote(self.sweep.save_folder),
            )
        if self.starter == "torchrun":
            lines += _ONE_TASK_PER_NODE.format(gpus=self.gpus_per_node)
        else:
            lines += _ONE_TASK_PER_RANK
        return lines + _SRUN


_HEADER = """\
#!/bin/bash
# Train with evomesh: sbatch [OPTIONS OF sbatch] FILE [CONFIG [OPTIONS OF evomesh train]]
# What is given on the command line overrides the lines below.
"""

_SETTINGS = """\
set -u
config=${{1:-{config}}}
shift || true
options=({options}"$@")

job=$SLURM_JOB_ID
if [ -n "${{SLURM_ARRAY_JOB_ID:-}}" ]; then # one task's number is that of the whole array too
  job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
fi

# Two jobs that share a node need two ports.
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
"""

_WAITS_ONLY = """\
# The signals that ask the ranks to save reach this shell too, which waits for them.
trap : TERM USR1

"""

_WAITS = """\
# Slurm tells this shell to end if the job was canceled, was requeued by an operator, or is out
# of time. It tells the ranks as well: the shell waits until they have saved, and leaves the job alone.
is_ended=no
trap 'is_ended=yes' TERM
# The signal of --signal reaches this shell too. It is for the ranks, which save: the shell keeps waiting.
trap : USR1

"""

_SWEEP = """\
# One value each: task 0 of the array takes the first.
values=({values})
value=${{values[$SLURM_ARRAY_TASK_ID]}}
save_folder={folder}
run_name={key}=$value
options+=(--set "{key}=$value" --set "ckpt.save_ckpt_folder=$save_folder/$run_name"
  --run-dir "RUN/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID/$run_name")

"""

_ONE_TASK_PER_RANK = """\
# One task per rank. If one of them is lost, the others name it and end by themselves.
"""

_ONE_TASK_PER_NODE = """\
# One task per node, which starts the ranks of its node; evomesh reads the nodes from Slurm.
export NPROC_PER_NODE={gpus}
"""

_SRUN = """\
echo "job $job on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}: $config"
srun --kill-on-bad-exit=0 --wait=600 evomesh train "$config" "${options[@]}"
code=$?
"""

_REQUEUE = """\
# 75: stopped and saved, or a rank was lost. Above 128: a signal killed a rank. A user's mistake (2)
# or a bug (1) would only happen again.
case $code in
  {codes})
    if [ "$is_ended" = no ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
      echo "srun ended with $code: job $job is queued again, and resumes if it has saved"
      scontrol requeue "$job"
    fi
    ;;
esac
"""

_END = """\
exit "$code"
"""
