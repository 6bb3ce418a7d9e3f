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
    top = _git(tree, "rev-parse --show-toplevel")
    if not top or Path(top).resolve() != tree.resolve():
        return "", False
    revision = _git(tree, "rev-parse --verify --quiet HEAD")
    # Without optional locks git writes nothing, not even a fresher index. A training run
    # must not hold the lock that a commit in the same tree waits for.
    status = "--no-optional-locks status --porcelain --untracked-files=no"
    changes = _git(tree, status)
    return revision, bool(changes)


def _git(tree: Path, arguments: str) -> str:
    """Return what git prints; "" if it fails, hangs or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(tree), *arguments.split()],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
