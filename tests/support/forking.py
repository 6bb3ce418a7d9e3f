"""Processes that start in milliseconds: they are forked from a server that has torch and evomesh imported.

The server is Python's own ``multiprocessing`` fork server, started at first use, one for each pytest process.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import pkgutil
from multiprocessing.context import ForkServerContext

import evomesh

# A command imports half a second of modules; the server imports them once. Few tests need the heavy ones.
_LIBRARIES = (
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.utils.tensorboard",
    "boto3",
    "transformers.models.llama.modeling_llama",
)
_HEAVY = ("evomesh.__main__", "evomesh.serve.page", "evomesh.evaluate.run")
_LAST = ("tests.support.prepared", "tests.support.frozen")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@functools.cache
def context() -> ForkServerContext:
    """The context whose ``Process`` forks off the server; children have one compute thread."""
    ctx = multiprocessing.get_context("forkserver")
    modules = [*filter(_exists, _LIBRARIES), *_own_modules(), *_LAST]
    ctx.set_forkserver_preload(modules)
    kept = {name: os.environ.get(name) for name in _ONE_THREAD}
    # Read by the server when it imports torch.
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return ctx


def _own_modules() -> list[str]:
    names = [
        module.name for module in pkgutil.walk_packages(evomesh.__path__, "evomesh.")
    ]
    return [name for name in names if name not in _HEAVY]


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
