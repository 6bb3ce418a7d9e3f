"""``evomesh xtuner train``: XTuner's options as settings of a config, which may be XTuner's or ours."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from evomesh.cli.usage import ExplainedParser

if TYPE_CHECKING:
    from evomesh.config.loader import LoadedConfig

LAUNCHERS = {"none": "auto", "pytorch": "torch", "slurm": "slurm"}
NEWEST = "newest"  # of work_dir: --resume without a path


def train(context: typer.Context) -> None:
    """Train the model that CONFIG describes: a file, or a name that list-cfg prints."""
    from evomesh.cli.config import find_named_config
    from evomesh.cli.xtuner_data import make_token_files
    from evomesh.train.job import reporting_early_errors
    from evomesh.train.main import run_training

    options = _parser().parse_args(context.args)
    launcher = LAUNCHERS[options.launcher]
    with reporting_early_errors(launcher, options.port):
        path = find_named_config(options.config)
        loaded = load_with_strategy(
            path, train_overrides(path, options), options.deepspeed, launcher
        )
        make_token_files(loaded)
    code = run_training(loaded, launcher=launcher, port=options.port)
    if code:
        sys.exit(code)


def _parser() -> ExplainedParser:
    parser = ExplainedParser(
        prog="evomesh xtuner train",
        description="Train the model that CONFIG describes; NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT start "
        "several processes.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config",
        help="a config file of XTuner or evomesh, or a name that list-cfg prints",
    )
    parser.add_argument(
        "--work-dir", help="folder of checkpoints and logs [default: ./work_dirs/NAME]"
    )
    parser.add_argument(
        "--deepspeed",
        help="deepspeed_zero1, 2 or 3, or a DeepSpeed JSON file with a stage",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="PATH",
        help="continue from a checkpoint; without PATH from the newest in the work folder, if there is one",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of the initial weights; the data order keeps 1024",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values of the config, by XTuner's keys or evomesh's",
    )
    parser.add_argument(
        "--accept-schedule-change",
        action="store_true",
        help="resume although the learning rate then jumps to another curve",
    )
    parser.add_argument(
        "--launcher",
        choices=list(LAUNCHERS),
        default="none",
        help="who started the processes",
    )
    parser.add_argument(
        "--port", type=int, default=8888, help="rendezvous port of the slurm launcher"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )
    return parser


def train_overrides(path: str, options: argparse.Namespace) -> list[str]:
    """Return XTuner's options as overrides, in the names of the config's own system."""
    from evomesh.config.reading.xtuner.file import is_xtuner_file

    is_theirs = is_xtuner_file(path)
    overrides = list(options.cfg_options)
    if options.work_dir is not None:
        folder = options.work_dir
        ours = [f"run_dir={folder!r}", f"ckpt.save_ckpt_folder={f'local:{folder}'!r}"]
        overrides += [f"work_dir={folder!r}"] if is_theirs else ours
    if options.seed is not None:
        overrides.append(f"{'randomness.' if is_theirs else ''}seed={options.seed}")
    if options.accept_schedule_change:
        overrides.append("ckpt.accept_schedule_change=True")
    if options.resume is not None:
        overrides += _resume_overrides(options.resume, is_theirs)
    return overrides


def _resume_overrides(path: str, is_theirs: bool) -> list[str]:
    if is_theirs:
        return ["resume=True"] + ([f"load_from={path!r}"] if path != NEWEST else [])
    if path == NEWEST:
        return ["ckpt.auto_resume=True"]
    return [
        "ckpt.auto_resume=False",
        f"ckpt.load_ckpt_info=dict(path={path!r}, content='all')",
    ]


def load_with_strategy(
    path: str, overrides: list[str], deepspeed: str | None, launcher: str
) -> LoadedConfig:
    """Load a config with the settings of a DeepSpeed strategy, which depend on its layout."""
    from evomesh.config.deepspeed import deepspeed_settings
    from evomesh.config.loader import load_config

    loaded = load_config(path, overrides)
    if deepspeed is None:
        return loaded
    from evomesh.train.launchers import planned_world_size

    world_size = planned_world_size(os.environ, launcher)
    settings, warnings = deepspeed_settings(deepspeed, loaded.config, world_size)
    # Before the overrides, which win.
    loaded = load_config(path, [*settings, *overrides])
    all_warnings = (*loaded.warnings, *warnings)
    return replace(loaded, warnings=all_warnings)
