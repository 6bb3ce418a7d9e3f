"""The pictures of the tensor modes and of packing are what their tool draws, and agree with the pages around them."""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from tests.support.pages import DOCS, Page
from tools import concept_pictures

MODES = ("mtp", "msp", "fsp", "isp")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
SVG = "{http://www.w3.org/2000/svg}"


def test_committed_pictures_are_those_of_the_tool() -> None:
    for name, content in concept_pictures.pictures().items():
        committed = (DOCS / "images" / name).read_text(encoding="utf-8")
        assert committed == content, "run: python tools/concept_pictures.py"


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_the_collectives_of_the_table(mode: str) -> None:
    """The table of docs/parallelism.md, which tests/dist/test_traffic.py holds against real calls."""
    row = re.search(
        rf"^\| {mode} \| (.*? \|)", Page(DOCS / "parallelism.md").text, re.M
    )
    assert row
    listed = {
        name: int(number) for number, name in re.findall(r"(\d) (\S+-\w+)", row[1])
    }
    drawn = Counter(
        name
        for part in concept_pictures.blocks()[mode]
        if part.kind == "collective"
        for name in (part.name, *part.backward)
        if name
    )
    assert drawn == listed and set(drawn) <= set(COLLECTIVES)


@pytest.mark.parametrize("name", sorted(concept_pictures.pictures()))
def test_text_is_translated_and_inside_the_picture(name: str) -> None:
    svg = ElementTree.fromstring(concept_pictures.pictures()[name])
    width = float(svg.attrib["viewBox"].split()[2])
    labels = [
        text
        for text in svg.iter(f"{SVG}text")
        if text.attrib["text-anchor"] == "start" and text.attrib["class"] != "title"
    ]
    assert len(labels) >= 4
    for label in labels:
        shown = label.text or ""
        end = float(label.attrib["x"]) + concept_pictures.shown_width(shown)
        assert end < width, shown
        is_chinese = re.search("[\u4e00-\u9fff]", shown) is not None
        assert is_chinese == name.endswith(".zh.svg"), shown
