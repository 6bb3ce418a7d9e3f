"""``run_file``: execute an XTuner config with stand-ins for foreign names, and find out where each value is set."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
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
    try:
        text = file.read_bytes().decode("utf-8-sig")
        # Parsing is slow, and most files have none of these words.
        if not any(word in text for word in (*OWNERS, *RUNNER_NAMES, "_base_")):
            return False
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return False
    if is_xtuner_config(tree):
        return True
    bases = [str(file.parent / base) for base in _literal_bases(tree)]
    return any(is_xtuner_file(base, (*above, file)) for base in bases)


def _literal_bases(tree: ast.Module) -> list[str]:
    """Return the files that ``_base_ = ...`` names, where it is written as strings."""
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        if ast.unparse(node.targets[0]) == "_base_":
            constants = [n for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            return [item.value for item in constants if isinstance(item.value, str)]
    return []


def run_file(
    path: str, overrides: Sequence[Override], *, above: tuple[Path, ...] = ()
) -> XTunerFile:
    """Execute the config at ``path``; overrides of names that it has take part in the execution.

    Args:
        above: the files that led here as bases or by imports.

    Raises:
        ConfigError: no such file, not Python, its own base, or an exception while it ran.
    """
    file = find_config_file(path)
    check_no_cycle(file, above, path)
    here = (*above, file)
    text = read_text(file, path)
    tree = parse_config(text, str(file), path)
    lines: dict[str, str] = {}
    variables: dict[str, str] = {}

    def read_names(beside: str, names: dict[str, str]) -> dict[str, Any]:
        """Return what ``from FILE import names`` would: all public names for "*"."""
        base = run_file(beside, overrides, above=here)
        lines.update(base.lines)
        variables.update(base.variables)
        if "*" in names:
            return {
                name: value
                for name, value in base.values.items()
                if not name.startswith("_")
            }
        return {new: base.values[name] for name, new in names.items()}

    namespace: dict[str, Any] = {
        "__name__": f"{HERE}.config",
        "__package__": HERE,
        "__file__": str(file),
        STAND_IN: ForeignName,
        READ_NAMES: read_names,
        READ_BASE: nullcontext,
    }
    namespace[APPLY] = lambda: apply_overrides(namespace, overrides)
    replacer = ImportReplacer([file.parent, Path.cwd()], STAND_IN, READ_NAMES)
    replaced = ast.fix_missing_locations(replacer.visit(copy.deepcopy(tree)))
    with config_imports(file):
        execute(compile(instrument(replaced), str(file), "exec"), namespace, path, text)
    values = {name: value for name, value in namespace.items() if not _is_private(name)}
    below: dict[str, Any] = {}
    for base_path in _as_list(namespace.get("_base_", [])):
        base = run_file(str(file.parent / base_path), overrides, above=here)
        below = merge_values(below, base.values)
        lines.update(base.lines)
        variables.update(base.variables)
    lines.update(config_lines(tree, path, {"__package__": ""}))
    variables.update(_find_variables(tree))
    merged = merge_values(below, values)
    if below:
        apply_overrides(merged, overrides)
    return XTunerFile(path, merged, lines, variables, text)


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
