"""Compiled blocks train like one process without the compiler, in layouts with collectives and hooks in blocks."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.dist.layouts import Layout, Trained, join, train
from tests.support.pool import Pool
from tests.support.tolerances import LAYOUT, assert_close

COMPILED: dict[str, Any] = {"compile": True, "num_layers": 2}
LAYOUTS = [
    # All-reduces in blocks: what torch 2.11 compiled into wrong gradients.
    Layout(tensor=2, ranks=2, mode="mtp", model=COMPILED),
    Layout(tensor=2, ranks=2, mode="fsp", model=COMPILED | {"checkpoint": 0.5}),
    Layout(tensor=2, ranks=2, mode="isp", weight=2, model=COMPILED),
    Layout(ranks=2, parallel={"zero1": {"fsdp": True}}, model=COMPILED, adam=True),
]


def compiled_train(rank: int, layout: Layout) -> tuple[Trained, int]:
    """Return the result, and the number of compiled graphs."""
    compile_module = nn.Module.compile
    torch._dynamo.reset()
    counters.clear()

    def quick_compile(module: nn.Module) -> None:
        """Make graphs and their gradients as ever, but no code, which takes minutes here."""
        compile_module(module, backend="aot_eager")

    with mock.patch.object(nn.Module, "compile", quick_compile):
        trained = train(rank, layout)
    return trained, int(counters["stats"]["unique_graphs"])


@cache
def one_process(adam: bool) -> Trained:
    return join([train(0, Layout(ranks=1, model={"num_layers": 2}, adam=adam))])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compiled_layouts_train_like_one_process(pool: Pool, layout: Layout) -> None:
    ranks = pool.run(compiled_train, layout, ranks=layout.ranks, timeout=300.0)
    assert all(graphs > 0 for _, graphs in ranks)
    found = join([trained for trained, _ in ranks])
    whole = one_process(layout.adam)
    losses = [torch.tensor(one.losses, dtype=torch.float64) for one in (found, whole)]
    assert_close(*losses, LAYOUT, "losses")
    for kind in ("gradients", "final"):
        for name, tensor in getattr(whole, kind).items():
            assert_close(getattr(found, kind)[name], tensor, LAYOUT, f"{kind}: {name}")
