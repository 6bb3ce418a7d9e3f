"""``evomesh serve`` and ``evomesh chat``: a model over HTTP."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.serve.load import ModelOptions

CheckpointOption = Annotated[
    str, typer.Option(help="A save folder (its newest), one step in it, or a Hugging Face model folder.")
]
TokenizerPathOption = Annotated[
    str | None,
    typer.Option("--tokenizer", help="tokenizer.json, .model or their folder [default: the config's]."),
]
TemplateOption = Annotated[
    str,
    typer.Option(
        "--chat-template",
        help="internlm, chatml, llama3, tokenizer (its own), none; auto: the tokenizer's own where it has one.",
    ),
]
RotaryTypeOption = Annotated[
    Literal["origin", "dynamic"] | None,
    typer.Option(
        "--rotary-type", help="dynamic: NTK scaling beyond the trained length [default: the config's]."
    ),
]
ContextOption = Annotated[int | None, typer.Option(min=2, help="Most tokens of prompt and answer together.")]
SlotsOption = Annotated[int, typer.Option(min=1, max=1024, help="Answers that are written at the same time.")]
QueueOption = Annotated[
    int, typer.Option(min=0, max=65536, help="Answers that may wait; more are refused with 429.")
]
HostOption = Annotated[str, typer.Option(help="Address to listen on; one that others can reach needs a key.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
KeyFileOption = Annotated[
    str | None, typer.Option(help="File with the key clients must bear [or: EVOMESH_API_KEY].")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ... [default: cuda where there is one].")]
NameOption = Annotated[
    str | None, typer.Option(help="What clients call the model [default: the job's name].")
]
ConfigFileOption = Annotated[
    str | None, typer.Option(help="Config file to read first: it registers a model type of your own.")
]


def serve(
    ckpt: CheckpointOption,
    tokenizer: TokenizerPathOption = None,
    chat_template: TemplateOption = "auto",
    rotary_type: RotaryTypeOption = None,
    context: ContextOption = None,
    slots: SlotsOption = 8,
    queue: QueueOption = 64,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    key_file: KeyFileOption = None,
    device: DeviceOption = "",
    name: NameOption = None,
    config: ConfigFileOption = None,
) -> None:
    """Answer OpenAI-style requests: /v1/models, /v1/completions, /v1/chat/completions."""
    from evomesh.serve.load import ModelOptions

    choices = ModelOptions(tokenizer, chat_template, rotary_type, name, context, slots, queue)
    _run(ckpt, choices, host, port, key_file, device, config, page=False)


def chat(
    ckpt: CheckpointOption,
    tokenizer: TokenizerPathOption = None,
    chat_template: TemplateOption = "auto",
    rotary_type: RotaryTypeOption = None,
    context: ContextOption = None,
    slots: SlotsOption = 4,
    queue: QueueOption = 64,
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    key_file: KeyFileOption = None,
    device: DeviceOption = "",
    name: NameOption = None,
    config: ConfigFileOption = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Open a page to talk with a model; the API of `evomesh serve` answers at the same address."""
    from evomesh.serve.load import ModelOptions

    choices = ModelOptions(tokenizer, chat_template, rotary_type, name, context, slots, queue, roomy=True)
    _run(ckpt, choices, host, port, key_file, device, config, page=True, browser=browser)


def _run(
    ckpt: str,
    choices: ModelOptions,
    host: str,
    port: int,
    key_file: str | None,
    device: str,
    config: str | None,
    *,
    page: bool,
    browser: bool = False,
) -> None:
    from evomesh.cli.device import choose_device
    from evomesh.config.loader import load_config
    from evomesh.serve.load import LOOPBACK, bind, load_service, read_key, run

    key = read_key(host, key_file)
    try:
        from evomesh.serve.app import create_app

        if page:
            from evomesh.serve.page import mount_page
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("evomesh"):
            raise
        raise UserError(f"{error.name} is not installed", fix="pip install 'evomesh[serve]'") from None
    device = choose_device(device)
    listening = bind(host, port)
    if config is not None:
        load_config(config)
    service = load_service(ckpt, device, choices)
    local = host in LOOPBACK
    app = create_app(service, key=key, local=local)
    if page:
        mount_page(app, service, key)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"
    model, limits = service.model, service.limits
    print(
        f"{model.name} ({model.fingerprint}): {limits.slots} answers of {limits.context} tokens at a time, {device}"
    )
    print(
        f"page: {url}/" if page else f"API: {url}/v1   health: {url}/healthz   metrics: {url}/metrics",
        flush=True,
    )
    if page and browser:
        _open(url)
    run(app, listening)


def _open(url: str) -> None:
    """Shows the page once the server is up, where there is a screen to show it on."""
    import threading
    import webbrowser

    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    timer = threading.Timer(1.0, webbrowser.open, [url])
    timer.daemon = True
    timer.start()


def chat_shim() -> None:
    """``python web_demo.py --ckpt DIR``: the documents' name for ``evomesh chat``."""
    from evomesh.cli.run import run

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(chat)
    run(app)
