"""Weights cut over ranks: what a rank holds and sends, and that no row is left as memory happened to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch

from evomesh.config.schema import ModelConfig
from evomesh.layers import norm
from evomesh.models.decoder import Decoder
from evomesh.models.llama import LLAMA
from evomesh.models.registry import model_initializer
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.traffic import record_traffic
from evomesh.train.stages import ModelStages, build_stages
from tests.dist.layouts import (
    SEED,
    VOCAB,
    Layout,
    Trained,
    forward_backward,
    join,
    local,
    packs,
    train,
)
from tests.support.covers import covers
from tests.support.own_model import register
from tests.support.pool import Pool, grid_of
from tests.support.tolerances import FLOAT32_LAYOUT, LAYOUT, assert_close

CUT = {"zero1": {"fsdp": True}}
EVEN = {"vocab_size": 68}  # divides by 4; the packs' ids are below 67
FLOAT64 = 8


def built(layout: Layout) -> tuple[ModelStages, Grid]:
    grid = grid_of(
        tensor=layout.tensor,
        mode=layout.mode,
        pipeline=layout.pipeline,
        weight=layout.weight,
        zero1=layout.zero1,
    )
    return build_stages(
        layout.config, grid, MODES[layout.mode], torch.device("cpu")
    ), grid


def build_one(layout: Layout) -> ModelStages:
    return build_stages(layout.config, Grid(), MODES["mtp"], torch.device("cpu"))


@dataclass
class Held:
    """Elements on one rank: of the parameters, their gradients after a micro-batch, and the optimizer's state."""

    parameters: int
    gradients: int
    state: int
    calls: dict[tuple[str, str], int]


def held(rank: int, layout: Layout) -> Held:
    stages, grid = built(layout)
    stages.initialize(SEED, grid)
    config = layout.config
    optimizer = ZeroOptimizer(
        stages.parameters().items(), config.adam, config.hybrid_zero_optimizer, grid
    )
    with record_traffic(grid) as traffic:
        forward_backward(stages, layout, grid, 0)
    parameters = stages.parameters().values()
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    state = sum(
        tensor.numel()
        for name, tensor in optimizer.state_tensors().items()
        if ".exp_avg." in name
    )
    return Held(
        sum(local(p).numel() for p in parameters),
        sum(
            {
                g.untyped_storage().data_ptr(): g.untyped_storage().nbytes()
                for g in gradients
            }.values()
        )
        // FLOAT64,
        state,
        traffic.count(),
    )


@covers("parallel.zero1.fsdp")
def test_fsdp_leaves_each_rank_its_part_of_everything(pool: Pool) -> None:
    whole = sum(
        p.numel() for p in build_one(Layout(ranks=1, model=EVEN)).parameters().values()
    )
    last_norm = 32  # whole on every rank
    for found in pool.run(held, Layout(model=EVEN, parallel=CUT)):
        part = (whole - last_norm) // 4 + last_norm
        assert (found.parameters, found.gradients, found.state) == (part, part, part)
    for found in pool.run(held, Layout(model=EVEN, zero1=2, parallel=CUT)):
        assert found.parameters == (whole - last_norm) // 2 + last_norm


def test_fsdp_gathers_blocks_twice_and_ends_once_and_reduces_once_a_micro_batch(
    pool: Pool,
) -> None:
    blocks, ends = 4, 2  # the backward of embedding and head reads no weight
    for found in pool.run(held, Layout(model=EVEN, parallel=CUT)):
        gathers, reductions = (
            found.calls["all_gather", "dp"],
            found.calls["reduce_scatter", "dp"],
        )
        assert (gathers, reductions) == (2 * blocks + ends, blocks + ends)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever is made without values holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def padding_is_clean(rank: int, layout: Layout) -> tuple[bool, Counter[bool]]:
    """Whether memory was poisoned at all, and of the padded rows held here how many are zero."""
    with poisoned_memory():
        stages, grid = built(layout)
        poisoned = bool(torch.empty(4).isnan().all())
    rows: Counter[bool] = Counter()
    for name in ("embedding.weight", "head.weight"):
        parameter = stages.parameters()[name]
        weight, spec = local(parameter.detach()), parameter.spec  # type: ignore[attr-defined]
        first = sum(
            {"tp": grid.tp, "zero": grid.zero}[axis].rank
            * (spec.shape[0] // (grid.tp.size if axis == "tp" else 4))
            for axis, _ in spec.shards
        )
        rows.update(
            (row == 0).all().item()
            for i, row in enumerate(weight)
            if first + i >= VOCAB
        )
    return poisoned, rows


@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=2, mode="isp", weight=2), Layout(tensor=2, zero1=2, parallel=CUT)],
    ids=str,
)
def test_padded_rows_are_zero_before_anything_is_loaded(
    pool: Pool, layout: Layout
) -> None:
    answers = pool.run(padding_is_clean, layout)
    assert all(poisoned for poisoned, _ in answers)
    total = sum((rows for _, rows in answers), Counter[bool]())
    assert total[True] >= 2 and not total[False]


