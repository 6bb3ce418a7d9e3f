"""Fixtures of the whole suite; each starts its processes when a test first asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.interpreter import Interpreter
from tests.support.pool import Pool

# Fixtures that start processes or servers.
SHARED_PROCESSES = {"pool", "interpreter", "endpoint"}


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks (tests/support/pool.py)."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Commands in forked processes (tests/support/interpreter.py)."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of shared processes and servers, which `make test-fast` leaves out."""
    for item in items:
        if SHARED_PROCESSES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
