"""docs/layouts.md and its Chinese page are what their tool writes, and a run would start with every layout in them."""

from __future__ import annotations

import pytest

from evomesh.config.layout import check_world, data_parallel_size
from evomesh.config.loader import load_config
from evomesh.config.size import tokens_per_step
from evomesh.plan.device import load_device
from tests.support.pages import STAMP
from tools import layout_tables

ROWS = layout_tables.read_rows()


def test_pages_are_up_to_date() -> None:
    english, chinese = layout_tables.pages()
    page = layout_tables.PAGE
    assert page.text == english, "run: python tools/layout_tables.py --pages"
    written = STAMP.sub("", page.translation.text)
    assert written == chinese, "run: python tools/layout_tables.py --pages"


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS.values() if row.sections],
    ids=lambda row: f"{row.model} on {row.gpus}",
)
def test_a_run_would_start_with_the_layout(row: layout_tables.LayoutRow) -> None:
    overrides = layout_tables.settings(row.model, row.gpus)
    for section, keys in row.sections.items():
        overrides += [f"{section}.{key}={value!r}" for key, value in keys.items()]
    path = layout_tables.ROOT / layout_tables.CONFIG
    config = load_config(str(path), overrides).config
    check_world(config, row.gpus)
    ranks = data_parallel_size(config.parallel, row.gpus)
    tokens = layout_tables.LENGTH * layout_tables.SEQUENCES
    assert tokens_per_step(config, ranks) == tokens
    assert row.gib < load_device(layout_tables.DEVICE).memory_gib


def test_tables_have_a_row_of_every_search() -> None:
    text = layout_tables.PAGE.text
    for row in ROWS.values():
        assert f"### {row.model}: {row.parameters:,} parameters" in text
    speeds = [
        f" {row.tokens_per_second:,.0f} |" for row in ROWS.values() if row.sections
    ]
    assert all(speed in text for speed in speeds)
