"""``evomesh serve`` and ``evomesh chat``: a model over HTTP."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evomesh.cli.options import (
    CheckpointOption,
    ConfigFileOption,
    DeviceOption,
    EmaOption,
    PagedOption,
    TemplateOption,
    TokenizerPathOption,
)
from evomesh.outside_errors import missing_module

if TYPE_CHECKING:
    from evomesh.serve.load import ModelOptions

RotaryTypeOption = Annotated[
    Literal["origin", "dynamic"] | None,
    typer.Option(
        "--rotary-type",
        help="dynamic: NTK scaling beyond the trained length [default: the config's].",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        min=2, help="Context length: maximum number of tokens of prompt and answer."
    ),
]
SlotsOption = Annotated[
    int, typer.Option(min=1, max=1024, help="Maximum number of concurrent sequences.")
]
QueueOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=65536,
        help="Maximum number of waiting sequences; more are rejected with HTTP 429.",
    ),
]
HostOption = Annotated[
    str,
    typer.Option(help="Bind address; any non-loopback address requires an API key."),
]
PortOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")
]
KeyFileOption = Annotated[
    str | None,
    typer.Option(
        help="File with the API key that clients must send [or: EVOMESH_API_KEY]."
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(help="Model name in requests [default: the config's JOB_NAME]."),
]


def serve(
    ckpt: CheckpointOption,
    tokenizer: TokenizerPathOption = None,
    chat_template: TemplateOption = "auto",
    rotary_type: RotaryTypeOption = None,
    ema: EmaOption = False,
    context: ContextOption = None,
    slots: SlotsOption = 8,
    queue: QueueOption = 64,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    key_file: KeyFileOption = None,
    device: DeviceOption = "",
    name: NameOption = None,
    config: ConfigFileOption = None,
    paged: PagedOption = "off",
) -> None:
    """Serve a model over the OpenAI API. Routes: /v1/models, /v1/completions, /v1/chat/completions."""
    from evomesh.serve.load import ModelOptions

    options = ModelOptions(
        tokenizer=tokenizer,
        template=chat_template,
        rotary_type=rotary_type,
        ema=ema,
        name=name,
        context_length=context,
        slots=slots,
        queue=queue,
        paged=paged,
    )
    _serve_model(
        ckpt,
        options,
        host=host,
        port=port,
        key_file=key_file,
        device=device,
        config=config,
    )


def chat(
    ckpt: CheckpointOption,
    tokenizer: TokenizerPathOption = None,
    chat_template: TemplateOption = "auto",
    rotary_type: RotaryTypeOption = None,
    ema: EmaOption = False,
    context: ContextOption = None,
    slots: SlotsOption = 4,
    queue: QueueOption = 64,
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    key_file: KeyFileOption = None,
    device: DeviceOption = "",
    name: NameOption = None,
    config: ConfigFileOption = None,
    paged: PagedOption = "off",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Serve a page to chat with a model. The API of `evomesh serve` is at the same address."""
    from evomesh.serve.load import ModelOptions

    options = ModelOptions(
        tokenizer=tokenizer,
        template=chat_template,
        rotary_type=rotary_type,
        ema=ema,
        name=name,
        context_length=context,
        slots=slots,
        queue=queue,
        paged=paged,
        extended_context=True,
    )
    _serve_model(
        ckpt,
        options,
        host=host,
        port=port,
        key_file=key_file,
        device=device,
        config=config,
        page=True,
        browser=browser,
    )


def _serve_model(
    ckpt: str,
    options: ModelOptions,
    *,
    host: str,
    port: int,
    key_file: str | None,
    device: str,
    config: str | None,
    page: bool = False,
    browser: bool = False,
) -> None:
    """Load a model and serve it until a signal ends the process."""
    from evomesh.config.loader import load_config
    from evomesh.parallel.device import device_by_name
    from evomesh.serve.load import LOOPBACK, load_service, read_key

    # 1. Reject what can be rejected before the model is loaded: key, packages, device, address.
    key = read_key(host, key_file)
    try:
        from evomesh.serve.app import create_app
        from evomesh.serve.http_server import bind, create_server

        if page:
            from evomesh.serve.page import mount_page
    except ModuleNotFoundError as error:
        raise missing_module(error, "serve") from None
    chosen_device = device_by_name(device)
    listening = bind(host, port)

    # 2. Load the model and create its routes.
    if config is not None:
        load_config(config)
    service = load_service(ckpt, chosen_device, options)
    app = create_app(service, key=key, local=host in LOOPBACK)
    if page:
        mount_page(app, service, key)

    # 3. Print the addresses and serve.
    url_host = f"[{host}]" if ":" in host else host
    url = f"http://{url_host}:{listening.getsockname()[1]}"
    model = service.model
    limits = service.limits
    print(
        f"{model.name} ({model.fingerprint}) on {chosen_device}: {limits.slots} concurrent sequences of up to "
        f"{limits.context_length} tokens"
    )
    if page:
        print(f"page: {url}/", flush=True)
    else:
        print(
            f"API: {url}/v1   health: {url}/healthz   metrics: {url}/metrics",
            flush=True,
        )
    if page and browser:
        _open_browser(url)
    gc.collect()  # the server exempts all that exists from the collection of garbage
    create_server(app, service.engines.end_answers).run(sockets=[listening])


def _open_browser(url: str) -> None:
    """Open the page once the server is up, if there is a screen to show it on."""
    import threading
    import webbrowser

    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not has_display:
        return
    timer = threading.Timer(1.0, webbrowser.open, [url])
    timer.daemon = True
    timer.start()


def chat_shim() -> None:
    """Run ``python web_demo.py --ckpt DIR``, InternEvo's name for ``evomesh chat``."""
    from evomesh.cli.run import run
    from evomesh.cli.usage import single_command

    run(single_command(chat))
