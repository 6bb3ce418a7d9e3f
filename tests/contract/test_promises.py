"""The table of promises is sound: rows that are on name a test that exists, rows that are off name an issue."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.contract.promises import PROMISES, Promise

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.words[:50])
def test_row(promise: Promise) -> None:
    assert promise.on != bool(promise.issue), "either a test or an issue"
    if not promise.on:
        assert promise.issue >= 2
        return
    file, _, name = promise.test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    tests = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    assert tests if name == "*" else name in tests


def test_rows_are_distinct() -> None:
    assert len({promise.words for promise in PROMISES}) == len(PROMISES)
