"""The commands ``evomesh train`` and InternEvo's ``train.py --config``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from evomesh.cli.run import run

OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a config value; repeatable."),
]
LauncherOption = Annotated[str, typer.Option(help="Where rank information comes from: auto, torch or slurm.")]
RendezvousPortOption = Annotated[int, typer.Option(help="Rendezvous port of the slurm launcher.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of the initial weights [default: the config's, else 1024].")
]
RunDirOption = Annotated[
    str | None, typer.Option("--run-dir", "--work-dir", help="Folder for log, metrics.jsonl and TensorBoard.")
]
ProfileOption = Annotated[
    bool,
    typer.Option(
        "--profile",
        "--profiling",
        help="Profile a few steps: trace files, and a table of where the time goes.",
    ),
]
DeepspeedOption = Annotated[
    str | None,
    typer.Option(help="XTuner's flag: deepspeed_zero1, 2 or 3, mapped to the equivalent settings here."),
]


def train(
    config: Annotated[str, typer.Argument(help="A Python config file, such as configs/demo.py.")],
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
    seed: SeedOption = None,
    run_dir: RunDirOption = None,
    profile: ProfileOption = False,
    deepspeed: DeepspeedOption = None,
) -> None:
    """Train the model that CONFIG describes; resumes automatically from the newest valid checkpoint."""
    from dataclasses import replace

    from evomesh.config.deepspeed import deepspeed_settings
    from evomesh.config.loader import load_config
    from evomesh.train.main import run_training

    extra = [f"seed={seed}"] if seed is not None else []
    extra += [f"run_dir={run_dir}"] if run_dir is not None else []
    zero, warnings = deepspeed_settings(deepspeed) if deepspeed is not None else ([], [])
    loaded = load_config(config, [*zero, *(overrides or []), *extra])
    loaded = replace(loaded, warnings=(*loaded.warnings, *warnings))
    code = run_training(loaded, launcher=launcher, port=port, profile=profile)
    if code:
        sys.exit(code)


def shim(
    config: Annotated[str, typer.Option("--config", help="A Python config file.")],
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
    seed: SeedOption = None,
    run_dir: RunDirOption = None,
    profile: ProfileOption = False,
    deepspeed: DeepspeedOption = None,
) -> None:
    """Train with InternEvo's command line: train.py --config CONFIG --launcher torch."""
    train(config, overrides, launcher, port, seed, run_dir, profile, deepspeed)


def shim_main() -> None:
    """Entry point of the repository's ``train.py``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(shim)
    run(app)
