"""The page of ``evomesh plan --html`` in a real browser: time, ranks, keys, groups, languages, print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evomesh.config.layout import axis_sizes
from evomesh.parallel.build import axis_members
from evomesh.plan.device import load_device
from evomesh.plan.memory_timeline import MemoryPart, MemoryTimeline
from evomesh.plan.step_spans import predict_spans
from evomesh.runs.page import render_plan_page
from evomesh.runs.plan_payload import LayoutRow, PlanFigures, plan_payload
from tests.support.browser import needs_browser, running_browser
from tests.unit.plan.test_step_time import config

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser
PARALLEL = {"pipeline": {"size": 4}, "tensor": {"size": 2, "mode": "mtp"}}
GPUS = 16
GIB = 2**30


def test_a_pipeline_is_seen_and_used_with_keys(tmp_path: Path) -> None:
    layout = config(PARALLEL)
    device = load_device("A100")
    spans = predict_spans(layout, GPUS, device)
    memory = [memory_of(rank.rank) for rank in spans.ranks]
    rows = [LayoutRow("tensor <2>", 40 * GIB, spans.time)]
    figures = PlanFigures(
        "run.py", layout, GPUS, device, spans, memory, rows, price=2.0
    )
    file = tmp_path / "plan.html"
    file.write_text(render_plan_page(plan_payload(figures)), "utf-8")
    with running_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB")
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#chart-ranks .u-over")
        page.locator("#chart-streams").scroll_into_view_if_needed()
        page.wait_for_selector("#chart-streams .u-over")
        check_keys_and_zoom(page, spans.ranks[0].placed[0].end)
        check_memory(page)
        check_ranks_of_streams(page)
        check_groups(page, axis_members(axis_sizes(layout.parallel, GPUS), 5))
        bars = page.locator("#memory .bar, #layouts .bar")
        assert bars.count() == 5
        assert "weights" in bars.first.get_attribute("aria-label")
        check_languages_phone_and_print(page)
        assert [url for url in problems if not url.startswith("file:")] == []


def check_keys_and_zoom(page: Any, first_forward: float) -> None:
    """Go through the boxes by keys: the first is a forward as long as was predicted; zoom is that of both charts."""
    spoken = page.locator("#spoken")
    page.locator("#chart-ranks .plot").focus()
    page.keyboard.press("Home")
    text = spoken.inner_text()
    assert text.startswith("rank 0: forward micro-batch 0, stage 0, 0 ms – ")
    milliseconds = re.search(r"\(([\d.]+) ms\)", text)
    assert milliseconds
    assert float(milliseconds[1]) == pytest.approx(1000 * first_forward, rel=1e-2)
    page.keyboard.press("ArrowRight")
    sync_api.expect(spoken).to_contain_text("forward micro-batch 1")
    page.keyboard.press("ArrowDown")
    sync_api.expect(spoken).to_contain_text("rank 4: ")
    page.keyboard.press("+")
    ranges = "drawn.slice(0, 2).map((view) => view.plot.scales.x.max - view.plot.scales.x.min)"
    step = page.evaluate("payload.seconds * 1000")
    page.wait_for_function(f"{ranges}.every((span) => span < {0.6 * step})")
    before = page.evaluate("drawn[1].range[0]")
    page.keyboard.press("PageDown")
    page.wait_for_function(f"drawn[1].range[0] > {before}")
    page.keyboard.press("0")
    page.wait_for_function(f"{ranges}.every((span) => span > {0.99 * step})")
    # Not an empty picture: the first color of the boxes is on it.
    painted = """(() => { const c = document.querySelector('#chart-ranks canvas');
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
      for (let i = 0; i < d.length; i += 4) n += d[i] === 0x0b && d[i + 1] === 0x63 && d[i + 2] === 0xce;
      return n / (c.width * c.height); })()"""
    assert page.evaluate(painted) > 0.05


def memory_of(rank: int) -> MemoryTimeline:
    """Return the memory of a step with three levels, of which the middle one is the highest."""
    return MemoryTimeline(
        rank=rank,
        kinds=("weights", "moments", "kept activations"),
        positions=(0, 100, 200),
        nbytes=(3 * (30 * GIB,), 3 * (10 * GIB,), (0, 25 * GIB, 5 * GIB)),
        peak=1,
        parts=(MemoryPart("forward", 0, 100), MemoryPart("backward", 100, 200)),
        micro_batches=1,
        outside={"CUDA context": GIB, "NCCL": GIB},
    )


def check_memory(page: Any) -> None:
    """Look at the stack: its heights are those of the bytes, the limit is drawn, keys tell what is alive."""
    page.locator("#memory-charts").scroll_into_view_if_needed()
    page.wait_for_selector("#chart-memory-0 .u-over")
    # Pixels of each color in the column in the middle of the second level, below the strip of parts.
    column = """(() => { const plot = drawn[2].plot, { left, top, width, height } = plot.bbox;
      const x = Math.round(plot.valToPos(150, 'x', true)), from = top + 20 * devicePixelRatio;
      const d = plot.ctx.getImageData(x, from, 1, top + height - from).data, counts = {};
      for (let i = 0; i < d.length; i += 4) {
        const rgb = `${d[i]},${d[i + 1]},${d[i + 2]}`;
        counts[rgb] = (counts[rgb] || 0) + 1;
      }
      return [counts, height / plot.scales.y.max]; })()"""
    counts, pixels_of_byte = page.evaluate(column)
    colors = {"11,99,206": 30, "139,47,176": 10, "148,98,0": 25}
    for color, gibibytes in colors.items():
        expected = gibibytes * GIB * pixels_of_byte
        assert counts[color] == pytest.approx(expected, abs=2.5)
    caption = page.locator("#chart-memory-0 figcaption").inner_text()
    assert caption.startswith("peak 67.0 GiB, in backward: weights 30.0 GiB, ")
    gib = load_device("A100").memory_gib
    spare = gib - 67
    assert caption.endswith(
        f"memory of the device {gib:.1f} GiB, to spare {spare:.1f} GiB"
    )
    # The limit: a dashed line of its color at the memory of the device.
    limit = """(() => { const plot = drawn[2].plot, { left, width } = plot.bbox;
      const y = Math.round(plot.valToPos(payload.capacity, 'y', true));
      const d = plot.ctx.getImageData(left, y, width, 1).data; let n = 0;
      for (let i = 0; i < d.length; i += 4) n += d[i] === 0x8a && d[i + 1] === 0x3b && d[i + 2] === 0;
      return n / width; })()"""
    assert 0.4 < page.evaluate(limit) < 0.8
    page.locator("#chart-memory-0 .plot").focus()
    page.keyboard.press("End")
    sync_api.expect(page.locator("#spoken")).to_have_text(
        "event 200, backward: 47.0 GiB: weights 30.0 GiB, moments 10.0 GiB, "
        "kept activations 5.0 GiB, CUDA, NCCL, allocator (estimated) 2.0 GiB"
    )


def check_ranks_of_streams(page: Any) -> None:
    """Choose a second rank: its streams come below those of the first."""
    labels = "drawn[1].rows.map((row) => row.label)"
    alone = page.evaluate(labels)
    assert alone[0] == "compute"
    assert "all_reduce tp" in alone
    page.get_by_label("12", exact=True).check()
    charts = page.locator("#memory-charts h3")
    assert charts.all_inner_texts() == [
        "Memory over the step, rank 0",
        "Memory over the step, rank 12",
    ]
    page.wait_for_selector("#chart-memory-12 .u-over")
    both = page.evaluate(labels)
    assert both[0] == "0 compute"
    assert "12 compute" in both
    page.locator("#chart-streams summary").click()
    cells = page.locator("#chart-streams details tbody tr").first.inner_text().split()
    assert cells[:2] == ["0", "compute"]
    page.locator("#chart-streams summary").click()


def check_groups(page: Any, members_of: dict[str, list[int]]) -> None:
    """Choose rank 5: the ranks with a stripe are those of its axes."""
    page.locator("#chosen-rank").fill("5")
    striped = page.locator(".cell:has(i)").evaluate_all(
        "(cells) => cells.map((cell) => Number(cell.dataset.rank))"
    )
    others: set[int] = set()
    for members in members_of.values():
        others.update(members)
    assert set(striped) == others - {5}


def check_languages_phone_and_print(page: Any) -> None:
    """Look for words without a translation, anything too wide, and print."""
    page.locator("#language").click()
    sync_api.expect(page.locator("#groups h2")).to_have_text("通信关系")
    assert page.evaluate("Object.values(WORDS).every((w) => w.length === 2 && w[1])")
    heads = page.locator("h2, h3, th, dt, legend").all_inner_texts()
    assert [head for head in heads if re.search("[a-z]_[a-z]", head)] == []
    page.set_viewport_size({"width": 400, "height": 800})
    # Charts follow the window with its next frame.
    page.wait_for_function("document.documentElement.scrollWidth <= 400")
    assert page.pdf().startswith(b"%PDF")
