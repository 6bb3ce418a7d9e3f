"""``@covers("data.seq_len")``: which keys of a config, and which of InternEvo's promises, a test proves.

tests/contract/test_covers.py holds the markers against the tables, both ways; docs/compatibility.md names the tests.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def covers(*keys: str) -> pytest.MarkDecorator:
    """Mark a test, or by ``pytestmark`` a whole file.

    Args:
        keys: a dotted key as written in a config, or "promise:NAME" of tests/contract/promises.py.
    """
    return pytest.mark.covers(*keys)


@cache
def covered() -> dict[str, list[str]]:
    """Return "path::test" of every test that covers a key, read from the sources, whichever tests run.

    A file that is marked as a whole is "path".
    """
    tests: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, keys in _marks(ast.parse(path.read_text(encoding="utf-8"))):
            test = path.relative_to(ROOT).as_posix() + (f"::{name}" if name else "")
            for key in keys:
                tests.setdefault(key, []).append(test)
    return tests


def _marks(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "pytestmark"
        ):
            yield "", _keys(ast.walk(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield node.name, _keys(node.decorator_list)


def _keys(nodes: Iterator[ast.AST] | list[ast.expr]) -> list[str]:
    calls = [
        node
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "covers"
    ]
    return [
        argument.value
        for call in calls
        for argument in call.args
        if isinstance(argument, ast.Constant)
    ]
