"""Execute a config file with overrides applied, leaving no trace in the process.

Overrides take part in the execution: after each statement at the top of the file, those
whose name exists by then are applied again. So ``--set data.total_steps=20`` also
reaches ``lr_scheduler = dict(total_steps=data["total_steps"])`` further down, and
``--set SEQ_LEN=512`` whatever is computed from it.
"""

from __future__ import annotations

import ast
import copy
import difflib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from evomesh.config.reading.config_modules import (
    PACKAGE,
    READ_BASE,
    ModuleRunner,
    base_modules,
    config_imports,
)
from evomesh.config.reading.overrides import Override, apply_overrides
from evomesh.config.reading.source_lines import AssignmentLines, config_lines
from evomesh.config.reading.spellings import SECTIONS, TOP_LEVEL
from evomesh.errors import ConfigError, UserError

APPLY = "__apply_overrides__"
MODULE_FOLDERS = (
    "a module in the folder of the config or one above it, in the current folder, "
    "or one that is installed"
)
REGISTER_FIX = (
    "InternEvo's modules are not part of evomesh: register a model with "
    "evomesh.register_model(NAME, builder), see docs/models.md"
)
BLOCKS = (ast.With, ast.If, ast.Try, ast.For)
HERE = f"{PACKAGE}.parent.here"  # the package of modules beside the config


@dataclass(frozen=True)
class ConfigSource:
    """The content of a config file.

    Attributes:
        values: top-level name -> value; the author's own names are left out.
        names: every top-level name, the author's own and those of its bases too; or the whole dotted keys that
            overrides have set already.
        lines: dotted key -> "FILE:LINE" of its assignment, where the file says it literally.
        text: the file as it is on disk.
        warnings: what a translation from another system could not carry over.
        preparation: command lines, each as arguments of ``evomesh``, that make the data the config names.
    """

    path: str
    values: dict[str, Any]
    names: frozenset[str]
    lines: AssignmentLines
    text: str
    warnings: tuple[str, ...] = ()
    preparation: tuple[tuple[str, ...], ...] = ()


def read_source(
    path: str,
    overrides: Sequence[Override] = (),
    *,
    above: tuple[Path, ...] = (),
) -> ConfigSource:
    """Execute the config file at ``path``.

    Args:
        above: the files that led here by ``_base_``, the user's first.

    Raises:
        ConfigError: no such file, not a ``.py`` file, not Python, its own base, or an
            exception while it ran.
    """
    # 1. Execute the file, with a call after each statement that applies the overrides.
    file = find_config_file(path)
    check_no_cycle(file, above, path)
    text = read_text(file, path)
    tree = parse_config(text, str(file), path)
    namespace: dict[str, Any] = {
        "__name__": f"{HERE}.config",
        "__package__": HERE,
        "__file__": str(file),
    }
    _add_helpers(namespace, overrides)
    imported = base_modules(tree, HERE)
    with config_imports(file, imported, _base_runner(file, imported, overrides)):
        # `tree` stays as written, for the lines of the keys; parsing the text again is
        # several times faster than copying the tree.
        program = instrument(ast.parse(text, str(file)))
        code = compile(program, str(file), "exec")
        execute(code, namespace, path, text)
        own_lines = config_lines(tree, path, namespace)

    # 2. Merge its bases key by key: a later one wins.
    base_paths = namespace.pop("_base_", ())
    inherited: dict[str, Any] = {}
    lines: dict[str, str] = {}
    names = frozenset(namespace)
    for source in _read_bases(base_paths, (*above, file), overrides):
        inherited = merge_values(inherited, source.values)
        lines.update(source.lines)
        names |= source.names

    # 3. Put its settings over those of its bases. Executing the file and its bases has
    #    applied the overrides to each; merging may have covered them again.
    values = _settings(namespace)
    if inherited:
        values = merge_values(inherited, values)
        apply_overrides(values, overrides)
    lines.update(own_lines)
    own_copy = copy.deepcopy(values)
    return ConfigSource(path, own_copy, names, lines, text)


def _settings(namespace: dict[str, Any]) -> dict[str, Any]:
    """Return what a file assigned that may be a setting."""
    values = {}
    for name, value in namespace.items():
        if _is_setting(name, value):
            values[name] = value
    return values