def evaluates_and_trains_on(rank: int, layout: Layout) -> list[float]:
    """Losses of evaluations around an update: gathered weights must never be older than the parameters."""
    stages, grid = built(layout) if layout.ranks > 1 else (build_one(layout), Grid())
    stages.initialize(SEED, grid)
    batch = packs(0, range(1))
    losses: list[float] = []
    for step in range(2):
        stages.schedule.evaluate(
            batch, lambda index, output: losses.append(float(output.nll.sum()))
        )
        forward_backward(stages, layout, grid, step)
        with torch.no_grad():
            for parameter in stages.parameters().values():
                local(parameter).mul_(1.5)
                parameter.grad = None
    stages.schedule.evaluate(
        batch, lambda index, output: losses.append(float(output.nll.sum()))
    )
    return losses


@pytest.mark.parametrize(
    "layout",
    [
        Layout(model=EVEN, parallel=CUT),
        Layout(
            model=EVEN,
            tensor=2,
            mode="isp",
            weight=4,
            parallel={"weight": {"overlap": True}},
        ),
        Layout(
            model=EVEN,
            mode="isp",
            weight=2,
            pipeline=2,
            parallel={"weight": {"overlap": True}},
        ),
    ],
    ids=str,
)
def test_evaluation_between_updates_sees_the_newest_weights(
    pool: Pool, layout: Layout
) -> None:
    plain = evaluates_and_trains_on(0, Layout(model=EVEN, ranks=1))
    cut = pool.run(evaluates_and_trains_on, layout)[-1]  # a rank of the last stage
    assert len(set(cut)) == 3
    # the gradients are not applied, so that every layout has the same weights
    assert cut == pytest.approx(plain, rel=1e-10)


def own_model(rank: int, layout: Layout) -> Trained:
    """The example's model, and one that can be cut into stages, as a user's config would register them."""
    register()
    model_initializer.register_module("STAGED", staged)
    return train(rank, layout)


def staged(
    config: ModelConfig, *, grid: Grid, device: str, layer_range: range | None
) -> Decoder:
    return Decoder(config, LLAMA, grid=grid, device=device, layer_range=layer_range)


OWN = {
    "model_type": "PARALLEL_BLOCKS",
    "extra": {"first_gain": 0.5},
    "num_kv_attention_heads": 8,
}
STAGED = {"model_type": "STAGED"}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(model=OWN, parallel=CUT, adam=True),
        Layout(model=OWN, mode="isp", weight=2, adam=True),
        Layout(model=STAGED, pipeline=2, ranks=2, adam=True),
    ],
    ids=["fsdp", "weights over 2", "pipeline"],
)
def test_a_model_of_one_s_own_is_cut_too(pool: Pool, layout: Layout) -> None:
    whole = join([own_model(0, Layout(ranks=1, model=layout.model, adam=True))])
    found = join(pool.run(own_model, layout, ranks=layout.ranks))
    assert found.losses == pytest.approx(whole.losses, rel=1e-10)
    for name, tensor in whole.final.items():
        assert_close(found.final[name], tensor, LAYOUT, name)


NORMS = [
    Layout(mode="isp", weight=2),
    Layout(tensor=2, mode="isp", weight=4, family="qwen3"),
    Layout(tensor=2, mode="isp", weight=2, family="olmo2"),
    Layout(tensor=2, mode="isp", weight=4, family="gemma3"),
    Layout(tensor=2, mode="isp", weight=2, pipeline=2, family="post_norm"),
]
FLOAT32 = {"dtype": "float32", "use_fp32_norm": True}


def train_with_wider_norms(rank: int, layout: Layout) -> Trained:
    """Train in float32 with norms in float64, as float32 is to 16 bits, but exact enough to compare."""
    with patch.object(norm, "promote", lambda dtype: torch.float64):
        return train(rank, layout)


@pytest.mark.parametrize("layout", NORMS, ids=str)
def test_norms_of_another_dtype_stay_whole_under_isp_and_train_alike(
    pool: Pool, layout: Layout
) -> None:
    layout = replace(layout, model=FLOAT32)
    alone = replace(
        layout, ranks=1, tensor=1, mode="mtp", weight=1, pipeline=1, zero1=-1
    )
    whole = join([train_with_wider_norms(0, alone)])
    ranks = pool.run(train_with_wider_norms, layout)
    for piece_of in ranks:
        for name, piece in piece_of.initial.items():
            if "norm" in name:
                assert piece.local.dtype == torch.float64
                assert piece.local.shape == piece.shape
    found = join(ranks)
    for name, tensor in whole.gradients.items():
        assert_close(found.gradients[name], tensor, FLOAT32_LAYOUT, name)
    losses = torch.tensor(found.losses), torch.tensor(whole.losses)
    assert_close(*losses, FLOAT32_LAYOUT, "losses")
