"""``evomesh slurm``: write a batch script from a config, check it, and submit it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from evomesh.cli.options import OverrideOption
from evomesh.errors import EXIT_RESTART, UserError
from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.cluster.slurm import SlurmJob, Starter, Sweep
    from evomesh.config.schema import Config

SBATCH_LIMIT_S = 60


GpusPerNodeOption = Annotated[
    int, typer.Option("--gpus-per-node", min=1, help="GPUs, and ranks, of a node.")
]
NodesOption = Annotated[
    int | None, typer.Option(min=1, help="Number of nodes [default: 1].")
]
GpusOption = Annotated[
    int | None, typer.Option(min=1, help="GPUs of the run, instead of --nodes.")
]
TimeOption = Annotated[str, typer.Option(help="Time limit, as Slurm writes it.")]
PartitionOption = Annotated[
    str, typer.Option("--partition", "-p", help="[default: the cluster's]")
]
JobNameOption = Annotated[str, typer.Option(help="[default: JOB_NAME of the config]")]
StarterOption = Annotated[
    str, typer.Option(help="srun: a task per rank; torchrun: a task per node.")
]
SignalOption = Annotated[
    int,
    typer.Option(min=0, help="Seconds before the time limit at which the ranks save."),
]
SweepOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY=VALUE,...", help="A job array with one run for each value."
    ),
]
SbatchOption = Annotated[
    list[str] | None,
    typer.Option(help="Another option of sbatch, such as --sbatch=--exclude=n3."),
]


def slurm(
    config: Annotated[str, typer.Argument(help="A Python config file.")],
    gpus_per_node: GpusPerNodeOption = 8,
    nodes: NodesOption = None,
    gpus: GpusOption = None,
    time: TimeOption = "24:00:00",
    partition: PartitionOption = "",
    account: Annotated[str, typer.Option(help="Account to charge.")] = "",
    qos: Annotated[str, typer.Option(help="Quality of service.")] = "",
    job_name: JobNameOption = "",
    cpus_per_task: Annotated[int, typer.Option(min=0, help="CPU cores of a task.")] = 0,
    starter: StarterOption = "srun",
    signal_before: SignalOption = 300,
    requeue: Annotated[
        bool, typer.Option(help="Queue the job again after exit code 75.")
    ] = True,
    max_requeues: Annotated[
        int, typer.Option(min=1, help="How often a job is queued again.")
    ] = 100,
    sweep: SweepOption = None,
    sbatch: SbatchOption = None,
    overrides: OverrideOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the script here.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Call sbatch.")] = False,
) -> None:
    """Write the batch script that trains CONFIG on a Slurm cluster; print it, save it or submit it."""
    from evomesh.cluster.partitions import check_partition, read_partitions
    from evomesh.cluster.slurm import SlurmJob
    from evomesh.config.loader import load_config

    settings = overrides or []
    loaded = load_config(config, settings).config
    job = SlurmJob(
        config,
        _node_count(nodes, gpus, gpus_per_node),
        gpus_per_node,
        time=time,
        name=job_name or loaded.run.job_name,
        partition=partition,
        account=account,
        qos=qos,
        cpus_per_task=cpus_per_task,
        starter=_starter(starter),
        signal_before=signal_before,
        max_requeues=max_requeues if requeue else 0,
        sbatch=sbatch or (),
        overrides=settings,
        sweep=_sweep(sweep, config, settings, loaded),
    )
    _check(job, loaded)
    partitions = read_partitions()
    if partitions is not None:
        check_partition(job, partitions)
    _hand_over(job, output, submit)


def _sweep(
    text: str | None, config: str, settings: list[str], loaded: Config
) -> Sweep | None:
    """Return the sweep that --sweep asks for, if any; each of its values must give a valid config."""
    from evomesh.cluster.slurm import Sweep
    from evomesh.config.loader import load_config

    if text is None:
        return None
    sweep = Sweep.parse(text, loaded.ckpt.save_ckpt_folder)
    for value in sweep.values:
        load_config(config, [*settings, f"{sweep.key}={value}"])
    return sweep


def _node_count(nodes: int | None, gpus: int | None, gpus_per_node: int) -> int:
    """Return the number of nodes, from --nodes or --gpus."""
    if gpus is None:
        return nodes or 1
    if gpus % gpus_per_node:
        below = gpus - gpus % gpus_per_node
        near = [str(size) for size in (below, below + gpus_per_node) if size]
        raise UserError(
            f"{gpus} GPUs are not whole nodes of {gpus_per_node}",
            where="--gpus",
            expected=f"a multiple of --gpus-per-node: {' or '.join(near)}",
            fix=_smaller_nodes(gpus, gpus_per_node),
            code="EVO-CLUSTER-001",
        )
    needed = gpus // gpus_per_node
    if nodes not in (None, needed):
        raise UserError(
            f"{counted(gpus, 'GPU')} are {counted(needed, 'node')} of {gpus_per_node}, not {nodes}",
            where="--gpus, --nodes",
            fix="give one of them",
            code="EVO-CLUSTER-001",
        )
    return needed


def _smaller_nodes(gpus: int, gpus_per_node: int) -> str:
    """Return the option with which every node has as many GPUs, the most that one has."""
    sizes = range(1, gpus_per_node + 1)
    largest = max(size for size in sizes if gpus % size == 0)
    return f"give all nodes as many GPUs: --gpus-per-node {largest}"


def _starter(text: str) -> Starter:
    from evomesh.cluster.slurm import Starter

    if text not in get_args(Starter):
        raise UserError(
            f"unknown starter {text!r}",
            where="--starter",
            expected="srun | torchrun",
            code="EVO-CLI-002",
        )
    return cast("Starter", text)


def _check(job: SlurmJob, config: Config) -> None:
    """Check the layout against the number of ranks, and the times; print what is only likely to be a mistake.

    Raises:
        UserError: the ranks do not divide, the time is no time, or there is none to save in.
    """
    from evomesh.cluster.slurm_time import seconds_of
    from evomesh.config.layout import check_world
    from evomesh.config.saving import restart_warning

    warnings = check_world(config, job.nodes * job.gpus_per_node)
    limit_s = seconds_of(job.time)
    if job.signal_before >= limit_s:
        raise UserError(
            f"the ranks would save {job.signal_before} s before a time limit of {limit_s:.0f} s",
            where="--time, --signal-before",
            expected="a time limit that leaves time to train; --time 24 is 24 minutes, --time 24:00:00 a day",
            code="EVO-CLUSTER-002",
        )
    tensor = config.parallel.tensor.size
    if job.nodes > 1 and job.gpus_per_node % tensor:
        warnings.append(
            f"parallel.tensor.size={tensor} does not divide the {job.gpus_per_node} GPUs of a node: "
            "some tensor groups cross nodes, which is slow"
        )
    unsaved = restart_warning(config.ckpt)
    if unsaved is not None and job.max_requeues:
        warnings.append(unsaved)
    for words in warnings:
        typer.echo(f"warning: {words}", err=True)


def _hand_over(job: SlurmJob, output: Path | None, submit: bool) -> None:
    """Print, write or submit the script."""
    script = job.script()
    if output is not None:
        output.write_text(script, encoding="utf-8")
    if submit:
        number = _submit(script)
        typer.echo(f"submitted: job {number}")
        typer.echo(f"  follow it:  squeue --job {number}; tail -F {job.log(number)}")
        typer.echo(f"  stop it:    scancel {number}   (saves; it is not queued again)")
    elif output is not None:
        typer.echo(f"{output}: submit it with: sbatch {output}")
    else:
        typer.echo(script, nl=False)


def _submit(script: str) -> str:
    """Give a script to sbatch and return the number of the job.

    Raises:
        UserError: sbatch is absent, refuses the job or does not answer.
    """
    if not shutil.which("sbatch"):
        raise UserError(
            "sbatch is not on the PATH",
            where="--submit",
            expected="a login node of a Slurm cluster",
            fix="write the script with --output FILE, and submit it there: sbatch FILE",
            code="EVO-CLUSTER-003",
        )
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            capture_output=True,
            text=True,
            check=False,
            timeout=SBATCH_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch did not answer within {SBATCH_LIMIT_S} s",
            where="--submit",
            fix="see whether the controller runs: scontrol ping; then whether the job is there: squeue --me",
            exit_code=EXIT_RESTART,
            code="EVO-CLUSTER-003",
        ) from None
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise UserError(
            f"sbatch refused the job: {reason}",
            where="--submit",
            code="EVO-CLUSTER-003",
        )
    # With several clusters it is NUMBER;CLUSTER.
    return done.stdout.strip().partition(";")[0]
