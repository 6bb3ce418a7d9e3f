"""The decision whether blocks are compiled: what the config asks for, and what this machine can do."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

import torch

logger = logging.getLogger(__name__)


def compiles_blocks(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Return whether to compile the blocks of a model whose ``model.compile`` is ``setting``.

    "auto" means on CUDA, if this machine has what torch's compiler needs there;
    otherwise it warns, once.
    """
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return False
    missing = missing_for_compiling()
    if missing:
        _warn_once(missing)
    return not missing


def missing_for_compiling() -> str:
    """Return what is missing for code on CUDA, "" if nothing: triton, and what it builds the launchers of kernels with.

    Images for running programs rather than building them often have neither compiler
    nor headers.
    """
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return f"triton cannot be imported ({error})"
    # Triton takes the compiler from CC, else gcc, else clang.
    named = os.environ.get("CC", "")
    candidates = [named] if named else ["gcc", "clang"]
    if not any(shutil.which(candidate) for candidate in candidates):
        return f"no C compiler is found ({named or 'gcc or clang'})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"{header} is missing"


@cache
def _warn_once(missing: str) -> None:
    logger.warning(
        "model.compile: blocks are not compiled, which makes training slower, because %s; "
        "install it, or set model.compile=False to silence this",
        missing,
    )
