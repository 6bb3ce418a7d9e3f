"""Identify the code that writes a checkpoint."""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import evomesh


@functools.cache
def software() -> dict[str, Any]:
    """Return versions and, for a source tree, its git revision ("" without one) and whether tracked files differ."""
    revision, dirty = source_revision(Path(evomesh.__file__).resolve().parents[1])
    return {
        "evomesh": evomesh.__version__,
        "revision": revision,
        "dirty": dirty,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def source_revision(tree: Path) -> tuple[str, bool]:
    """Return revision and dirty flag of ``tree`` if it is the top of a git working tree.

    A package installed into another project's working tree has no revision, because
    that project's is not its own.
    """
    top = _git(tree, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != tree.resolve():
        return "", False
    # Without optional locks git writes nothing, not even a fresher index.
    changes = _git(
        tree, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"
    )
    return _git(tree, "rev-parse", "--verify", "--quiet", "HEAD"), bool(changes)


def _git(tree: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(tree), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
