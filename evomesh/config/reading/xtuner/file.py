"""``run_file``: execute an XTuner config with stand-ins for foreign names, and find out where each value is set."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomesh.config.reading.config_modules import config_imports
from evomesh.config.reading.overrides import Override, apply_overrides
from evomesh.config.reading.source import (
    APPLY,
    HERE,
    check_no_cycle,
    execute,
    find_config_file,
    instrument,
    merge_values,
    parse_config,
    read_text,
)
from evomesh.config.reading.source_lines import config_lines, dict_items
from evomesh.config.reading.xtuner.foreign_names import (
    OWNERS,
    READ_BASE,
    RUNNER_NAMES,
    ForeignName,
    ImportReplacer,
    is_xtuner_config,
)

STAND_IN = "__foreign_name__"
READ_NAMES = "__read_names__"


@dataclass(frozen=True)
class XTunerFile:
    """The content of an XTuner config.

    Attributes:
        path: as the user gave it.
        values: every top-level name -> value, the author's own names too.
        lines: dotted key -> "FILE:LINE".
        variables: dotted key -> the name or dotted name that its value is written as: ``lr=lr`` -> "lr".
        text: the file as it is on disk.
    """

    path: str
    values: dict[str, Any]
    lines: dict[str, str]
    variables: dict[str, str]
    text: str


def is_xtuner_file(path: str, above: tuple[Path, ...] = ()) -> bool:
    """Return whether the config at ``path``, or a ``_base_`` that it names, is XTuner's.

    False if it cannot be read, or is its own base: whoever reads it next reports that.

    Args:
        above: the files that led here by ``_base_``.
    """
    file = Path(path).resolve()
    if file in above:
        return False
    words = (*OWNERS, *RUNNER_NAMES, "_base_")
    try:
        text = file.read_bytes().decode("utf-8-sig")
        # Parsing is slow, and most files have none of these words.
        if not any(word in text for word in words):
            return False
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return False
    if is_xtuner_config(tree):
        return True
    for base in _literal_bases(tree):
        base_path = str(file.parent / base)
        if is_xtuner_file(base_path, (*above, file)):
            return True
    return False


def _literal_bases(tree: ast.Module) -> list[str]:
    """Return the files that ``_base_ = ...`` names, where it is written as strings."""
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        if ast.unparse(node.targets[0]) == "_base_":
            return _strings_in(node.value)
    return []


def _strings_in(value: ast.expr) -> list[str]:
    constants = [node for node in ast.walk(value) if isinstance(node, ast.Constant)]
    return [node.value for node in constants if isinstance(node.value, str)]


def run_file(
    path: str,
    overrides: Sequence[Override],
    *,
    above: tuple[Path, ...] = (),
) -> XTunerFile:
    """Execute the config at ``path``; overrides of names that it has take part in the execution.

    Args:
        above: the files that led here as bases or by imports.

    Raises:
        ConfigError: no such file, not Python, its own base, or an exception while it ran.
    """
    file = find_config_file(path)
    check_no_cycle(file, above, path)
    text = read_text(file, path)
    tree = parse_config(text, str(file), path)
    others: list[XTunerFile] = []  # that this one imports or is based on

    def read_beside(other_path: str) -> XTunerFile:
        other = run_file(other_path, overrides, above=(*above, file))
        others.append(other)
        return other

    # 1. Execute the file, with imports replaced: ``from .base import lr`` reads that
    #    file, and ``from transformers import AutoModel`` makes a stand-in.
    namespace = _namespace(file, read_beside, overrides)
    program = _without_imports(ast.parse(text, str(file)), file)
    code = compile(program, str(file), "exec")
    with config_imports(file):
        execute(code, namespace, path, text)

    # 2. Put its values over those of its bases.
    below: dict[str, Any] = {}
    base_paths = _as_list(namespace.get("_base_", []))
    for base_path in base_paths:
        full_path = str(file.parent / base_path)
        base = read_beside(full_path)
        below = merge_values(below, base.values)
    own_values = _public_values(namespace)
    merged = merge_values(below, own_values)
    # An override wins over all of them, also where a base has the key and the file
    # replaces its section.
    if below:
        apply_overrides(merged, overrides)

    # 3. Where each value is set: what this file assigns again wins.
    lines: dict[str, str] = {}
    variables: dict[str, str] = {}
    for other in others:
        lines.update(other.lines)
        variables.update(other.variables)
    own_lines = config_lines(tree, path, {"__package__": ""})
    lines.update(own_lines)
    own_variables = _find_variables(tree)
    variables.update(own_variables)
    return XTunerFile(path, merged, lines, variables, text)


def _namespace(
    file: Path,
    read_beside: Callable[[str], XTunerFile],
    overrides: Sequence[Override],
) -> dict[str, Any]:
    """Return the globals that a file is executed with."""

    def read_names(other: str, names: dict[str, str]) -> dict[str, Any]:
        return _import(read_beside(other), names)

    namespace: dict[str, Any] = {
        "__name__": f"{HERE}.config",
        "__package__": HERE,
        "__file__": str(file),
        STAND_IN: ForeignName,
        READ_NAMES: read_names,
        READ_BASE: nullcontext,
    }
    # Called after each statement, so that what follows it sees the override.
    namespace[APPLY] = lambda: apply_overrides(namespace, overrides)
    return namespace


def _public_values(namespace: dict[str, Any]) -> dict[str, Any]:
    """Return what a file assigned, without what Python and this module put beside it."""
    values = {}
    for name, value in namespace.items():
        if not _is_private(name):
            values[name] = value
    return values


def _import(file: XTunerFile, names: dict[str, str]) -> dict[str, Any]:
    """Return what ``from FILE import names`` would: all public names for "*"."""
    values = file.values
    if "*" in names:
        return {name: values[name] for name in values if not name.startswith("_")}
    return {new: values[name] for name, new in names.items()}


def _without_imports(tree: ast.Module, file: Path) -> ast.Module:
    """Return the program with imports of foreign names and of files beside it replaced, and overrides applied.

    It takes the nodes of ``tree`` and changes them.
    """
    replacer = ImportReplacer([file.parent, Path.cwd()], STAND_IN, READ_NAMES)
    replaced = replacer.visit(tree)
    return instrument(ast.fix_missing_locations(replaced))


def _is_private(name: str) -> bool:
    return name.startswith("__") or name in (READ_BASE, "_base_")


def _as_list(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _find_variables(tree: ast.Module) -> dict[str, str]:
    """Return dotted key -> the name that its value is written as, of assignments at the top of the file."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            _add_variables(found, node.targets[0].id, node.value)
    return found


def _add_variables(found: dict[str, str], key: str, value: ast.expr) -> None:
    if isinstance(value, ast.Name):
        found[key] = value.id
        return
    for name, _, item in dict_items(value):
        _add_variables(found, f"{key}.{name}", item)
