"""Three training steps of a small model in any layout, and everything that must not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.config.schema import ModelConfig
from evomesh.data.batch import IGNORE
from evomesh.layers.attention import Documents
from evomesh.layers.init import owned_range
from evomesh.models.registry import build_model, initialize_weights
from evomesh.parallel.collectives import sum_over
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import ShardSpec, spec_of, state_axes
from tests.support.pool import grid_of

T, PACKS, STEPS, SEED, RATE = 32, 4, 3, 7, 0.5
VOCAB = 67  # divides by no axis: the padded rows must change nothing

# Sizes that divide by 4 everywhere, with grouped key/value heads.
SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_kv_attention_heads": 4,
    "mlp_ratio": 1.5,
    "multiple_of": 8,
    "vocab_size": VOCAB,
    "dtype": "float64",
    "embedding_init_std": 0.5,
    "attn_wqkv_init_std": 0.2,
    "attn_other_init_std": 0.2,
    "ffn_uplayer_init_std": 0.2,
    "ffn_other_init_std": 0.2,
    "out_head_init_std": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "internlm": {"model_type": "INTERNLM", "num_kv_attention_heads": None},
    "internlm2": {"model_type": "INTERNLM2_PUBLIC", "norm_head": True, "embed_grad_scale": 0.1},
    "llama": {"model_type": "LLAMA2", "no_bias": True, "qk_interleaved": True},
    "post_norm": {"model_type": "INTERNLM2_PUBLIC", "apply_post_layer_norm": True, "norm_type": "layernorm"},
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes (what is left of 4 ranks is data parallel), and whatever else a run may vary."""

    tensor: int = 1
    mode: str = "mtp"
    zero1: int = -1
    weight: int = 1
    ranks: int = 4
    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    smoothing: float = 0.0

    def __str__(self) -> str:
        sizes = f"{self.mode}{self.tensor}" if self.tensor > 1 or self.mode != "mtp" else f"dp{self.ranks}"
        sizes += f"-wp{self.weight}" if self.weight > 1 else ""
        extra = "".join(f"-{key}={value}" for key, value in self.model.items())
        return f"{self.family}-{sizes}{extra}" + ("-smooth" if self.smoothing else "")

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.model_validate({**SIZES, **FAMILIES[self.family], **self.model})


@dataclass
class Piece:
    """One rank's part of a tensor, and where it lies in the whole: (start, stop) of each dim."""

    local: Tensor
    where: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]


@dataclass
class Trained:
    """What three steps left on one rank (or, joined, on all)."""

    losses: list[float]
    initial: dict[str, Any]
    gradients: dict[str, Any]  # of the first step
    final: dict[str, Any]


def pack(step: int, index: int) -> tuple[Tensor, Tensor, Documents]:
    """Global pack ``index`` of ``step``: ids, labels, and ragged documents; a fixed function, as invariant 10 wants."""
    draw = torch.Generator().manual_seed(1000 * step + index)
    ids = torch.randint(0, VOCAB, (T,), generator=draw)
    cuts = sorted({0, T, *torch.randint(1, T, (index % 3 + 1,), generator=draw).tolist()})
    labels, positions = torch.full((T,), IGNORE), torch.zeros(T, dtype=torch.long)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        labels[start : stop - 1] = ids[start + 1 : stop]
        positions[start:stop] = torch.arange(stop - start)
    bounds = torch.tensor(cuts + [T] * (5 - len(cuts)), dtype=torch.int32)
    return ids, labels, Documents(positions, bounds, T)


def train(rank: int, layout: Layout) -> Trained:
    grid = (
        Grid()
        if layout.ranks == 1
        else grid_of(tensor=layout.tensor, mode=layout.mode, zero1=layout.zero1, weight=layout.weight)
    )
    model = build_model(layout.config, grid=grid, mode=MODES[layout.mode])
    initialize_weights(model, SEED, grid)
    initial = pieces(model, grid)
    losses, gradients = [], {}
    for step in range(STEPS):
        losses.append(forward_backward(model, layout, grid, step))
        synchronise(model, grid)
        if step == 0:
            gradients = pieces(model, grid, gradients=True)
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
                parameter.grad = None
    return Trained(losses, initial, gradients, pieces(model, grid))


def forward_backward(model: Any, layout: Layout, grid: Grid, step: int) -> float:
    packs = [pack(step, index) for index in range(PACKS)]
    scale = 1.0 / sum(int((labels != IGNORE).sum()) for _, labels, _ in packs)
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels, docs in packs[grid.dp.rank :: grid.dp.size]:
        output = model.loss(model(ids, docs), labels, scale, layout.smoothing)
        output.scaled_sum.backward()
        total += output.scaled_sum.detach()
    return float(sum_over(total, grid.dp))


def synchronise(model: nn.Module, grid: Grid) -> None:
    """Sums every gradient over the axes on which its spec says it is partial, and over the data axes."""
    for parameter in model.parameters():
        spec = spec_of(parameter)
        zero, replica = state_axes(spec, grid)
        partial = [getattr(grid, name) for name in sorted(spec.partial)]
        assert parameter.grad is not None
        parameter.grad = sum_over(parameter.grad, *partial, zero, replica)


def pieces(model: nn.Module, grid: Grid, gradients: bool = False) -> dict[str, Piece]:
    axes: dict[str, Axis] = {"tp": grid.tp, "wp": grid.wp}
    found = {}
    for name, parameter in model.named_parameters():
        spec: ShardSpec = spec_of(parameter)
        ranges = [owned_range(spec, dim, axes) for dim in range(len(spec.shape))]
        local = parameter.grad if gradients else parameter.detach()
        assert local is not None
        found[name] = Piece(local.clone(), tuple((r.start, r.stop) for r in ranges), spec.shape)
    return found


def join(ranks: list[Trained]) -> Trained:
    """All ranks' parts put together; parts of the same place must be bit-equal (replicas, invariant 6)."""
    assert len({tuple(one.losses) for one in ranks}) == 1, "every rank reports the same loss"
    return Trained(
        ranks[0].losses,
        _join([one.initial for one in ranks]),
        _join([one.gradients for one in ranks]),
        _join([one.final for one in ranks]),
    )


def _join(parts: list[dict[str, Piece]]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for part in parts:
        for name, piece in part.items():
            tensor = whole.setdefault(name, torch.full(piece.shape, torch.nan, dtype=piece.local.dtype))
            place = tensor[tuple(slice(*where) for where in piece.where)]
            assert place.isnan().all() or torch.equal(place, piece.local), f"replicas of {name} differ"
            place.copy_(piece.local)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
        if name in ("embedding.weight", "head.weight"):
            whole[name] = tensor[:VOCAB]
    return whole
