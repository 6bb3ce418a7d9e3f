"""The page of ``evomesh data report`` in a real browser: two languages, keys, narrow, print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomesh.config.data import DataConfig
from evomesh.data.survey.documents import open_folder
from evomesh.data.survey.survey import survey_of
from evomesh.runs.page import render_data_page
from tests.support import golden
from tests.support.browser import needs_browser, running_browser

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with running_browser() as browser:
        yield browser


def page_of(folder: Path, config: DataConfig | None, file: Path) -> Path:
    opened = open_folder(str(folder), "text", None, 0)
    survey = survey_of(opened, None, config)
    facts = {"written": 1.7e9, "folder": str(folder), "tokenizer": None}
    file.write_text(render_data_page({**facts, **survey}), "utf-8")
    return file


def open_page(browser: sync_api.Browser, file: Path, width: int = 1280) -> Any:
    page = browser.new_page(viewport={"width": width, "height": 900}, locale="en-GB")
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#chart-lengths .u-over")
    assert [url for url in errors if not url.startswith(("file:", "data:"))] == []
    return page


def test_token_files(browser: sync_api.Browser, tmp_path: Path) -> None:
    documents = [[7] * length for length in (1, 2, 3, 3, 40)]
    golden.write_bin(tmp_path / "train/en/a.bin", documents)
    config = DataConfig(seq_len=8, train_folder=str(tmp_path / "train"))
    page = open_page(browser, page_of(tmp_path / "train", config, tmp_path / "p.html"))
    caption = page.locator("#chart-lengths figcaption")
    sync_api.expect(caption).to_have_text(
        "documents: first 1, last 1, lowest 0 at 4–7, highest 3 at 2–3"
    )
    page.locator("#chart-lengths .plot").focus()
    page.keyboard.press("Home")
    sync_api.expect(page.locator("#spoken")).to_have_text("length 1: documents 1")
    page.keyboard.press("Shift+ArrowRight")
    sync_api.expect(page.locator("#spoken")).to_have_text("length 2–3: documents 3")
    sync_api.expect(page.locator("#exact")).to_contain_text("en/a.bin:2")
    chosen = page.locator("#packing tr.differs td").all_inner_texts()
    assert chosen[:3] == ["8", "8", "6"]  # 49 tokens
    assert chosen[4] == "1 (2.0 %)"
    page.locator("#language").click()
    sync_api.expect(page.locator("#packing h2")).to_have_text("打包损失")
    assert page.evaluate("Object.values(WORDS).every((w) => w.length === 2 && w[1])")
    # A key without words would be shown as it is.
    heads = page.locator("h2, h3, th, dt").all_inner_texts()
    assert [head for head in heads if head.isascii() and "_" in head] == ["seq_len"]
    assert page.pdf().startswith(b"%PDF")
    page.close()


def test_raw_text_on_a_phone(browser: sync_api.Browser, tmp_path: Path) -> None:
    text = "</script><script>alert(1)</script> " + "long" * 200
    lines = [text, text, "短い文章です。"]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("\n".join(lines), "utf-8")
    page = open_page(browser, page_of(tmp_path / "raw", None, tmp_path / "p.html"), 400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    sync_api.expect(page.locator("#exact")).to_contain_text("<script>alert(1)")
    sync_api.expect(page.locator("#scripts")).to_contain_text("Hiragana")
    assert page.locator("#packing").count() == 0
    assert page.locator("#token_counts").count() == 0
    page.close()
