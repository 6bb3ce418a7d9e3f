"""Figures of single layers of the gradient are those of one process in every layout (``grad_profiling``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.grad_profiling import GradProfilingConfig, layer_of
from evomesh.optim.gradient_profile import GradientProfile
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_stages
from tests.dist.layouts import RATE, SEED, VOCAB, Layout, forward_backward
from tests.dist.test_matrix import CUT, one_process
from tests.support.covers import covers
from tests.support.pool import Pool, grid_of
from tests.support.tolerances import LAYOUT, assert_close

EVERYTHING = GradProfilingConfig(
    grad_norm_profiling=True, zero_grad_profiling=True, vocab_grad_norm_profiling=True
)
SCALE = 4.0  # as if the loss had been multiplied by it
LAYOUTS = [
    Layout(zero1=2),
    Layout(tensor=4, mode="mtp", family="internlm"),
    Layout(tensor=2, mode="msp", family="internlm2"),
    Layout(tensor=2, mode="isp", weight=4),
    Layout(pipeline=2, chunks=2, packs=8),
    Layout(parallel=CUT),
    Layout(pipeline=2, parallel=CUT, family="tied"),
    Layout(tensor=2, mode="isp", weight=2, pipeline=2, family="tied"),
]


def profile(rank: int, layout: Layout) -> tuple[dict[str, float], Tensor]:
    """Return what one step measures; clipping must not change it."""
    grid = Grid()
    if layout.ranks > 1:
        sizes: dict[str, Any] = {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "weight": layout.weight,
            "zero1": layout.zero1,
        }
        grid = grid_of(mode=layout.mode, **sizes)
    config = layout.config
    stages = build_stages(config, grid, MODES[layout.mode], torch.device("cpu"))
    stages.initialize(SEED, grid)
    zero = config.hybrid_zero_optimizer.model_copy(
        update={"clip_grad_norm": 0.01, "reduce_bucket_size": 4000}
    )
    optimizer = ZeroOptimizer(
        stages.parameters().items(), config.adam, zero, grid, stages.module
    )
    tied = config.model.tie_word_embeddings
    measured = GradientProfile(EVERYTHING, optimizer.slots, grid, tied)
    optimizer.expect_micro_batches(layout.packs // grid.dp.size)
    forward_backward(stages, layout, grid, 0)
    result = optimizer.step(RATE, 0.95, 1 / SCALE, measured)
    assert result.profile is not None
    figures = measured.figures(result.profile, 1 / SCALE)
    assert figures.vocab_norms is not None
    return figures.scalars, figures.vocab_norms


def from_autograd(layout: Layout) -> tuple[dict[str, float], dict[str, int], Tensor]:
    """Return norms, zeros and norms of the head's rows, from the whole gradients of one process."""
    gradients: dict[str, Tensor] = one_process(layout).gradients
    norms: dict[str, float] = {}
    zeros: dict[str, int] = {}
    for name, gradient in gradients.items():
        members = [
            g for other, g in gradients.items() if layer_of(other) == layer_of(name)
        ]
        flat = torch.cat([member.flatten() for member in members])
        norms[f"param_grad_norm/{name}"] = float(gradient.norm()) / SCALE
        norms[f"layer_grad_norm/{layer_of(name)}"] = float(flat.norm()) / SCALE
        zeros[f"param_zero_grad/{name}"] = int((gradient == 0).sum())
        zeros[f"layer_zero_grad/{layer_of(name)}"] = int((flat == 0).sum())
    head = gradients.get("head.weight", gradients["embedding.weight"])
    return norms, zeros, head.norm(dim=1) / SCALE


@covers(
    "grad_profiling",
    "grad_profiling.grad_norm_profiling",
    "grad_profiling.zero_grad_profiling",
    "grad_profiling.vocab_grad_norm_profiling",
)
@pytest.mark.parametrize("layout", [Layout(ranks=1), *LAYOUTS], ids=str)
def test_figures_are_those_of_autograd_in_one_process(
    pool: Pool, layout: Layout
) -> None:
    norms, zeros, rows = from_autograd(layout)
    if layout.ranks == 1:
        answers = [profile(0, layout)]
    else:
        answers = pool.run(profile, layout, ranks=layout.ranks)
    for scalars, vocab_norms in answers:
        assert scalars.keys() == norms.keys() | zeros.keys()
        assert {name: scalars[name] for name in zeros} == zeros
        names = list(norms)
        assert_close(
            torch.tensor([scalars[name] for name in names], dtype=torch.float64),
            torch.tensor([norms[name] for name in names], dtype=torch.float64),
            LAYOUT,
        )
        for name in names:
            assert scalars[name] == pytest.approx(norms[name], rel=LAYOUT), name
        assert vocab_norms.shape == (VOCAB,)
        assert_close(vocab_norms, rows, LAYOUT)
    # Some tokens are in no pack: their rows of an embedding that is not the head are zero.
    assert bool(zeros["layer_zero_grad/embedding"]) == (layout.family != "tied")
