"""Take the pictures of ``evomesh report`` for the docs, in a real browser.

    python tools/report_pictures.py RUN docs/images

RUN is a run folder, such as that of the demo (`make train`). Writes report.png (light), report-dark.png,
report-narrow.png (400 px wide) and report-print.png (as it is printed).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from evomesh.monitor.overview import find_run
from evomesh.runs.page import render_page
from evomesh.runs.payload import payload_of
from evomesh.runs.read import read_run

BROWSERS = ("chromium", "google-chrome")


def take(
    browser: Browser, page_file: Path, out: Path, width: int, height: int, scheme: str
) -> None:
    """Take one picture of the page; ``scheme`` is "light" or "dark"."""
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        locale="en-GB",
    )
    if scheme == "print":
        page.emulate_media(media="print")
        page.goto(page_file.as_uri())
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
    else:
        page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector(".u-over")
    page.wait_for_timeout(300)
    page.screenshot(path=out)
    page.close()


def main() -> None:
    """Write the pictures into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    runs = [read_run(find_run(path)) for path in options.run]
    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        page_file = Path(scratch) / "report.html"
        payload = payload_of(runs, time.time())
        for entry in payload["runs"]:
            entry["folder"] = f"RUN/{entry['name']}"  # not where this machine has it
        page_file.write_text(render_page(payload), "utf-8")
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox"]
        )
        folder: Path = options.folder
        take(browser, page_file, folder / "report.png", 1280, 1000, "light")
        take(browser, page_file, folder / "report-dark.png", 1280, 1000, "dark")
        take(browser, page_file, folder / "report-narrow.png", 400, 900, "light")
        take(browser, page_file, folder / "report-print.png", 760, 1075, "print")
        browser.close()


if __name__ == "__main__":
    main()
