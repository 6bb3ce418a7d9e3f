"""The part of ``evomesh config copy`` and ``evomesh xtuner copy-cfg`` that writes the files."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from evomesh.errors import UserError
from evomesh.outside_errors import not_written


def copy_with_base(source: Path, target: Path) -> list[Path]:
    """Copy a shipped config to ``target`` and its base file beside it; return what was written.

    Of a config that is another name for one, that one is copied: guides say which lines
    of the file to edit.

    Raises:
        UserError: ``target`` exists, or another file is where the base would be, or one cannot be written.
    """
    if target.exists():
        raise UserError(
            "already exists",
            where=str(target),
            fix="choose another name, or remove it first",
            code="EVO-CLI-005",
        )
    source = _config_itself(source)
    copies = {}
    for base in _base_files(source):
        copied = target.parent / base.relative_to(source.parent)
        if copied.exists() and copied.read_bytes() != base.read_bytes():
            raise UserError(
                "already exists, with different content",
                where=str(copied),
                fix="choose another folder",
                code="EVO-CLI-005",
            )
        copies[base] = copied
    copies[source] = target
    try:
        for original, copied in copies.items():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copied)
    except OSError as error:
        raise not_written(target, error) from None
    return list(copies.values())


def _config_itself(source: Path) -> Path:
    """Return the config that has the settings: the base of one that only names a base."""
    statements = ast.parse(source.read_text(encoding="utf-8")).body
    bases = _base_files(source)
    # The docstring and ``_base_``.
    if len(statements) == 2 and len(bases) == 1:
        return bases[0]
    return source


def _base_files(config: Path) -> list[Path]:
    """Return the file that ``_base_ = "..."`` of a shipped config names; none for a config that is whole."""
    for node in ast.parse(config.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_base_":
            return [config.parent / ast.literal_eval(node.value)]
    return []
