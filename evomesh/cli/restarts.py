"""``evomesh run``: a training run that is started again after what a restart can cure."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.options import LauncherOption, OverrideOption, RendezvousPortOption
from evomesh.cli.train import DeepspeedOption, ProfileOption, RunDirOption, SeedOption

if TYPE_CHECKING:
    from evomesh.config.schema import Config
    from evomesh.storage.base import StorageLock
    from evomesh.train.step_file import RunPosition

# Where one of them is set and not 0, another process is the first of the job.
INDICES = ("RANK", "SLURM_PROCID", "NODE_RANK")
LOCK = ".supervisor"
OWN_OPTIONS = ("--max-restarts", "--nproc", "--restart-pause")

MaxRestartsOption = Annotated[
    int, typer.Option(min=0, help="How often the run is started again.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Ranks on this node, as NPROC_PER_NODE."),
]
RestartPauseOption = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Seconds before the first restart; doubled while the run gets no further.",
    ),
]


def run(
    config: Annotated[
        str, typer.Argument(help="A Python config file, such as configs/demo.py.")
    ],
    max_restarts: MaxRestartsOption = 10,
    nproc: ProcessesOption = None,
    restart_pause: RestartPauseOption = 5.0,
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
    seed: SeedOption = None,
    run_dir: RunDirOption = None,
    profile: ProfileOption = False,
    deepspeed: DeepspeedOption = None,
) -> None:
    """Train like `evomesh train`, and restart from the newest checkpoint after a crash or a lost rank."""
    from evomesh.config.loader import load_config
    from evomesh.monitor.log import setup_logging
    from evomesh.train.supervisor import ExitHistory, RestartPolicy, Supervisor

    setup_logging()
    settings = list(overrides or [])
    if run_dir is not None:
        settings.append(f"run_dir={run_dir}")
    loaded = load_config(config, settings)
    refuse_without_checkpoints(loaded.config)
    is_first = is_first_of_job(os.environ)
    # Held until this process ends.
    lock = claim_run(loaded.config) if is_first else None
    env = dict(os.environ)
    if nproc is not None:
        env["NPROC_PER_NODE"] = str(nproc)

    def report(text: str, position: RunPosition) -> None:
        if is_first:
            _raise_alert(loaded.config, text, position)

    supervisor = Supervisor(
        [sys.executable, "-m", "evomesh", "train", *train_arguments(sys.argv)],
        RestartPolicy(max_restarts, restart_pause),
        history=ExitHistory(writes=is_first),
        report=report,
        env=env,
    )
    try:
        code = supervisor.run()
    finally:
        if lock is not None:
            lock.release()
    if code:
        sys.exit(code)


def train_arguments(words: list[str]) -> list[str]:
    """Return the words after ``run`` that ``evomesh train`` takes: all but the supervisor's own options."""
    kept = []
    skips_value = False
    for word in words[words.index("run") + 1 :]:
        name, has_value, _ = word.partition("=")
        if skips_value:
            skips_value = False
        elif name in OWN_OPTIONS:
            skips_value = not has_value
        else:
            kept.append(word)
    return kept


def is_first_of_job(env: Mapping[str, str]) -> bool:
    """Return whether this process supervises the first rank or node of its job, and therefore speaks for it."""
    return all(env.get(name, "").strip() in ("", "0") for name in INDICES)


def refuse_without_checkpoints(config: Config) -> None:
    """Refuse a run that every restart would begin again.

    Raises:
        UserError: it saves nothing, or does not resume.
    """
    from evomesh.errors import UserError

    ckpt = config.ckpt
    if not ckpt.enable_save_ckpt or ckpt.save_ckpt_folder is None:
        raise UserError(
            "nothing is saved, so that each restart would begin with step 0",
            where="ckpt.enable_save_ckpt, ckpt.save_ckpt_folder",
            expected="a save folder",
            fix='set ckpt=dict(enable_save_ckpt=True, save_ckpt_folder="local:ckpts"), or use: evomesh train',
            code="EVO-TRAIN-006",
        )
    if not ckpt.auto_resume:
        raise UserError(
            "False: each restart would begin where the first start did",
            where="ckpt.auto_resume",
            fix="set ckpt.auto_resume=True, or use: evomesh train",
            code="EVO-TRAIN-006",
        )


def claim_run(config: Config) -> StorageLock:
    """Make this the one supervisor of the run's save folder.

    Raises:
        UserError: another one lives, or the folder cannot be written.
    """
    from evomesh.errors import UserError
    from evomesh.outside_errors import as_user_error
    from evomesh.storage.base import LockTakenError, join
    from evomesh.storage.urls import open_storage

    folder = config.ckpt.save_ckpt_folder
    assert folder is not None
    storage, root = open_storage(folder)
    holder = f"evomesh run, process {os.getpid()} on {socket.gethostname()}"
    try:
        storage.make_folder(root)
        return storage.lock(join(root, LOCK), holder)
    except LockTakenError as taken:
        raise UserError(
            f"another supervisor runs this job: {taken.holder}",
            where=f"ckpt.save_ckpt_folder ({folder})",
            expected="one supervisor of a save folder",
            fix="stop that one, or set another ckpt.save_ckpt_folder",
            code="EVO-CKPT-011",
        ) from None
    except OSError as error:
        raise as_user_error(error) or error from None


def _raise_alert(config: Config, text: str, position: RunPosition) -> None:
    """Send what a run that was killed cannot send itself."""
    from evomesh.monitor.alerts.center import AlertCenter

    center = AlertCenter.beside_run(
        config.monitor.alert, config.run.job_name, position.run_folder
    )
    center.raise_alert("crash", text)
    center.close()
