"""Pages that tools write are what those tools write: the benchmarks and the errors in both languages."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import DOCS, STAMP, Page
from tools import errors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names of benchmarks/report.py."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return runpy.run_path(str(ROOT / "benchmarks" / "report.py"))


def test_benchmarks_in_chinese_are_those_in_english(report: dict[str, Any]) -> None:
    page = Page(DOCS / "benchmarks.md")
    sections = report["kept"](page.text)
    chinese = [report["chinese_section"](section) for section in sections.values()]
    expected = "\n".join([report["CHINESE_INTRODUCTION"], *chinese])
    assert STAMP.sub("", page.translation.text) == expected
    assert report["CHINESE_NAMES"].keys() == report["COMMANDS"].keys()


def test_a_benchmark_that_ran_writes_both_pages(
    report: dict[str, Any], tmp_path: Path
) -> None:
    page = Page(tmp_path / "benchmarks.md")
    report["write_pages"].__globals__["PAGE"] = page
    machine = "AMD (EPYC, AVX512), 2 cores, 24 GiB, NVIDIA H200; Python 3.11.7, torch 2.13, numpy 2.4; 2026-11-24"
    text = f"## Data\n\n`python benchmarks/data.py` on {machine}\n\n```\n1 row, fast\n```\n"
    report["write_pages"]({"Data": text})
    assert page.text == f"{report['INTRODUCTION']}\n{text}"
    chinese = page.translation
    assert (
        "## 数据\n\n`python benchmarks/data.py`，在 AMD (EPYC, AVX512) 上运行，2 核，24 GiB，NVIDIA H200；"
        "Python 3.11.7，torch 2.13，numpy 2.4；2026-11-24\n\n```\n1 row, fast\n```\n"
    ) in chinese.text
    assert chinese.blocks == page.blocks
    assert chinese.stamp == page.digest


def test_errors_are_those_of_the_catalog() -> None:
    page = Page(DOCS / "errors.md")
    assert page.text == errors.page("en")
    assert STAMP.sub("", page.translation.text) == errors.page("zh")
