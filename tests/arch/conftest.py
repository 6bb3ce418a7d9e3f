"""What the checks of the tree share: one worker, and parsed files while a module of them runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch import sources

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker of pytest-xdist run all checks, so that each file is parsed once."""
    for item in items:
        grouped = item.get_closest_marker("xdist_group")
        if item.path.is_relative_to(HERE) and not grouped:
            item.add_marker(pytest.mark.xdist_group("arch"))


@pytest.fixture(scope="module", autouse=True)
def parsed_files() -> Iterator[None]:
    """Keep parsed files as long as the checks run.

    They are a million objects without cycles, which the garbage collector would look at
    again and again.
    """
    gc.disable()
    yield
    sources.release()
    gc.enable()
