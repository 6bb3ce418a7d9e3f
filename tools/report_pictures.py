"""Take the pictures of ``evomesh report`` and ``evomesh data report`` for the docs, in a real browser.

    python tools/report_pictures.py RUN docs/images
    python tools/report_pictures.py --data demo_data/train --tokenizer demo_data/tokenizer.json docs/images
    python tools/report_pictures.py --plan configs/7B_sft.py docs/images

RUN is a run folder, such as that of the demo (`make train`). Writes report.png (light), report-dark.png,
report-narrow.png (400 px wide) and report-print.png (as it is printed). Of a data folder it writes data-report.png and
data-report-dark.png; of a config, planned as a pipeline of 8 stages on 64 H100, plan-timeline.png, plan-memory.png and
plan-groups.png.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from evomesh.cli.plan_page import memory_of_ranks
from evomesh.config.data import DataConfig
from evomesh.config.loader import load_config
from evomesh.data.survey.documents import open_folder
from evomesh.data.survey.survey import survey_of
from evomesh.data.tokenizer import load_tokenizer
from evomesh.monitor.overview import find_run
from evomesh.plan.device import load_device
from evomesh.plan.step_spans import predict_spans
from evomesh.runs.page import render_data_page, render_page, render_plan_page
from evomesh.runs.payload import payload_of
from evomesh.runs.plan_payload import PlanFigures, plan_payload
from evomesh.runs.read import read_run

BROWSERS = ("chromium", "google-chrome")
PLAN_GPUS = 64


def browser_path() -> str:
    """Return the browser of this machine."""
    return next(filter(None, map(shutil.which, BROWSERS)))


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


def run_page(paths: list[Path]) -> str:
    """Return the page of runs, without the folders that this machine has them in."""
    runs = [read_run(find_run(path)) for path in paths]
    payload = payload_of(runs, time.time())
    for entry in payload["runs"]:
        entry["folder"] = f"RUN/{entry['name']}"
    return render_page(payload)


def data_page(folder: str, tokenizer_path: str) -> str:
    """Return the page of a data folder, packed as a config without a ``data`` section would."""
    tokenizer = load_tokenizer(tokenizer_path)
    opened = open_folder(folder, "text", tokenizer, 0)
    survey = survey_of(opened, tokenizer, DataConfig(train_folder=folder))
    survey["written"] = time.time()
    survey["folder"] = "/".join(Path(folder).parts[-2:])
    survey["tokenizer"] = tokenizer.path.name
    return render_data_page(survey)


def plan_page(config: str) -> str:
    """Return the page of a config as a pipeline of 8 stages on 64 H100."""
    changes = ["parallel.pipeline.size=8", "data.micro_num=16", "model.checkpoint=0.5"]
    settings = load_config(config, changes).config
    device = load_device("H100")
    spans = predict_spans(settings, PLAN_GPUS, device)
    name = Path(config).name
    memory = memory_of_ranks(settings, PLAN_GPUS, spans, device)
    figures = PlanFigures(name, settings, PLAN_GPUS, device, spans, memory)
    return render_plan_page(plan_payload(figures))


def take_sections(browser: Browser, page_file: Path, folder: Path) -> None:
    """Take the timeline, the memory and the groups of a plan."""
    page = browser.new_page(viewport={"width": 1000, "height": 1400}, locale="en-GB")
    page.goto(page_file.as_uri())
    page.wait_for_selector("#chart-streams .u-over")
    section = page.locator("#timeline").bounding_box()
    streams = page.locator("#chart-streams").bounding_box()
    assert section is not None
    assert streams is not None
    height = streams["y"] + streams["height"] - section["y"]
    clip = {**section, "height": height}
    page.screenshot(path=folder / "plan-timeline.png", clip=clip, full_page=True)
    memory = page.locator("#chart-memory-0")
    memory.scroll_into_view_if_needed()
    page.wait_for_selector("#chart-memory-0 .u-over")
    memory.screenshot(path=folder / "plan-memory.png")
    page.locator("#groups").screenshot(path=folder / "plan-groups.png")
    page.close()


def main() -> None:
    """Write the pictures into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="*")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument("--plan", metavar="CONFIG")
    parser.add_argument("--tokenizer", default="demo_data/tokenizer.json")
    options = parser.parse_args()
    folder: Path = options.folder
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        file = Path(scratch) / "report.html"
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox"]
        )
        if options.run:
            file.write_text(run_page(options.run), "utf-8")
            take(browser, file, folder / "report.png", 1280, 1000, "light")
            take(browser, file, folder / "report-dark.png", 1280, 1000, "dark")
            take(browser, file, folder / "report-narrow.png", 400, 900, "light")
            take(browser, file, folder / "report-print.png", 760, 1075, "print")
        if options.data:
            file.write_text(data_page(options.data, options.tokenizer), "utf-8")
            take(browser, file, folder / "data-report.png", 1280, 1300, "light")
            take(browser, file, folder / "data-report-dark.png", 1280, 1300, "dark")
        if options.plan:
            file.write_text(plan_page(options.plan), "utf-8")
            take_sections(browser, file, folder)
        browser.close()


if __name__ == "__main__":
    main()
