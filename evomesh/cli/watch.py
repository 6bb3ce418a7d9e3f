"""``evomesh watch``: the page of a run, live."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from evomesh.outside_errors import missing_module

LOOK_EVERY_S = 0.5  # for a run that has not begun


def watch(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN ...]",
            show_default=False,
            help="Run folders, or folders above them (the newest run below) [default: RUN].",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; others than this machine's can read the page then."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")
    ] = 7870,
) -> None:
    """Serve the page of `evomesh report` and keep it up to date while a run trains.

    Waits for a run that has not begun yet. Ends with Ctrl-C.
    """
    from evomesh.config.user import expand_home
    from evomesh.monitor.overview import wait_for_run

    try:
        from evomesh.runs.watch import RunWatch, create_watch_app
        from evomesh.serve.http_server import bind, create_server
        from evomesh.serve.load import LOOPBACK
    except ModuleNotFoundError as error:
        raise missing_module(error, "serve") from None
    listening = bind(host, port)
    is_local = host in LOOPBACK
    if not is_local:
        print(
            f"warning: who reaches {host} can read this page; it needs no key",
            file=sys.stderr,
        )
    folders = []
    for name in runs or ["RUN"]:
        folder = wait_for_run(expand_home(name), LOOK_EVERY_S)
        print(folder, flush=True)
        folders.append(folder)
    url_host = f"[{host}]" if ":" in host else host
    print(f"page: http://{url_host}:{listening.getsockname()[1]}/", flush=True)
    served = RunWatch(folders)
    app = create_watch_app(served, local=is_local)
    create_server(app, served.end).run(sockets=[listening])
