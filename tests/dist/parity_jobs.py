"""Jobs of ranks for tests of the comparison of layouts, and faults to put into one module of a layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from evomesh.diagnose.parity import observe
from evomesh.diagnose.parity.run import compare_with, train_alone
from evomesh.diagnose.parity.shrink import shrink, with_dtype
from evomesh.optim.buckets import ParameterSync
from evomesh.parallel.exchange import default_exchange
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import spec_of, with_spec
from evomesh.train.stages import ModelStages, build_stages
from tests.dist.layouts import Layout
from tests.support.pool import grid_of


def compare_small(rank: int, layout: Layout, dtype: str) -> dict[str, Any]:
    """The findings of one rank, as a dict."""
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "weight": layout.weight,
        "zero1": layout.zero1,
    }
    grid = grid_of(mode=layout.mode, **sizes)
    small = with_dtype(shrink(layout.config, layout.ranks), dtype)
    device = torch.device("cpu")
    exchange = default_exchange()
    whole = train_alone(small, grid, device)
    parity = compare_with(whole, small, grid, device, exchange)
    exchange.close()
    return asdict(parity) | {"is_equal": parity.is_equal, "text": parity.describe()}


def skip_reduction(module: nn.Module) -> None:
    """Let one module take its rank for the only one of the tensor axis."""
    module.placement = replace(module.placement, axis=Axis("tp"))


def skip_gradient_sum(module: nn.Module) -> None:
    """Let a weight's gradient count as complete, although each rank has a summand."""
    spec = spec_of(module.weight)
    with_spec(module.weight, replace(spec, partial=frozenset()))


def broken_builder(
    name: str, fault: Callable[[nn.Module], None]
) -> Callable[..., ModelStages]:
    """``build_stages`` with a fault in the module ``name`` of a layout; what one process builds is whole."""

    def build(*args: Any) -> ModelStages:
        stages = build_stages(*args)
        grid = args[1]
        for model in stages.models:
            modules = dict(model.named_modules())
            if grid.world_size > 1 and name in modules:
                fault(modules[name])
        return stages

    return build


def compare_broken(
    rank: int, layout: Layout, name: str, fault: Callable[[nn.Module], None]
) -> dict[str, Any]:
    """As ``compare_small``, with a fault in the module ``name``."""
    with patch.object(observe, "build_stages", broken_builder(name, fault)):
        return compare_small(rank, layout, "float64")


def compare_halved(
    rank: int, layout: Layout, module: str, collective: str
) -> dict[str, Any]:
    """As ``compare_small``, with a collective that halves what it returns, as one module of the package calls it."""
    home = importlib.import_module(module)
    whole = getattr(home, collective)

    def halved(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        axes = [*arguments, *options.values()]
        several = any(isinstance(axis, Axis) and axis.size > 1 for axis in axes)
        result: Tensor = whole(x, *arguments, **options)
        return result * 0.5 if several else result

    with patch.object(home, collective, halved):
        return compare_small(rank, layout, "float64")


def compare_stale(rank: int, layout: Layout) -> dict[str, Any]:
    """As ``compare_small``, with updated weights that no rank sends to the others."""
    with patch.object(ParameterSync, "start", lambda sync: None):
        return compare_small(rank, layout, "float64")
