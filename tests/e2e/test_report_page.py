"""The page of ``evomesh report`` in a real browser: two languages, keys, narrow, print, long runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evomesh.runs.page import render_page
from evomesh.runs.payload import payload_of
from evomesh.runs.read import read_run
from tests.support.browser import needs_browser, running_browser
from tests.support.run_folders import step_row, write_lines, write_run_folder

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser: sync_api.Browser, tmp_path: Path) -> Iterator[Open]:
    """Open the page of run folders; at the end it must have asked for nothing and have had no error."""
    outside: list[str] = []
    errors: list[str] = []
    pages = []

    def open_one(*folders: Path, width: int = 1280) -> sync_api.Page:
        file = tmp_path / "page.html"
        runs = [read_run(folder) for folder in folders]
        file.write_text(render_page(payload_of(runs, 1.7e9)), "utf-8")
        page = browser.new_page(
            viewport={"width": width, "height": 900}, locale="en-GB"
        )
        pages.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda line: errors.append(line.text) if line.type == "error" else None,
        )
        page.on("request", lambda request: outside.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not [url for url in outside if not url.startswith(("file:", "data:"))]
    assert not errors


def test_charts_tables_and_language(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_run_folder(tmp_path / "demo" / "run"))
    page.wait_for_selector("#chart-loss .u-over")
    caption = page.locator("#chart-loss figcaption")
    english = "loss: first 5, last 1, lowest 1 at step 4, highest 5 at step 0"
    sync_api.expect(caption).to_have_text(english)
    page.locator("#chart-loss summary").click()
    rows = page.locator("#chart-loss details tbody tr")
    sync_api.expect(rows).to_have_count(5)  # the table is made when it is opened
    cells = rows.all_inner_texts()
    assert [row.split() for row in cells] == [[str(s), str(5 - s)] for s in range(5)]
    sync_api.expect(page.locator("#time")).to_contain_text("useful training")
    # Figures in another unit, and as their sum so far.
    data = "drawn.find((v) => v.chart.id === '{}').data[1]"
    assert page.evaluate(data.format("memory")) == [1000 / 2**30]
    assert page.evaluate(data.format("progress")) == [60 * (s + 1) for s in range(5)]
    page.locator("#language").click()
    sync_api.expect(page.locator("#time")).to_contain_text("有效训练")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    # No text is left in the other language: every word has both.
    assert page.evaluate("Object.values(WORDS).every((w) => w.length === 2 && w[1])")


def test_a_chart_is_used_with_keys_alone(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_run_folder(tmp_path))
    box = page.locator("#chart-loss .plot")
    page.wait_for_selector("#chart-loss .u-over")
    box.focus()
    page.keyboard.press("End")
    spoken = page.locator("#spoken")
    sync_api.expect(spoken).to_have_text("step 4: loss 1")
    page.keyboard.press("ArrowLeft")
    sync_api.expect(spoken).to_have_text("step 3: loss 2")
    page.keyboard.press("+")
    view = "drawn.find((v) => v.chart.id === 'loss').plot.scales.x"
    page.wait_for_function(f"{view}.min === 2 && {view}.max === 4")
    page.keyboard.press("0")
    page.wait_for_function(f"{view}.min === 0")
    assert "first 5" in box.get_attribute("aria-label")


def test_two_runs_share_their_charts(open_page: Open, tmp_path: Path) -> None:
    first = write_run_folder(tmp_path / "a", config={"adam": {"lr": 1.0, "eps": 2}})
    second = write_run_folder(tmp_path / "b", config={"adam": {"lr": 3.0, "eps": 2}})
    write_lines(second / "metrics.jsonl", [step_row(s) for s in (0, 2, 9)])
    page = open_page(first, second)
    page.wait_for_selector("#chart-loss .u-over")
    data = page.evaluate("drawn.find((v) => v.chart.id === 'loss').data")
    assert data[0] == [0, 1, 2, 3, 4, 9]
    assert [value for value in data[2] if value is not None] == [5, 3, -4]
    # Of the configuration, what differs.
    rows = page.locator("#config tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [["adam.lr", "1.0", "3.0"]]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_is_wider_than_a_phone(
    open_page: Open, tmp_path: Path, language: str
) -> None:
    page = open_page(write_run_folder(tmp_path), width=400)
    if language == "zh":
        page.locator("#language").click()
    page.wait_for_selector("#chart-loss .u-over")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_print_has_all_charts_in_light_colors(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_run_folder(tmp_path))
    page.emulate_media(color_scheme="dark")
    assert page.pdf().startswith(b"%PDF")  # runs the page's print events
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("drawn.every((v) => v.plot)")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(background) != "rgb(255, 255, 255)"


def test_a_broken_and_an_empty_run(open_page: Open, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    rows = [step_row(0), step_row(1, loss="NaN", grad_norm="NaN")]
    write_lines(broken / "metrics.jsonl", rows, torn='{"st')
    page = open_page(broken)
    sync_api.expect(page.locator("#summary")).to_contain_text(
        "metrics.jsonl: 1 lines that could not be read"
    )
    sync_api.expect(page.locator("#skipped")).to_contain_text("NaN")
    empty = tmp_path / "empty"
    write_lines(empty / "metrics.jsonl", [])
    page = open_page(empty)
    sync_api.expect(page.locator("#summary")).to_contain_text("No step is recorded yet")


def test_what_happened_in_a_run(open_page: Open, tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    values = {"eval/arc/acc": 0.5, "eval/wiki/perplexity": 30.0}
    write_lines(folder / "metrics.jsonl", [step_row(s, **values) for s in range(3)])
    document = {"file": "a.bin", "row": 7, "start": 0, "stop": 9, "text": "<b>bad</b>"}
    found = {"rank": 1, "micro_batch": 2, "suspicion": 30.0, "documents": [document]}
    spike = {"event": "spike", "step": 2, "time": 1.0, "what": ["loss"], "loss": "NaN"}
    spike |= {"median": {"loss": 4.0}, "action": "skipped", "left_out": [2]}
    court = {"event": "court", "step": 2, "micro_batches": [found], "layers": []}
    write_lines(folder / "spikes.jsonl", [spike, court])
    sample = {"step": 2, "tokens": 128, "prompt": "Hello", "text": " <i>world</i>"}
    write_lines(folder / "samples.jsonl", [sample])
    (folder / "plan.json").write_text('{"gpus": 2, "tokens_per_step": 64}')
    page = open_page(folder)
    page.wait_for_selector("#chart-eval .u-over")
    captions = [
        page.locator(f"#chart-{id} figcaption") for id in ("eval", "eval_other")
    ]
    sync_api.expect(captions[0]).to_contain_text("arc/acc: first 0.5")
    sync_api.expect(captions[0]).not_to_contain_text("wiki")
    sync_api.expect(captions[1]).to_contain_text("wiki/perplexity: first 30")
    sync_api.expect(page.locator("#spikes")).to_contain_text(
        "skipped; left out: steps 2"
    )
    page.locator("#spikes summary").click()
    sync_api.expect(page.locator("#spikes summary")).to_contain_text("step 2")
    sync_api.expect(page.locator("#chart-loss figcaption")).to_contain_text("spikes")
    sync_api.expect(page.locator("#spikes")).to_contain_text("<b>bad</b>")
    sync_api.expect(page.locator("#samples")).to_contain_text(" <i>world</i>")
    rows = page.locator("#predictions tbody tr").all_inner_texts()
    assert [row.split("\t")[1:] for row in rows] == [
        ["2", "2", "100.0 %"],
        ["64", "64", "100.0 %"],
    ]


def test_every_step_of_a_long_run_is_there(open_page: Open, tmp_path: Path) -> None:
    steps = 100_000
    rows = [{"step": s, "loss": 2 + math.sin(s / 999)} for s in range(steps)]
    rows[54_321]["loss"] = 50.0
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = open_page(tmp_path)
    page.wait_for_selector("#chart-loss .u-over")
    caption = page.locator("#chart-loss figcaption")
    sync_api.expect(caption).to_contain_text("highest 50 at step 54321")
    view = "drawn.find((v) => v.chart.id === 'loss')"
    assert page.evaluate(f"{view}.data[0].length") == steps
