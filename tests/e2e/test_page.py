"""The chat page in a real browser: type, stream, stop, change settings, close."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from evomesh.models.language_model import LanguageModel
from evomesh.serve.service import ServiceLimits
from tests.support.browser import needs_browser, running_browser
from tests.support.serving import TRAINED, Served, serving, tiny_model, tiny_service

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture(scope="module")
def served(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from evomesh.serve.page import mount_page

    service = tiny_service(
        tmp_path_factory.mktemp("tokenizer"),
        model,
        ServiceLimits(context_length=16384, slots=2),
    )
    with serving(service, extend=lambda app: mount_page(app, service, None)) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: sync_api.Browser, served: Served) -> Iterator[sync_api.Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    outside: list[str] = []
    page.on(
        "request",
        lambda request: (
            outside.append(request.url) if is_outside(request.url, served.url) else None
        ),
    )
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            errors.append(message.text) if message.type == "error" else None
        ),
    )
    page.goto(served.url)
    page.locator("#message textarea").wait_for()
    yield page
    page.close()
    assert not outside  # works without a network
    assert not errors  # the content policy permits all that the page needs
    assert served.idle()


def is_outside(url: str, own: str) -> bool:
    return not url.startswith((own, "data:", "blob:", own.replace("http:", "ws:")))


def status(page: sync_api.Page, pattern: str) -> re.Match[str]:
    """Wait until the status line contains ``pattern``."""
    line = page.locator("#status")
    sync_api.expect(line).to_contain_text(re.compile(pattern), timeout=60_000)
    found = re.search(pattern, line.inner_text())
    assert found is not None
    return found


def choose(page: sync_api.Page, label: str, value: int) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Enter")


def test_a_conversation_is_answered_and_continued(
    page: sync_api.Page, served: Served
) -> None:
    page.get_by_label("System prompt").fill("be short")
    choose(page, "Max new tokens", 30)
    page.locator("#message textarea").fill("hi there")
    page.locator("#send").click()
    # the prompt that the template renders from system prompt and message
    count = len("[system]be short\n[user]hi there\n[assistant]")
    status(
        page,
        rf"\b{count} prompt tokens .* 30 new tokens · [\d.]+ tokens/s · maximum length reached",
    )
    bubbles = page.locator("#conversation [data-testid]")
    sync_api.expect(page.locator("#conversation")).to_contain_text("hi there")
    assert bubbles.count() >= 2
    page.locator("#message textarea").fill("and again")
    page.locator("#message textarea").press("Enter")
    found = status(
        page, rf"\b(?!{count} )(\d+) prompt tokens .* 30 new tokens · .* length reached"
    )
    assert int(found[1]) > count + 30  # the conversation so far is part of the prompt


def test_stop_ends_a_streaming_completion(page: sync_api.Page, served: Served) -> None:
    choose(page, "Max new tokens", 16000)
    page.get_by_role("tab", name="Completion").click()
    page.locator("#prompt textarea").fill("once upon a time")
    page.locator("#complete").click()
    completion = page.locator("#completion textarea")
    sync_api.expect(completion).not_to_have_value("", timeout=60_000)
    early = len(completion.input_value())
    page.wait_for_function(
        "early => document.querySelector('#completion textarea').value.length > early",
        arg=early,
    )
    assert served.service.open_sequences == 1
    page.locator("#stop-completion").click()
    assert int(status(page, r"(\d+) new tokens .* stopped")[1]) < 16000
    assert served.idle()


def test_greedy_and_dynamic_ntk_decide_the_completion(
    page: sync_api.Page, served: Served
) -> None:
    page.get_by_role("tab", name="Completion").click()
    choose(page, "Temperature", 0)
    page.locator("#example").click()
    prompt = page.locator("#prompt textarea")
    sync_api.expect(prompt).to_have_value(
        re.compile("The pass key is$"), timeout=60_000
    )
    assert len(prompt.input_value()) > TRAINED
    # The pass key is random, and after some of them the tiny model continues alike with both rotary types.
    prompt.fill(re.sub(r"\b\d{5}\b", "13001", prompt.input_value()))
    texts = []
    # Different lengths tell the status lines apart.
    for dynamic, count in ((False, 40), (True, 41), (False, 42)):
        choose(page, "Max new tokens", count)
        page.get_by_label("Dynamic NTK").set_checked(dynamic)
        page.locator("#complete").click()
        status(page, f"{count} new tokens .* length reached")
        # 8 characters take at most 32 tokens of a byte each, so an incomplete last one is not among them
        texts.append(page.locator("#completion textarea").input_value()[:8])
    assert texts[0] == texts[2] != texts[1]


def test_an_image_of_another_server_is_not_loaded(
    browser: sync_api.Browser, served: Served
) -> None:
    page = browser.new_page()
    page.goto(served.url)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        address = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/secret.png"
        choose(page, "Max new tokens", 5)
        page.locator("#message textarea").fill(f"look ![picture]({address})")
        is_refusal = re.compile("Content Security Policy").search
        with page.expect_console_message(
            lambda message: is_refusal(message.text) is not None
        ):
            page.locator("#send").click()
        assert page.locator(f"#conversation img[src='{address}']").count() == 1
        with pytest.raises(BlockingIOError):  # nobody has connected
            elsewhere.accept()
    status(page, "5 new tokens .* length reached")
    page.close()


def test_a_closed_tab_frees_its_slot(browser: sync_api.Browser, served: Served) -> None:
    page = browser.new_page()
    page.goto(served.url)
    choose(page, "Max new tokens", 16000)
    page.get_by_role("tab", name="Completion").click()
    page.locator("#prompt textarea").fill("abc")
    page.locator("#complete").click()
    sync_api.expect(page.locator("#completion textarea")).not_to_have_value(
        "", timeout=60_000
    )
    assert served.service.open_sequences == 1
    page.close()
    assert served.idle()


def test_a_prompt_that_does_not_fit_is_reported(
    page: sync_api.Page, served: Served, tmp_path: Path
) -> None:
    page.get_by_role("tab", name="Completion").click()
    page.locator("#complete").click()
    status(page, "the prompt is empty")
    page.locator("#prompt textarea").fill("a" * 17_000)
    page.locator("#complete").click()
    status(page, "the prompt has 17000 tokens")
    page.screenshot(path=str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_model_without_chat_template_completes(
    browser: sync_api.Browser, model: LanguageModel, tmp_path: Path
) -> None:
    from evomesh.serve.page import mount_page

    service = tiny_service(
        tmp_path, model, ServiceLimits(context_length=64), template=""
    )
    with serving(service, extend=lambda app: mount_page(app, service, None)) as served:
        page = browser.new_page()
        page.goto(served.url)
        choose(page, "Max new tokens", 20)
        page.locator("#prompt textarea").fill("abc")
        page.locator("#complete").click()
        status(page, r"\b3 prompt tokens .* 20 new tokens .* length reached")
        page.close()


def test_with_a_key_the_page_asks_for_it(model: LanguageModel, tmp_path: Path) -> None:
    from evomesh.serve.page import mount_page

    service = tiny_service(tmp_path, model, ServiceLimits(context_length=64))
    extended = serving(
        service, key="s3cret", extend=lambda app: mount_page(app, service, "s3cret")
    )
    with extended as served, httpx.Client(base_url=served.url, timeout=60) as client:
        job = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/queue/join", json=job).status_code == 401
        assert (
            client.post(
                "/login", data={"username": "evomesh", "password": "wrong"}
            ).status_code
            == 400
        )
        assert (
            client.post(
                "/login", data={"username": "evomesh", "password": "s3cret"}
            ).status_code
            == 200
        )
        assert client.get("/config").status_code == 200
