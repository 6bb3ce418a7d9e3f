"""Take docs/images/tensorboard.png: a run in TensorBoard, in a real browser.

python tools/tensorboard_picture.py RUN docs/images

RUN is a run folder, such as that of the demo (`make train`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from evomesh.monitor.overview import find_run
from tools.report_pictures import browser_path

HOST, PORT = "127.0.0.1", 6016
STARTING_S = 60
TAGS = "^(loss|loss_from_metric|lr|grad_norm.*|tgs.*|val.*loss)$"


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve the event files below a folder; yield the address."""
    url = f"http://{HOST}:{PORT}/"
    words = ("--logdir", str(folder), "--host", HOST, "--port", str(PORT))
    command = [sys.executable, "-m", "tensorboard.main", *words]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + STARTING_S
        while not _answers(url):
            if time.monotonic() > deadline:
                raise SystemExit("TensorBoard did not start")
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    """Write the picture into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    boards = find_run(options.run) / "tensorboards"
    with tensorboard(boards) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{url}?darkMode=false#timeseries")
        page.wait_for_selector("card-view", timeout=60_000)
        page.get_by_role("button", name="Settings").first.click()  # hides its pane
        page.get_by_role("combobox", name="Filter tags (regex)").fill(TAGS)
        page.keyboard.press("Enter")
        page.wait_for_timeout(4000)  # the charts are drawn one by one
        page.screenshot(path=options.folder / "tensorboard.png")
        browser.close()


if __name__ == "__main__":
    main()
