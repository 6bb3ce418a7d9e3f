"""``evomesh chat`` and ``evomesh serve`` on a checkpoint that the training command wrote."""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import write_run
from tests.support.serving import byte_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    byte_tokenizer(folder / "tokenizer")
    config = write_run(folder, 'data["tokenizer_path"] = "tokenizer"\n')
    config.write_text(config.read_text().replace("total_steps=20", "total_steps=5"))
    assert (
        interpreter.run(["evomesh", "train", "config.py"], cwd=folder).returncode == 0
    )
    return folder


@covers("promise:web-demo")
def test_page_and_api_answer(trained: Path, interpreter: Interpreter) -> None:
    root = Path(__file__).parents[2]
    command = [
        str(root / "web_demo.py"),
        "--ckpt",
        "ckpts",
        "--port",
        "0",
        "--no-browser",
    ]
    running = interpreter.start(command, cwd=trained)
    try:
        running.wait_for("page: http", timeout=120)
        found = re.search(r"page: (http://127\.0\.0\.1:\d+)/", running.stdout)
        assert found is not None
        url = found[1]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                httpx.get(url + "/healthz")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        page = httpx.get(url + "/", timeout=60)
        assert page.status_code == 200
        assert "trained for 64 tokens" in page.text
        assert httpx.get(url + "/v1/models").json()["data"][0]["max_model_len"] == 256
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 5,
        }
        said = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()
        assert said["usage"]["completion_tokens"] == 5
        assert said["system_fingerprint"].startswith("5-")
    finally:
        running.signal(signal.SIGINT)
    assert running.wait(30).returncode == 130, running.stderr


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--host", "0.0.0.0"], "a key is required"),
        (["--key-file", "missing"], "no file missing"),
        (
            ["--chat-template", "llama3"],
            "the tokenizer has no token <|start_header_id|>",
        ),
        (["--chat-template", "nothing"], "no chat template 'nothing'"),
        (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--device", "gpu"], "--device: 'gpu' cannot be used"),
        (
            ["--host", "300.1.2.3", "--key-file", "config.py"],
            "cannot listen on 300.1.2.3",
        ),
    ],
)
def test_bad_options_are_one_message_and_exit_2(
    trained: Path, interpreter: Interpreter, options: list[str], part: str
) -> None:
    done = interpreter.run(
        ["evomesh", "serve", "--ckpt", "ckpts", "--port", "0", *options], cwd=trained
    )
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use(trained: Path, interpreter: Interpreter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = interpreter.run(
            ["evomesh", "chat", "--ckpt", "ckpts", "--port", port], cwd=trained
        )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
