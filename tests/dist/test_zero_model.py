"""Three AdamW steps of a real decoder in every way of sharing it out, against one process, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, AdamConfig, ModelConfig, ZeroConfig
from evomesh.layers.attention import SequenceBounds
from evomesh.models.registry import build_model, initialize_weights
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import spec_of
from tests.support.pool import Pool, grid_of
from tests.support.tolerances import FIRST_LOSS, LAYOUT, assert_close

T, PACKS, STEPS, VOCAB = 32, 4, 3, 67
MODEL = ModelConfig(
    model_type="INTERNLM2_PUBLIC",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=8,
    num_kv_attention_heads=4,
    mlp_ratio=1.5,
    multiple_of=8,
    vocab_size=VOCAB,
    dtype="float64",
    norm_type="layernorm",
)
# Large: Adam's division amplifies the order of sums.
ADAM = AdamConfig(adam_eps=1e-2, weight_decay=0.1)
LAYOUTS: list[dict[str, Any]] = [
    *({"zero1": zero} for zero in (1, 2, 4)),
    *(
        {"tensor": 2, "mode": mode, "zero1": zero}
        for mode in ("mtp", "msp", "fsp")
        for zero in (1, 2)
    ),
    *({"tensor": 4, "mode": mode} for mode in ("mtp", "msp", "fsp")),
    *({"tensor": 2, "mode": "isp", "zero1": zero} for zero in (1, 2, 4)),
]


def pack(step: int, index: int) -> tuple[Tensor, Tensor, SequenceBounds]:
    ids = torch.randint(
        0, VOCAB, (T,), generator=torch.Generator().manual_seed(100 * step + index)
    )
    labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
    return (
        ids,
        labels,
        SequenceBounds(torch.arange(T), torch.tensor([0, T], dtype=torch.int32), T),
    )


def train(
    rank: int, layout: dict[str, Any] | None, zero: dict[str, Any]
) -> tuple[list[float], list[float], Any]:
    """Return losses, gradient norms, and (position, tensor) of each parameter."""
    grid = Grid() if layout is None else grid_of(**layout)
    model = build_model(MODEL, grid=grid, mode=MODES[(layout or {}).get("mode", "mtp")])
    initialize_weights(model, 7, grid)
    config = ZeroConfig.model_validate({"clip_grad_norm": 0.5, **zero})
    optimizer = ZeroOptimizer(model.named_parameters(), ADAM, config, grid, model)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        own = range(grid.dp.rank, PACKS, grid.dp.size)
        optimizer.expect_micro_batches(len(own))
        for ids, labels, docs in (pack(step, index) for index in own):
            output = model.loss(model(ids, docs), labels, 1.0 / (PACKS * (T - 1)))
            output.scaled_sum.backward()
            total += output.scaled_sum.detach()
        losses.append(float(all_reduce_no_grad(total, grid.dp)))
        norms.append(optimizer.step(1e-2, 0.95, 1.0).grad_norm)
        optimizer.zero_grad()
    optimizer.wait_for_parameters()
    found = {}
    for name, parameter in model.named_parameters():
        spec = spec_of(parameter)
        ranges = spec.local_ranges({"tp": grid.tp, "wp": grid.wp})
        found[name] = (
            tuple((r.start, r.stop) for r in ranges),
            parameter.detach().clone(),
        )
    return losses, norms, found


@functools.cache
def one_process() -> tuple[list[float], list[float], Any]:
    return train(0, None, {})


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_trains_like_one_process(
    pool: Pool, layout: dict[str, Any], overlap: bool
) -> None:
    losses, norms, whole = one_process()
    options = {
        "reduce_bucket_size": 3000,
        "overlap_sync_grad": overlap,
        "overlap_sync_param": overlap,
    }
    answers = pool.run(train, layout, options)
    for found_losses, found_norms, found in answers:
        assert found_losses == pytest.approx(
            losses, rel=FIRST_LOSS if "tensor" not in layout else LAYOUT
        )
        assert found_norms == pytest.approx(norms, rel=LAYOUT)
        for name, (where, tensor) in found.items():
            expected = whole[name][1]
            # Rows behind are the layout's own padding.
            rows = slice(where[0][0], min(where[0][1], len(expected)))
            part = expected[(rows, *(slice(*place) for place in where[1:]))]
            assert_close(tensor[: len(part)], part, LAYOUT, name)
            assert not tensor[len(part) :].any()
    replicas: dict[Any, Tensor] = {}
    for _, _, found in answers:
        for name, (where, tensor) in found.items():
            assert torch.equal(replicas.setdefault((name, where), tensor), tensor), name


def padded_rows(rank: int) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    try:
        model = build_model(MODEL, grid=grid_of(tensor=4), mode=MODES["mtp"])
    finally:
        torch.use_deterministic_algorithms(False)
    return [
        p.detach()
        for name, p in model.named_parameters()
        if name in ("embedding.weight", "head.weight")
    ]


def test_padded_rows_are_zero_before_weights_are_loaded(pool: Pool) -> None:
    """A checkpoint does not hold them, and 0 * NaN would spoil the gradient of the hidden states."""
    for rank, tensors in enumerate(pool.run(padded_rows)):
        for tensor in tensors:
            real = min(max(VOCAB - rank * len(tensor), 0), len(tensor))
            assert tensor[:real].isnan().all()
            assert not tensor[real:].any()
