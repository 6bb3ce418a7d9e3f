"""The documentation in two languages: what a page has in English it has in Chinese, and neither changes alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.pages import BLOCK, DOCS, STAMP, Page, english_pages
from tools.cluster_transcript import PAGE as TRANSCRIPT_PAGE
from tools.cluster_transcript import TITLES, Transcript
from tools.translations import as_chinese_page

# Pages that have no Chinese counterpart yet; the list only gets shorter.
ENGLISH_ONLY: set[str] = set()
TRANSLATED = [page for page in english_pages() if page.translation.path.exists()]


def test_every_page_is_translated_or_listed() -> None:
    untranslated = {
        page.name
        for page in english_pages()
        if not page.translation.path.exists() and not page.name.startswith("adr/")
    }
    assert untranslated == ENGLISH_ONLY


def test_no_translation_stands_alone() -> None:
    translations = {page.translation.path for page in TRANSLATED}
    assert set(DOCS.rglob("*.zh.md")) == translations


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_both_languages_have_the_same_structure(page: Page) -> None:
    chinese = page.translation
    assert chinese.heading_levels == page.heading_levels
    assert chinese.blocks == page.blocks
    # Two links of one sentence may change places.
    targets = [link.replace(".zh.md", ".md") for link in chinese.links]
    assert sorted(targets) == sorted(page.links)
    assert chinese.table_rows == page.table_rows


def test_the_cluster_transcript_has_the_prose_that_its_tool_writes() -> None:
    rank = re.search(r"kill -STOP (\d+)", TRANSCRIPT_PAGE.text)
    assert rank
    transcript = Transcript()
    for title in TITLES:
        transcript.add(title.naming(int(rank[1])))
    english, chinese = (BLOCK.sub("", text) for text in transcript.text)
    assert TRANSCRIPT_PAGE.prose == english
    assert STAMP.sub("", TRANSCRIPT_PAGE.translation.prose) == chinese


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_no_page_changes_in_one_language_only(page: Page) -> None:
    assert page.translation.stamp == page.digest, (
        f"{page.name} has changed since {page.translation.name} was compared with it: bring the Chinese page up to "
        f"date, then run: python tools/translations.py {page.name}"
    )


def test_the_readme_has_the_same_commands_in_both_languages() -> None:
    root = DOCS.parent
    english, chinese = Page(root / "README.md"), Page(root / "README.zh-CN.md")
    assert chinese.blocks == english.blocks
    assert _typed_lines(chinese) == _typed_lines(english)


def _typed_lines(page: Page) -> list[str]:
    return [line for line in page.prose.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize(
    "path",
    [DOCS.parent / "README.zh-CN.md", *(page.translation.path for page in TRANSLATED)],
    ids=lambda path: path.name,
)
def test_chinese_pages_have_chinese_punctuation_and_links(path: Path) -> None:
    page = Page(path)
    assert re.findall("[\u4e00-\u9fff][,:;!?]", page.prose) == []
    # Between two Latin words of a Chinese line, too.
    assert as_chinese_page(page.text, path.parent) == page.text, (
        "python tools/translations.py PAGE.md writes both"
    )


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())
    assert sorted(_pages_of(settings["nav"])) == [page.name for page in english_pages()]


def _pages_of(entry: object) -> Iterator[str]:
    """Yield the pages of a part of the navigation: a page, a list, or a dict of a title and what is below it."""
    if isinstance(entry, str):
        yield entry
    children = entry.values() if isinstance(entry, dict) else entry
    if isinstance(entry, dict | list):
        for child in children:
            yield from _pages_of(child)
