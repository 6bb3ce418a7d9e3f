"""One HTML file with everything in it: style, script, the chart library and the figures of the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from evomesh.errors import UserError
from evomesh.storage.atomic_file import write_atomically

ASSETS = files("evomesh.runs") / "assets"
# No script, style, image or address from elsewhere, whatever a text of a run contains.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src {connect}; base-uri 'none'; form-action 'none'"
)


RUN_SCRIPTS = ("charts.js", "run_figures.js", "report.js")
DATA_SCRIPTS = ("charts.js", "data_words.js", "data_report.js")
PLAN_SCRIPTS = (
    "charts.js",
    "plan_words.js",
    "timeline.js",
    "memory_chart.js",
    "plan_report.js",
)


def render_page(payload: dict[str, Any]) -> str:
    """Return the page of a payload (``payload_of``); a live one may ask the server that it came from for news."""
    connect = "'self'" if payload.get("live") else "'none'"
    return _render(payload, RUN_SCRIPTS, connect)


def render_data_page(payload: dict[str, Any]) -> str:
    """Return the page of a survey of a data folder (``survey_of``)."""
    return _render(payload, DATA_SCRIPTS, "'none'")


def render_plan_page(payload: dict[str, Any]) -> str:
    """Return the page of a prediction (``plan_payload``)."""
    return _render(payload, PLAN_SCRIPTS, "'none'")


def _render(payload: dict[str, Any], scripts: Sequence[str], connect: str) -> str:
    page = _asset("report.html")
    parts = {
        "POLICY": CONTENT_POLICY.format(connect=connect),
        "STYLE": _asset("uPlot.min.css") + _asset("report.css"),
        "LICENSE": _asset("uPlot.LICENSE.txt"),
        "LIBRARY": _asset("uPlot.iife.min.js"),
        "WORDS": _asset("words.js"),
        "BASE": _asset("base.js"),
        "SCRIPT": "\n".join(map(_asset, scripts)),
        "PAYLOAD": embedded_json(payload),
    }
    for name, content in parts.items():
        page = page.replace(f"@@{name}@@", content)
    return page


def embedded_json(payload: dict[str, Any]) -> str:
    """Return JSON that may stand inside a script element: no text in it ends the element."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False)
    text = text.encode("utf-8", "replace").decode()
    return text.replace("<", "\\u003c").replace("@@", "\\u0040\\u0040")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def write_page(path: Path, page: str) -> None:
    """Write the page whole or not at all.

    Raises:
        UserError: the path is a folder, or cannot be written.
    """
    refuse_folder(path)
    try:
        with write_atomically(path) as file:
            file.write(page.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error})",
            where="OUT.html",
            expected="a file in a folder that can be written into",
            code="EVO-CLI-006",
        ) from None


def refuse_folder(path: Path) -> None:
    """Refuse a folder as the file to write.

    Raises:
        UserError: it is one.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder",
            where="OUT.html",
            expected="a file to write, such as report.html",
            fix=f"name a file in it: {path / 'report.html'}",
            code="EVO-CLI-006",
        )
