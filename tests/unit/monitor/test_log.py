from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from evomesh.config.redact import redact_text
from evomesh.monitor.log import ALL_RANKS, close_logging, setup_logging
from evomesh.monitor.progress import ProgressLine

LOGGER = logging.getLogger("evomesh.somewhere")
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\tINFO test_log\.py:\d+ in test_\w+ -- tflops=1\n"
)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_logging()


def test_line_has_the_documented_form_on_the_terminal_and_in_the_folder(
    tmp_path: Path,
) -> None:
    out = io.StringIO()
    setup_logging(tmp_path, "dp=0_tp=0_pp=0", console=Console(file=out))
    LOGGER.info("tflops=1")
    assert LINE.fullmatch(out.getvalue())
    assert LINE.fullmatch((tmp_path / "logs" / "dp=0_tp=0_pp=0.log").read_text())


def test_lines_are_neither_wrapped_nor_marked_up() -> None:
    out = io.StringIO()
    setup_logging(console=Console(file=out, force_terminal=True, width=40))
    LOGGER.info("[red]%s[/red]", "x" * 100)
    assert f"[red]{'x' * 100}[/red]\n" in out.getvalue()


def test_other_ranks_show_warnings_and_lines_for_all_ranks_only(tmp_path: Path) -> None:
    out = io.StringIO()
    setup_logging(tmp_path, "dp=1_tp=0_pp=0", shows=False, console=Console(file=out))
    LOGGER.info("step line")
    LOGGER.warning("careful")
    LOGGER.info("New Run", extra=ALL_RANKS)
    assert [line.split(" -- ")[1] for line in out.getvalue().splitlines()] == [
        "careful",
        "New Run",
    ]
    assert "step line" in (tmp_path / "logs" / "dp=1_tp=0_pp=0.log").read_text()


def test_a_second_setup_replaces_the_first(tmp_path: Path) -> None:
    out = io.StringIO()
    console = setup_logging(console=Console(file=out))
    setup_logging(tmp_path, console=console)
    LOGGER.info("once")
    assert out.getvalue().count("once") == 1


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "S3_SECRET_ACCESS_KEY_ID": "abcdefgh123",
        "TOKENIZERS_PARALLELISM": "sometimes",
        "HF_TOKEN": "short",
    }
    assert (
        redact_text("key abcdefgh123 sometimes short", environment)
        == "key <redacted> sometimes short"
    )
    assert (
        redact_text("https://open.feishu.cn/open-apis/bot/v2/hook/1-a-2", {})
        == "https://open.feishu.cn/open-apis/bot/v2/hook/<redacted>"
    )
    assert (
        redact_text("http://user:pass@host/x http://host:80/y", {})
        == "http://<redacted>@host/x http://host:80/y"
    )
    out = io.StringIO()
    setup_logging(console=Console(file=out))
    monkeypatch.setenv("MY_API_KEY", "0123456789")
    LOGGER.info("%s", {"key": "0123456789"})
    assert "0123456789" not in out.getvalue()


def test_progress_is_live_on_a_terminal_and_silent_elsewhere() -> None:
    plain, live = io.StringIO(), io.StringIO()
    for console in (
        Console(file=plain),
        Console(file=live, force_terminal=True, width=100),
    ):
        setup_logging(console=console)
        with ProgressLine(total=20, step=10, console=console) as progress:
            progress.update(11, loss=2.5, speed=1234.0)
            LOGGER.info("a line")
    assert plain.getvalue().endswith("a line\n")
    assert plain.getvalue().count("\n") == 1
    before_first_step = live.getvalue().partition("loss 2.5000")[0]
    assert "waiting for the first step" in before_first_step
    assert "nan" not in live.getvalue()
    for part in ("11/20", "loss 2.5000", "1,234 tokens/s", "a line\n"):
        assert part in live.getvalue()
