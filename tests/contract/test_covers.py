"""The tables of keys and promises and the markers on the tests agree, both ways."""

from __future__ import annotations

import pytest

from tests.contract.config_keys import ROWS
from tests.contract.promises import PROMISES, Promise
from tests.support.covers import covered

PROMISE = "promise:"


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.name)
def test_promise_is_covered_by_a_test_or_waits_for_an_issue(promise: Promise) -> None:
    assert (PROMISE + promise.name in covered()) != bool(promise.issue), (
        "either a test or an issue"
    )
    assert promise.issue == 0 or promise.issue >= 2


def test_promises_are_distinct() -> None:
    assert len({promise.words for promise in PROMISES}) == len(
        {promise.name for promise in PROMISES}
    )
    assert len({promise.name for promise in PROMISES}) == len(PROMISES)


def test_every_key_with_an_effect_is_covered_by_a_test() -> None:
    wanted = {row.key for row in ROWS if row.outcome == "effect"}
    assert wanted - set(covered()) == set(), (
        'put @covers("KEY") on the test of its effect'
    )


def test_every_covered_key_is_a_row_with_an_effect_or_a_promise() -> None:
    rows = {row.key for row in ROWS if row.outcome == "effect"}
    promises = {PROMISE + promise.name for promise in PROMISES}
    assert set(covered()) - rows - promises == set()


def test_markers_are_read_from_the_sources_as_pytest_sees_them(
    request: pytest.FixtureRequest,
) -> None:
    """What pytest collected, this file at least, carries the same keys."""
    for item in request.session.items:
        name = getattr(item, "originalname", item.name)
        path = item.path.relative_to(request.config.rootpath).as_posix()
        for mark in item.iter_markers("covers"):
            for key in mark.args:
                assert {path, f"{path}::{name}"} & set(covered()[key]), (
                    item.nodeid,
                    key,
                )
