"""The commands ``evomesh train`` and InternEvo's ``train.py --config``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from evomesh.cli.options import LauncherOption, OverrideOption, RendezvousPortOption

SeedOption = Annotated[
    int | None,
    typer.Option(
        help="Seed of the initial weights [default: the config's, else 1024]."
    ),
]
RunDirOption = Annotated[
    str | None,
    typer.Option(
        "--run-dir", "--work-dir", help="Folder for log, metrics.jsonl and TensorBoard."
    ),
]
ProfileOption = Annotated[
    bool,
    typer.Option(
        "--profile",
        "--profiling",
        help="Profile a few steps: write trace files and a table of where the time goes.",
    ),
]
MemoryProfileOption = Annotated[
    bool,
    typer.Option(
        "--memory-profile",
        help="Write each step's peak of memory by kind, and the largest tensors if memory runs out.",
    ),
]
DeepspeedOption = Annotated[
    str | None,
    typer.Option(
        help="XTuner's flag: deepspeed_zero1, 2 or 3; sets parallel.zero1 to the equivalent."
    ),
]
AcceptScheduleOption = Annotated[
    bool,
    typer.Option(
        "--accept-schedule-change",
        help="Resume although the learning rate then jumps to another curve.",
    ),
]
# Options that InternEvo's train.py takes and never reads: launcher scripts pass them.
HostOption = Annotated[str | None, typer.Option("--host", hidden=True)]
BackendOption = Annotated[str | None, typer.Option("--backend", hidden=True)]
WorldSizeOption = Annotated[int | None, typer.Option("--world_size", hidden=True)]
RankOption = Annotated[int | None, typer.Option("--rank", hidden=True)]
LocalRankOption = Annotated[
    int | None, typer.Option("--local_rank", "--local-rank", hidden=True)
]
AliTopologyOption = Annotated[bool, typer.Option("--enable_ali_topology", hidden=True)]
VolcTopologyOption = Annotated[
    bool, typer.Option("--disable_volc_topology", hidden=True)
]


def train(
    config: Annotated[
        str, typer.Argument(help="A Python config file, such as configs/demo.py.")
    ],
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
    seed: SeedOption = None,
    run_dir: RunDirOption = None,
    profile: ProfileOption = False,
    memory_profile: MemoryProfileOption = False,
    deepspeed: DeepspeedOption = None,
    accept_schedule_change: AcceptScheduleOption = False,
) -> None:
    """Train the model that CONFIG describes. Resumes from the newest valid checkpoint in the save folder."""
    from evomesh.cli.xtuner_data import make_token_files
    from evomesh.cli.xtuner_train import load_with_strategy
    from evomesh.train.job import reporting_early_errors
    from evomesh.train.main import run_training

    # Later overrides win: --set over the settings of --deepspeed, the other options
    # over --set.
    settings = list(overrides or [])
    if seed is not None:
        settings.append(f"seed={seed}")
    if run_dir is not None:
        settings.append(f"run_dir={run_dir}")
    if accept_schedule_change:
        settings.append("ckpt.accept_schedule_change=True")
    with reporting_early_errors(launcher, port):
        loaded = load_with_strategy(config, settings, deepspeed, launcher)
        make_token_files(loaded)
    exit_code = run_training(
        loaded,
        launcher=launcher,
        port=port,
        profile=profile,
        memory_profile=memory_profile,
    )
    if exit_code:
        sys.exit(exit_code)


def shim(
    config: Annotated[str, typer.Option("--config", help="A Python config file.")],
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
    seed: SeedOption = None,
    run_dir: RunDirOption = None,
    profile: ProfileOption = False,
    memory_profile: MemoryProfileOption = False,
    deepspeed: DeepspeedOption = None,
    accept_schedule_change: AcceptScheduleOption = False,
    host: HostOption = None,
    backend: BackendOption = None,
    world_size: WorldSizeOption = None,
    rank: RankOption = None,
    local_rank: LocalRankOption = None,
    enable_ali_topology: AliTopologyOption = False,
    disable_volc_topology: VolcTopologyOption = False,
) -> None:
    """Train with InternEvo's command line: train.py --config CONFIG --launcher torch."""
    train(
        config,
        overrides,
        launcher,
        port,
        seed,
        run_dir,
        profile,
        memory_profile,
        deepspeed,
        accept_schedule_change,
    )
