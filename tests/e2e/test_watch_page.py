"""``evomesh watch`` in a real browser: the page follows a run that trains, keeps zoom and focus, and is local."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import httpx
import pytest

from evomesh.runs.watch import RunWatch, create_watch_app
from evomesh.serve.http_server import bind, create_server
from tests.support.browser import needs_browser, running_browser
from tests.support.run_folders import step_row, write_lines, write_run_folder

sync_api = pytest.importorskip("playwright.sync_api")


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[str]:
    watch = RunWatch([folder], poll_s=0.05)
    listening = bind("127.0.0.1", 0)
    server = create_server(create_watch_app(watch, local=True), watch.end)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        watch.end()
        server.should_exit = True
        thread.join()


def add_steps(folder: Path, *steps: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps(step_row(step)) + "\n")


def test_events_follow_the_files(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    with (
        watching(folder) as url,
        httpx.stream("GET", f"{url}/events", timeout=30) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))  # fmt: skip
        assert next(events)["runs"][0]["summary"]["next_step"] == 5
        add_steps(folder, 5, 6)
        while (found := next(events)["runs"][0]["summary"])["next_step"] < 7:
            pass
        assert found["steps"] == 7
        # A resumed run removes the steps that it redoes.
        write_lines(folder / "metrics.jsonl", [step_row(0), step_row(1)])
        while (found := next(events)["runs"][0]["summary"])["next_step"] != 2:
            pass
        assert found["steps"] == 2


def test_another_host_name_is_refused(tmp_path: Path) -> None:
    with watching(write_run_folder(tmp_path)) as url:
        assert httpx.get(url).status_code == 200
        strange = {"Host": "evil.example:7870"}
        for path in ("/", "/events"):
            assert httpx.get(url + path, headers=strange).status_code == 400
        assert httpx.get(url + "/metrics.jsonl").status_code == 404


def test_the_command_waits_for_a_run_that_has_not_begun(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "evomesh", "watch", "RUN", "--port", "0"]
    watching_it = subprocess.Popen(
        words, cwd=tmp_path, stdout=PIPE, stderr=PIPE, text=True
    )
    try:
        assert watching_it.stderr is not None and watching_it.stdout is not None
        said = watching_it.stderr.readline()
        assert said.startswith(f"no run in {tmp_path / 'RUN'} yet: waiting for one")
        write_run_folder(tmp_path / "RUN" / "demo" / "run")
        assert watching_it.stdout.readline() == "RUN/demo/run\n"
        url = watching_it.stdout.readline().removeprefix("page: ").strip()
        assert "demo/run" in httpx.get(url, timeout=30).text
    finally:
        watching_it.terminate()
        watching_it.wait()


@needs_browser
def test_the_page_follows_and_keeps_what_the_reader_did(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    errors: list[str] = []
    with watching(folder) as url, running_browser() as browser:
        page = browser.new_page(locale="en-GB")
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("html[data-updates]")
        page.wait_for_selector("#chart-loss .u-over")
        page.locator("#chart-loss .plot").focus()
        page.evaluate("drawn.find((v) => v.chart.id === 'loss').zoom([1, 3])")
        page.locator("#chart-lr summary").click()
        page.locator("#chart-loss .plot").focus()
        add_steps(folder, 5, 6, 7)
        caption = page.locator("#chart-loss figcaption")
        sync_api.expect(caption).to_contain_text("lowest -2 at step 7")
        scale = "drawn.find((v) => v.chart.id === 'loss').plot.scales.x"
        page.wait_for_function(f"{scale}.min === 1 && {scale}.max === 3")
        assert page.evaluate("document.activeElement.closest('figure').id") == "chart-loss"  # fmt: skip
        assert page.locator("#chart-lr details").get_attribute("open") is not None
    assert not errors
