"""docs/compatibility.md is what its generator writes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / "tools" / "compatibility.py"))["page"]()
    shipped = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert shipped == written, "run: python tools/compatibility.py"