def _add_helpers(namespace: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Add the names that an instrumented file calls."""
    namespace[READ_BASE] = nullcontext
    namespace[APPLY] = lambda: apply_overrides(namespace, overrides)


def _base_runner(
    config: Path, bases: set[str], overrides: Sequence[Override]
) -> ModuleRunner:
    """Return what runs a ``read_base`` file: overrides take part, and it may have bases, which join ``bases``.

    A file that leads back to one whose run has not ended is refused: Python would import
    what that one has assigned so far, and leave out the rest without a word.
    """
    running = [config]

    def run(source: bytes, module: ModuleType, file: str) -> None:
        path = Path(file).resolve()
        check_no_cycle(path, tuple(running), file)
        tree = ast.parse(source, file)
        imported = base_modules(tree, module.__package__ or "")
        running.append(path)
        for loaded in _files_of_modules(imported):
            check_no_cycle(loaded, tuple(running), file)
        bases.update(imported)
        namespace = module.__dict__
        _add_helpers(namespace, overrides)
        program = instrument(tree)
        code = compile(program, file, "exec")
        exec(code, namespace)
        running.pop()

    return run


def _files_of_modules(names: set[str]) -> Iterator[Path]:
    """Yield the files of those modules whose import has at least begun."""
    for name in sorted(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            yield Path(file).resolve()


def read_text(file: Path, shown: str) -> str:
    """Return the text of a config file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise _source_error(
            f"cannot be read: {error}",
            shown,
            fix="give a readable UTF-8 Python file",
            code="EVO-CONFIG-004",
        ) from None


def find_config_file(path: str) -> Path:
    file = Path(path)
    if file.is_dir():
        near = _nearby_configs(file / "x.py")
        raise _source_error(
            "is a folder",
            path,
            expected="a Python config file",
            fix=f"give a file in it: {near}" if near else "",
            code="EVO-CONFIG-004",
        )
    if not file.exists():
        near = _nearby_configs(file)
        raise _source_error(
            "no such config file",
            path,
            expected=f"a file; looked in {file.parent.resolve()}",
            fix=_fix_of_missing(file, near),
            code="EVO-CONFIG-004",
        )
    if file.suffix != ".py":
        raise _source_error(
            f"configs are Python files, this one ends in {file.suffix or 'nothing'!r}",
            path,
            expected="NAME.py with assignments such as data = dict(seq_len=2048)",
            fix="rewrite it as Python: each section becomes NAME = dict(key=value, ...)",
            code="EVO-CONFIG-004",
        )
    return file.resolve()


def _fix_of_missing(file: Path, near: str) -> str:
    """Return the fix for a file that does not exist; a bare name may be meant as that of a shipped config."""
    shipped = "evomesh config list shows the shipped configs, evomesh config copy NAME . writes one"
    is_bare = file.parent == Path() and not file.suffix
    if near and is_bare:
        return f"did you mean {near}? {shipped}"
    return f"did you mean {near}?" if near else shipped


def _nearby_configs(file: Path) -> str:
    there: list[str] = []
    if file.parent.is_dir():
        there = sorted(path.name for path in file.parent.glob("*.py"))
    close = difflib.get_close_matches(file.name, there, n=3, cutoff=0.4) or there[:3]
    return ", ".join(str(file.parent / name) for name in close)


def _source_error(
    found: str, where: str, *, code: str, expected: str = "", fix: str = ""
) -> ConfigError:
    return ConfigError(
        [UserError(found, where=where, expected=expected, fix=fix, code=code)],
        path=where,
    )


def parse_config(text: str, filename: str, shown: str) -> ast.Module:
    """Return the syntax tree of a config.

    Raises:
        ConfigError: it cannot be parsed; says where.
    """
    # Of a NUL the parser says neither line nor column.
    before, nul, _ = text.partition("\0")
    if nul:
        line = before.count("\n") + 1
        raise _source_error(
            "contains a NUL byte",
            f"{shown}:{line}",
            expected="a text file",
            fix="remove the byte, or save the file as UTF-8 text",
            code="EVO-CONFIG-005",
        )
    try:
        return ast.parse(text, filename)
    except SyntaxError as error:
        source = (error.text or "").rstrip("\n")
        caret = " " * max((error.offset or 1) - 1, 0) + "^"
        shown_source = f"\n    {source}\n    {caret}" if source else ""
        place = (shown, error.lineno, error.offset)
        raise _source_error(
            f"not valid Python: {error.msg}{shown_source}",
            ":".join(str(part) for part in place if part is not None),
            fix="correct the line; configs are ordinary Python files",
            code="EVO-CONFIG-005",
        ) from None


class _StatementInstrumenter(ast.NodeTransformer):
    """Add the call that applies overrides after each statement, and replace any imported ``read_base`` by our own."""

    def __init__(self) -> None:
        self.future = True

    def _instrument_block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for node in body:
            kept = self._instrument_statement(node)
            if kept is None:
                continue
            out.append(kept)
            # Nothing may come before `from __future__ import ...`.
            self.future = self.future and _may_precede_future_import(node)
            if not self.future:
                out.append(_apply_call(node))
        return out or [ast.Pass()]

    def _instrument_statement(self, node: ast.stmt) -> ast.stmt | None:
        """Return the statement with the blocks in it instrumented; None for an import of ``read_base`` alone."""
        if isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name != READ_BASE]
            if not node.names:
                return None
        # Only blocks that run at the top of the file: the names in a function are local.
        if not isinstance(node, BLOCKS):
            return node
        for part in ("body", "orelse"):
            block = getattr(node, part, [])
            if block:
                instrumented = self._instrument_block(block)
                setattr(node, part, instrumented)
        return node

    def visit_Module(self, node: ast.Module) -> ast.Module:
        return ast.Module(self._instrument_block(node.body), [])


