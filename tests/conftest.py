"""Fixtures of the whole suite; each starts its processes when a test first asks for them."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
from packaging.version import Version

# Imported when a test asks for them: they need torch, and pytest-xdist's controller,
# which loads this file before it starts its workers, does not.
if TYPE_CHECKING:
    from evomesh.demo.questions import Question
    from tests.support.interpreter import Interpreter
    from tests.support.pool import Pool

ZBV_SINCE = "2.13"  # the version of torch from which evomesh accepts the schedule
# Folders whose tests of zbv run it; others only describe it, or check that it is refused.
RUNS_SCHEDULES = {"dist", "e2e", "plan"}
# Fixtures that start processes or servers, or read the whole standard library.
SLOW_FIXTURES = {"pool", "interpreter", "endpoint", "questions"}


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks (tests/support/pool.py)."""
    from tests.support.pool import Pool

    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Commands in forked processes (tests/support/interpreter.py)."""
    from tests.support.interpreter import Interpreter

    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """The questions of the demo's chat."""
    from evomesh.demo.questions import read_questions

    return read_questions()


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Mark the tests of slow fixtures, which `make test-fast` leaves out, and of what torch lacks."""
    has_zbv = Version(version("torch")) >= Version(ZBV_SINCE)
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        runs_zbv = "zbv" in item.name and RUNS_SCHEDULES.intersection(item.path.parts)
        if runs_zbv and not has_zbv:
            item.add_marker(pytest.mark.skip(f"zbv needs torch {ZBV_SINCE}"))
    if hasattr(config, "workerinput"):
        # pytest-xdist hands out groups, the largest first, and then single tests in this
        # order. With those of a minute first, the short ones at the end keep all workers
        # busy until it.
        items.sort(key=lambda item: "e2e" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Spare each test the cost of what all tests together have imported."""
    # The garbage collector would look at a million objects of torch, transformers and
    # the tests again and again; none of them is garbage before the end.
    gc.collect()
    gc.freeze()
    # Around each phase of a test pytest adds and removes a handler at every logger that
    # does not propagate. torch has 60 of these; where they propagate, the handler at the
    # root gets their records.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True


def pytest_sessionfinish() -> None:
    """Search for garbage once at the end; pytest's own five searches find the heap exempt."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Have messages in English, whatever the locale of the machine."""
    os.environ["EVOMESH_LANG"] = "en"
