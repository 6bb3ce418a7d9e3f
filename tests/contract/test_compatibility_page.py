"""docs/compatibility.md and its Chinese page are what their generator writes."""

from __future__ import annotations

from pathlib import Path

from tests.contract.documents import ROWS
from tests.support.pages import STAMP
from tools.compatibility import PAGE, pages

ROOT = Path(__file__).parents[2]


def test_pages_are_up_to_date() -> None:
    shipped = (PAGE.text, STAMP.sub("", PAGE.translation.text))
    assert shipped == pages(), "run: python tools/compatibility.py"


def test_rows_of_the_documents_are_distinct_and_their_tests_exist() -> None:
    assert len({(row.document, row.typed) for row in ROWS}) == len(ROWS)
    assert [row for row in ROWS if row.test and not (ROOT / row.test).is_file()] == []
    # What differs says how.
    assert [row for row in ROWS if row.outcome != "works" and not row.found] == []
