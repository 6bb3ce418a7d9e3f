"""Folders and files that a config names and that are not here, as warnings of ``evomesh config check``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.config.loader import LoadedConfig
    from evomesh.config.schema import Config

TOKENIZER = "data.tokenizer_path"
RAW_DATA = "train_dataloader.dataset, raw data"
HERE = "a run started here would end with this"


def path_warnings(loaded: LoadedConfig) -> list[str]:
    """Return what a run of this config would not find if it were started on this machine, in this folder.

    They are warnings: a config may be checked where its data is not.
    """
    from evomesh.data.config_folders import (
        absent_tokenizer,
        other_tokenizer,
        start_refusals,
    )

    config = loaded.config
    makes_token_files = bool(loaded.preparation)
    refusals = start_refusals(config.data, makes_token_files=makes_token_files)
    places = {refusal.where for refusal in refusals}
    refusals += _refused_raw_data(loaded)
    refusals += _refused_checkpoints(loaded)
    warnings = [_in_words(refusal) for refusal in refusals]
    if TOKENIZER not in places:
        warnings += absent_tokenizer(config.data)
        warnings += other_tokenizer(config.data)
    return warnings


def _in_words(refusal: UserError) -> str:
    """Return the message on one line, with the folder that a relative path is seen from."""
    place = f"{refusal.where}: " if refusal.where else ""
    here = os.getcwd()
    fix = refusal.fix or f"correct the path; a relative one is seen from {here}"
    text = f"{place}{refusal.found}; {fix} ({HERE})"
    return " ".join(text.split())


def _refused_raw_data(loaded: LoadedConfig) -> list[UserError]:
    """Return the errors of raw data that a run would make token files of, where it is not there."""
    from evomesh.config.reading.xtuner.tokenize_command import output_of, sources_of

    refusals = []
    for command in loaded.preparation:
        if output_of(command).exists():
            continue
        # Imports numpy.
        from evomesh.data.records.source_files import find_source_files

        try:
            find_source_files(sources_of(command))
        except UserError as refusal:
            refusal.where = RAW_DATA
            refusals.append(refusal)
    return refusals


def _refused_checkpoints(loaded: LoadedConfig) -> list[UserError]:
    """Return the errors of the checkpoints that a run would read, where there is none."""
    refusals = []
    for key, (path, ckpt_type) in _named_checkpoints(loaded.config).items():
        refusal = _refusal_of(path, ckpt_type)
        if refusal is None:
            continue
        # The model of an XTuner config has been warned of.
        advice = f"hf download {path}"
        if any(advice in words for words in loaded.warnings):
            continue
        refusal.where = f"{key} ({path})"
        refusals.append(refusal)
    return refusals


def _named_checkpoints(config: Config) -> dict[str, tuple[str, str]]:
    """Return key -> path and type of each checkpoint that a run would begin with; none if it would resume."""
    named: dict[str, tuple[str, str]] = {}
    ckpt = config.ckpt
    if ckpt.auto_resume and _has_steps(ckpt.save_ckpt_folder):
        return named
    info = ckpt.load_ckpt_info
    looks_there = not ckpt.auto_resume
    if info is not None and info.fallback:
        looks_there = True
    if info is not None and looks_there:
        source = (info.path, info.ckpt_type)
        named["ckpt.load_ckpt_info"] = source
    branch = config.lr_scheduler.branch
    if branch is not None:
        source = (branch, "evomesh")
        named["lr_scheduler.decay_from"] = source
    return named


def _has_steps(save_folder: str | None) -> bool:
    """Return whether a folder of this machine has steps of a run."""
    from evomesh.config.user import expand_home
    from evomesh.storage.urls import split_url

    if save_folder is None:
        return False
    scheme, name = split_url(save_folder)
    if scheme != "local":
        return False
    return any(expand_home(name).glob("step-*/commit.json"))


def _refusal_of(path: str, ckpt_type: str) -> UserError | None:
    """Return why a path cannot be used, None if something is there; what is in a store is not looked at."""
    from evomesh.config.hub_folders import cached_model
    from evomesh.config.user import expand_home
    from evomesh.storage.urls import split_url

    scheme, name = split_url(path)
    if scheme != "local" or expand_home(name).exists() or cached_model(name):
        return None
    # Needs torch, as reading checkpoints does.
    from evomesh.checkpoint.named_paths import refuse_absent_path

    try:
        refuse_absent_path(path, ckpt_type)
    except UserError as refusal:
        return refusal
    return None
