"""Execution of a config file: overrides take part in it, and it leaves no trace in the process.

Overrides take part in the execution: after each statement at the top of the file, those whose name exists by then are
applied again. So ``--set data.total_steps=20`` also reaches ``lr_scheduler = dict(total_steps=data["total_steps"])``
further down, and ``--set SEQ_LEN=512`` whatever is computed from it.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from evomesh.config.reading.overrides import Override, apply_overrides
from evomesh.config.reading.source_lines import AssignmentLines, config_lines
from evomesh.config.reading.spellings import SECTIONS, TOP_LEVEL
from evomesh.errors import ConfigError, UserError

APPLY, READ_BASE = "__apply_overrides__", "read_base"
PACKAGE = "evomesh_config_file"  # three levels of it, so that relative imports may climb twice


@dataclass(frozen=True)
class ConfigSource:
    """The content of a config file.

    Attributes:
        values: top-level name -> value; the author's own names are left out.
        names: every top-level name, the author's own and those of its bases too.
        lines: dotted key -> "FILE:LINE" of its assignment, where the file says it literally.
        text: the file as it is on disk.
    """

    path: str
    values: dict[str, Any]
    names: frozenset[str]
    lines: AssignmentLines
    text: str


def read_source(path: str, overrides: Sequence[Override] = ()) -> ConfigSource:
    """Execute the config file at ``path``.

    Raises:
        ConfigError: no such file, not a ``.py`` file, not Python, or an exception while it ran.
    """
    file = _find(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _problem(
            f"cannot be read: {error}", str(path), fix="give a readable UTF-8 Python file"
        ) from None
    tree = _parse(text, str(file), path)
    namespace: dict[str, Any] = {
        "__name__": f"{PACKAGE}.parent.here.config",
        "__package__": f"{PACKAGE}.parent.here",
        "__file__": str(file),
    }
    namespace[READ_BASE] = nullcontext
    namespace[APPLY] = lambda: apply_overrides(namespace, overrides)
    with _imports_beside(file):
        _execute(compile(_instrument(tree), str(file), "exec"), namespace, path, text)
        lines = config_lines(tree, path, namespace)
    inherited, inherited_lines, inherited_names = _bases(namespace.pop("_base_", ()), file, overrides)
    values = {name: value for name, value in namespace.items() if _is_setting(name, value)}
    if inherited:
        # Executing the file and its bases has applied the overrides to each; merging may have covered them again.
        values = _merge(inherited, values)
        apply_overrides(values, overrides)
    return ConfigSource(
        path, copy.deepcopy(values), inherited_names | namespace.keys(), {**inherited_lines, **lines}, text
    )


def _find(path: str) -> Path:
    file = Path(path)
    if file.is_dir():
        near = _near(file / "x.py")
        raise _problem(
            "is a folder",
            path,
            expected="a Python config file",
            fix=f"give a file in it: {near}" if near else "",
        )
    if not file.exists():
        near = _near(file)
        raise _problem(
            "no such config file",
            path,
            expected=f"a file; looked in {file.parent.resolve()}",
            fix=f"did you mean {near}?" if near else "evomesh config list shows the shipped configs",
        )
    if file.suffix != ".py":
        raise _problem(
            f"configs are Python files, this one ends in {file.suffix or 'nothing'!r}",
            path,
            expected="NAME.py with assignments such as data = dict(seq_len=2048)",
            fix="rewrite it as Python: each section becomes NAME = dict(key=value, ...)",
        )
    return file.resolve()


def _near(file: Path) -> str:
    there = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
    close = difflib.get_close_matches(file.name, there, n=3, cutoff=0.4) or there[:3]
    return ", ".join(str(file.parent / name) for name in close)


def _problem(found: str, where: str, *, expected: str = "", fix: str = "") -> ConfigError:
    return ConfigError([UserError(found, where=where, expected=expected, fix=fix)], path=where)


def _parse(text: str, filename: str, shown: str) -> ast.Module:
    try:
        return ast.parse(text, filename)
    except SyntaxError as error:
        line = (error.text or "").rstrip("\n")
        caret = " " * max((error.offset or 1) - 1, 0) + "^"
        raise _problem(
            f"not valid Python: {error.msg}\n    {line}\n    {caret}",
            f"{shown}:{error.lineno}:{error.offset}",
            fix="correct the line; configs are ordinary Python files",
        ) from None
    except ValueError as error:  # null bytes
        raise _problem(f"not valid Python: {error}", shown, fix="save it as a UTF-8 text file") from None


class _StatementInstrumenter(ast.NodeTransformer):
    """Add the call that applies overrides after each statement, and replace any imported ``read_base`` by our own."""

    def __init__(self) -> None:
        self.future = True

    def _body(self, body: list[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for node in body:
            kept = self._statement(node)
            if kept is None:
                continue
            out.append(kept)
            is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            self.future = self.future and (is_future or is_docstring)
            if not self.future:
                call = ast.Expr(ast.Call(ast.Name(APPLY, ast.Load()), [], []))
                out.append(ast.fix_missing_locations(ast.copy_location(call, node)))
        return out or [ast.Pass()]

    def _statement(self, node: ast.stmt) -> ast.stmt | None:
        if isinstance(node, ast.ImportFrom):
            names = [alias for alias in node.names if alias.name != READ_BASE]
            if not names:
                return None
            node.names = names
        elif isinstance(node, ast.With | ast.If | ast.Try | ast.For):
            node.body = self._body(node.body)
            if not isinstance(node, ast.With) and node.orelse:
                node.orelse = self._body(node.orelse)
        return node

    def visit_Module(self, node: ast.Module) -> ast.Module:
        return ast.Module(self._body(node.body), [])


def _instrument(tree: ast.Module) -> ast.Module:
    return ast.fix_missing_locations(_StatementInstrumenter().visit_Module(copy.deepcopy(tree)))


def _execute(code: CodeType, namespace: dict[str, Any], shown: str, text: str) -> None:
    try:
        exec(code, namespace)  # a config is its author's program; it runs with the author's rights
    except KeyboardInterrupt:
        raise
    except UserError:
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == code.co_filename]
        lineno = (own[-1].lineno if own else None) or getattr(error, "lineno", None) or 1
        rows = text.splitlines()
        line = rows[lineno - 1].strip() if lineno <= len(rows) else ""
        raise _problem(
            f"{type(error).__name__} while the config ran: {error}\n    {line}",
            f"{shown}:{lineno}",
            fix="correct the line; python CONFIG shows the full traceback",
        ) from None


def _is_setting(name: str, value: Any) -> bool:
    """Plain data under a name in small letters; anything else (modules, functions, registries) is private."""
    if name in TOP_LEVEL or name in SECTIONS:
        return True
    if name.startswith("_") or name.isupper():
        return False
    return value is None or isinstance(value, bool | int | float | str | Mapping | list | tuple | set)


def _bases(
    base: str | Sequence[str], file: Path, overrides: Sequence[Override]
) -> tuple[dict[str, Any], dict[str, str], frozenset[str]]:
    """Read the files of ``_base_``, merged key by key: their values, lines and names.

    Paths are relative to the file; the file itself wins over all of them.
    """
    values: dict[str, Any] = {}
    lines: dict[str, str] = {}
    names: frozenset[str] = frozenset()
    for path in [base] if isinstance(base, str) else base:
        source = read_source(str(file.parent / path), overrides)
        values = _merge(values, source.values)
        lines.update(source.lines)
        names |= source.names
    return values, lines, names


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        known = out.get(key)
        out[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return out


@contextmanager
def _imports_beside(file: Path) -> Iterator[None]:
    """Files beside the config and below the working directory can be imported, relative imports too.

    Afterwards ``sys.path`` is as before and what was imported from those folders is forgotten, so that another file of
    the same name is read afresh.
    """
    folders = [file.parent, file.parent.parent, file.parent.parent.parent]
    before, path, bytecode = dict(sys.modules), list(sys.path), sys.dont_write_bytecode
    name = ""
    for part, folder in zip((PACKAGE, "parent", "here"), reversed(folders), strict=True):
        name = f"{name}.{part}" if name else part
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    sys.path[:0] = [str(file.parent), str(Path.cwd())]
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        for name in set(sys.modules) - set(before):
            if name.startswith(PACKAGE) or _lies_below(sys.modules[name], [file.parent, Path.cwd()]):
                del sys.modules[name]


def _lies_below(module: ModuleType | None, folders: list[Path]) -> bool:
    """A module of the author's: below one of ``folders``, but neither installed there nor part of this package."""
    where = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    if where is None or module is None or module.__name__.partition(".")[0] == __name__.partition(".")[0]:
        return False
    place = Path(where).resolve()
    return "site-packages" not in place.parts and any(place.is_relative_to(folder) for folder in folders)
