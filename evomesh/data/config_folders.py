"""The folders and the tokenizer that a ``data`` section names: how a run finds them, and whether it would here.

Opens no token file and imports neither numpy nor torch, so that ``evomesh config check`` can ask too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from evomesh.config.data import DataConfig
from evomesh.config.user import expand_home
from evomesh.data.token_files.fingerprint import other_tokenizer_warning
from evomesh.data.token_files.folders import TokenFile, check_folder, find_files
from evomesh.data.tokenizer import find_tokenizer_file, read_tokenizer_hash
from evomesh.errors import UserError

TOKENIZER = "data.tokenizer_path"


def training_files(config: DataConfig) -> tuple[Path, list[TokenFile]]:
    """Return ``data.train_folder`` and its token files, in their order.

    Raises:
        UserError: there is no such folder, no token file in it, or the order file names others.
    """
    assert config.train_folder is not None
    folder = check_folder(config.train_folder, "data.train_folder")
    files = find_files(folder, "data.train_folder", config.data_order_path)
    return folder, files


def validation_files(config: DataConfig) -> tuple[Path, list[TokenFile]]:
    """Return ``data.valid_folder`` and its token files.

    Raises:
        UserError: there is no such folder, or no token file in it.
    """
    assert config.valid_folder is not None
    folder = check_folder(config.valid_folder, "data.valid_folder")
    return folder, find_files(folder, "data.valid_folder")


def absent_tokenizer(config: DataConfig) -> list[str]:
    """Return a warning if the config names a tokenizer that is not there: a typo would show only after training."""
    path = config.tokenizer_path
    if path is None or expand_home(path).exists():
        return []
    return [
        f"{TOKENIZER}={path!r} does not exist: training reads tokens and needs none, but generate, serve and "
        "export will"
    ]


def other_tokenizer(config: DataConfig, given: str | None = None) -> list[str]:
    """Return a warning if another tokenizer than the config's made the token files that a run would read.

    A loss would not show it, but every text that is generated. Folders, files and
    tokenizers that cannot be read are found by other checks.

    Args:
        given: ``--tokenizer``, which replaces the config's.
    """
    tokenizer = given or config.tokenizer_path
    if tokenizer is None or config.type == "streaming":
        return []
    files: dict[Path, None] = {}
    for find in _token_files(config):
        try:
            _, found = find()
        except UserError:
            continue
        files |= dict.fromkeys(file.path for file in found)
    try:
        tokenizer_hash = read_tokenizer_hash(tokenizer, TOKENIZER)
        name = f"--tokenizer {given}" if given else f"{TOKENIZER}={tokenizer!r}"
        warning = other_tokenizer_warning(files, tokenizer_hash, name)
    except (UserError, OSError):
        return []
    return [] if warning is None else [warning]


def _token_files(
    config: DataConfig,
) -> Iterator[Callable[[], tuple[Path, list[TokenFile]]]]:
    """Yield what finds the token files of each folder of training and validation data."""
    for section in _sections(config):
        if section.train_folder is not None:
            yield partial(training_files, section)
    if config.valid_every > 0 and config.valid_folder is not None:
        yield partial(validation_files, config)


def start_refusals(
    config: DataConfig, *, makes_token_files: bool = False
) -> list[UserError]:
    """Return why a run that starts here would refuse its folders and its tokenizer; nothing is read from them.

    Args:
        makes_token_files: the run makes those of ``data.train_folder`` itself.
    """
    refusals: list[UserError] = []
    for look in _looks(config, makes_token_files):
        try:
            look()
        except UserError as refusal:
            refusals.append(refusal)
    return refusals


def _looks(
    config: DataConfig, makes_token_files: bool
) -> Iterator[Callable[[], object]]:
    """Yield what a run does to find each folder and file."""
    validates = config.valid_every > 0 and config.valid_folder is not None
    tokenizer = config.tokenizer_path
    if config.type == "streaming":
        yield from _looks_of_text(config, validates)
    else:
        for section in _sections(config):
            if section.train_folder is not None and not makes_token_files:
                yield partial(training_files, section)
        if validates:
            yield partial(validation_files, config)
    if tokenizer is not None and _reads_text(config):
        yield partial(find_tokenizer_file, tokenizer, TOKENIZER)


def _looks_of_text(
    config: DataConfig, validates: bool
) -> Iterator[Callable[[], object]]:
    # Imports numpy.
    from evomesh.data.records.rows import find_text_folder

    named = {"data.train_folder": config.train_folder}
    if validates:
        named["data.valid_folder"] = config.valid_folder
    for key, folder in named.items():
        if folder is not None:
            yield partial(find_text_folder, folder, key)


def _sections(config: DataConfig) -> list[DataConfig]:
    """Return the section of each data stage with another folder; without stages the one there is."""
    by_folder: dict[str | None, DataConfig] = {}
    for item in config.stages:
        section = item.section(config)
        by_folder.setdefault(section.train_folder, section)
    return list(by_folder.values()) or [config]


def _reads_text(config: DataConfig) -> bool:
    """Return whether the run itself tokenizes texts: those that it trains on, or asks the model."""
    has_samples = config.samples is not None and config.sample_every > 0
    has_tasks = config.evaluation is not None and config.eval_every > 0
    return config.type == "streaming" or has_samples or has_tasks
