"""The files of the package, each read and parsed once for all checks."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "evomesh").rglob("*.py"))


def name_of(path: Path) -> str:
    """Return a file's path below the root of the repository."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def text(path: Path) -> str:
    return path.read_text()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path), str(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file, an outer one before what is in it."""
    return tuple(ast.walk(tree(path)))


def release() -> None:
    """Forget what was parsed."""
    for cached in (text, tree, nodes):
        cached.cache_clear()
