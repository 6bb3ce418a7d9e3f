"""docs/compatibility.md is what its generator writes."""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.contract.documents import ROWS

ROOT = Path(__file__).parents[2]


def test_page_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / "tools" / "compatibility.py"))["page"]()
    shipped = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert shipped == written, "run: python tools/compatibility.py"


def test_rows_of_the_documents_are_distinct_and_their_tests_exist() -> None:
    assert len({(row.document, row.typed) for row in ROWS}) == len(ROWS)
    assert [row for row in ROWS if row.test and not (ROOT / row.test).is_file()] == []
    # What differs says how.
    assert [row for row in ROWS if row.outcome != "works" and not row.found] == []
