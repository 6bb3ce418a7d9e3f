"""Source lines of a config's keys: dotted key -> "FILE:LINE", read from the syntax tree."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

AssignmentLines = dict[str, str]

OWN_PACKAGE = __name__.partition(".")[0]


def config_lines(
    tree: ast.Module,
    shown: str,
    namespace: Mapping[str, Any],
    imported: dict[str, AssignmentLines] | None = None,
) -> AssignmentLines:
    """Return the line of every key that the file assigns.

    Read are ``NAME = value``, ``NAME = dict(key=value)`` or ``{...}`` at any depth, and
    ``NAME["key"] = value``. A later assignment wins; names that come from a module are
    looked up there. Values computed some other way are found by their section's line.

    Args:
        tree: the parsed file.
        shown: its name in the result.
        namespace: what ``__package__`` resolves relative imports against.
        imported: lines of the modules read so far, by file: each is read once, however many others import it.
    """
    lines: AssignmentLines = {}
    imported = {} if imported is None else imported
    for node in _all_statements(tree.body):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                key = _target_key(target)
                _record_assignment(lines, key, node.value, shown)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            key = _target_key(node.target)
            _record_assignment(lines, key, node.value, shown)
        elif isinstance(node, ast.ImportFrom):
            _record_import(lines, node, namespace, imported)
    return lines


def line_of(lines: AssignmentLines, key: str) -> str:
    """Return the line of ``key``, else of the nearest section above it; "" when the file does not name it."""
    while key:
        if key in lines:
            return lines[key]
        key = key.rpartition(".")[0]
    return ""


def _all_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.With | ast.If | ast.Try | ast.For):
            yield from _all_statements(node.body)
            if not isinstance(node, ast.With):
                yield from _all_statements(node.orelse)


def _target_key(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    ):
        above = _target_key(node.value)
        return f"{above}.{node.slice.value}" if above else ""
    return ""


def _record_assignment(
    lines: AssignmentLines, key: str, value: ast.expr, shown: str
) -> None:
    if not key:
        return
    for old in [k for k in lines if k.startswith(key + ".")]:
        del lines[old]
    _record_value(lines, key, value, shown)


def _record_value(
    lines: AssignmentLines, key: str, value: ast.expr, shown: str
) -> None:
    lines[key] = f"{shown}:{value.lineno}"
    for name, name_line, item in dict_items(value):
        item_key = f"{key}.{name}"
        _record_value(lines, item_key, item, shown)
        lines[item_key] = f"{shown}:{name_line}"


def dict_items(value: ast.expr) -> Iterator[tuple[str, int, ast.expr]]:
    """Yield (key, its line, value) of ``dict(key=value)`` or ``{"key": value}``; nothing for any other expression."""
    if isinstance(value, ast.Dict):
        yield from _display_items(value)
    elif isinstance(value, ast.Call) and ast.unparse(value.func) == "dict":
        for keyword in value.keywords:
            if keyword.arg:  # dict(**other) has none
                yield keyword.arg, keyword.lineno, keyword.value


def _display_items(value: ast.Dict) -> Iterator[tuple[str, int, ast.expr]]:
    """Yield the items of ``{"key": value}``; a key may also be computed, or be absent as in ``{**other}``."""
    for name, item in zip(value.keys, value.values, strict=True):
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield name.value, name.lineno, item


def _record_import(
    lines: AssignmentLines,
    node: ast.ImportFrom,
    namespace: Mapping[str, Any],
    imported: dict[str, AssignmentLines],
) -> None:
    """Record the lines of imported names, from the module's own file, while that module is still loaded."""
    module = "." * node.level + (node.module or "")
    if node.level:
        try:
            module = importlib.util.resolve_name(module, namespace["__package__"])
        except ImportError:
            return
    file = _authors_file(module)
    if file is None:
        return
    if file not in imported:
        imported[file] = {}  # a module that imports itself in a circle adds nothing
        imported[file] = _module_lines(file, module, imported)
    # `from x import data as d` gives data.seq_len of x to d.seq_len.
    local_names = {alias.name: alias.asname or alias.name for alias in node.names}
    imports_all = "*" in local_names
    for key, line in imported[file].items():
        top, dot, rest = key.partition(".")
        if imports_all or top in local_names:
            local_name = local_names.get(top, top)
            lines[local_name + dot + rest] = line


def _module_lines(
    file: str, module: str, imported: dict[str, AssignmentLines]
) -> AssignmentLines:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    package, _, _ = module.rpartition(".")
    path = _relative_path(file)
    return config_lines(tree, path, {"__package__": package}, imported)


def _authors_file(module: str) -> str | None:
    """Return the file of a loaded module that is part of the config: not installed, of Python, or of this package."""
    file: str | None = getattr(sys.modules.get(module), "__file__", None)
    package = module.partition(".")[0]
    if file is None or package == OWN_PACKAGE or package in sys.stdlib_module_names:
        return None
    return None if "site-packages" in Path(file).parts else file


def _relative_path(file: str) -> str:
    path = Path(file)
    return (
        str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
    )