def _may_precede_future_import(node: ast.stmt) -> bool:
    """Return whether a statement is such an import itself, or a docstring."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _apply_call(node: ast.stmt) -> ast.stmt:
    """Return a call that applies the overrides, with the line of ``node``."""
    name = ast.Name(APPLY, ast.Load())
    call = ast.Expr(ast.Call(name, [], []))
    placed = ast.copy_location(call, node)
    return ast.fix_missing_locations(placed)


def instrument(tree: ast.Module) -> ast.Module:
    """Return the program with a call that applies the overrides after each statement.

    It takes the nodes of ``tree`` and changes them.
    """
    return ast.fix_missing_locations(_StatementInstrumenter().visit_Module(tree))


def execute(code: CodeType, namespace: dict[str, Any], shown: str, text: str) -> None:
    try:
        # A config is its author's program; it runs with the author's rights.
        exec(code, namespace)
    except KeyboardInterrupt:
        raise
    except UserError:
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == code.co_filename]
        lineno = (
            (own[-1].lineno if own else None) or getattr(error, "lineno", None) or 1
        )
        rows = text.splitlines()
        line = rows[lineno - 1].strip() if lineno <= len(rows) else ""
        is_not_found = isinstance(error, ModuleNotFoundError)
        raise _source_error(
            f"{type(error).__name__} while the config ran: {error}\n    {line}",
            f"{shown}:{lineno}",
            expected=MODULE_FOLDERS if is_not_found else "",
            fix=_fix_of_line(error, line),
            code="EVO-CONFIG-005",
        ) from None


def _fix_of_line(error: BaseException, line: str) -> str:
    """Return the fix for an error in a line of a config."""
    if isinstance(error, KeyError) and "environ" in line:
        return f"set the variable of the environment: export {error.args[0]}=VALUE"
    if isinstance(error, ModuleNotFoundError):
        package, _, _ = (error.name or "").partition(".")
        if package in ("internlm", "internevo"):  # such as internlm.model.registry
            return REGISTER_FIX
    return "correct the line; python CONFIG shows the full traceback"


def _is_setting(name: str, value: Any) -> bool:
    """Return whether a name is a key: plain data in lower case, not a private name, module or function."""
    if name in TOP_LEVEL or name in SECTIONS:
        return True
    if name.startswith("_") or name.isupper():
        return False
    return value is None or isinstance(
        value, bool | int | float | str | Mapping | list | tuple | set
    )


def check_no_cycle(file: Path, above: tuple[Path, ...], shown: str) -> None:
    """Refuse a file that is among those that led to it.

    Raises:
        ConfigError: it is; with the chain of files.
    """
    if file not in above:
        return
    first = above.index(file)
    cycle = (*above[first:], file)
    chain = " -> ".join(one.name for one in cycle)
    raise _source_error(
        f"is its own base: {chain}",
        shown,
        expected="_base_ and read_base name files that do not lead back",
        fix="move what the files share to a separate file",
        code="EVO-CONFIG-005",
    )


def _read_bases(
    base: str | Sequence[str],
    above: tuple[Path, ...],
    overrides: Sequence[Override],
) -> list[ConfigSource]:
    """Read the files of ``_base_``, whose paths are relative to the last file of ``above``."""
    folder = above[-1].parent
    paths = [base] if isinstance(base, str) else base
    sources = []
    for path in paths:
        base_path = str(folder / path)
        source = read_source(base_path, overrides, above=above)
        sources.append(source)
    return sources


def merge_values(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the values of ``above`` put over it, section by section."""
    # dict(lr=1, betas=(0, 1)) under dict(lr=2) keeps its betas: two dicts are merged,
    # anything else is replaced.
    out = dict(below)
    for key, value in above.items():
        known: Any = out.get(key)
        are_sections = isinstance(known, dict) and isinstance(value, dict)
        if are_sections:
            merged = merge_values(known, value)
            out[key] = merged
        else:
            out[key] = value
    return out
