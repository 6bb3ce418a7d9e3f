"""Three training steps of a small model in any layout, and everything that must not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from evomesh.config.families import architecture_of
from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.parameter_groups import ParameterGroupConfig
from evomesh.config.schema import IGNORE, Config
from evomesh.data.batch import Batch
from evomesh.layers.block_softmax import LossTerms
from evomesh.layers.loss import LossOutput
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import ShardSpec, optimizer_axes, spec_of
from evomesh.train.stages import ModelStages, build_stages
from tests.support.pool import grid_of

T, STEPS, SEED, RATE = 32, 3, 7, 0.5
VOCAB = 67  # divides by no axis: the padded rows must change nothing

# Optimizers by the name of ``Layout.rule``, where that is not their type.
RULES: dict[str, dict[str, Any]] = {"ema": {"ema": {"decay": 0.5}}}

# Sizes that divide by 4 everywhere, with grouped key/value heads.
SIZES = {
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
LLAMA3 = {
    "type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "internlm": {"model_type": "INTERNLM", "num_kv_attention_heads": None},
    "internlm2": {
        "model_type": "INTERNLM2_PUBLIC",
        "norm_head": True,
        "embed_grad_scale": 0.1,
    },
    "internlm3": {
        "model_type": "INTERNLM3",
        "no_bias": True,
        "qkv_bias": True,
        "mlp_bias": True,
        "head_dim": 8,
        "use_dynamic_ntk_rope": True,
        "max_position_embeddings": 12,
    },
    "llama": {"model_type": "LLAMA2", "no_bias": True, "qk_interleaved": True},
    "qwen2": {
        "model_type": "QWEN2",
        "o_bias": False,
        "sliding_window": 5,
        "layer_types": ("full_attention",) * 2 + ("sliding_attention",) * 2,
    },
    "qwen3": {"model_type": "QWEN3", "no_bias": True, "qk_norm": True, "head_dim": 8},
    "mistral": {
        "model_type": "MISTRAL",
        "no_bias": True,
        "head_dim": 8,
        "sliding_window": 9,
    },
    "phi3": {
        "model_type": "PHI3",
        "no_bias": True,
        "sliding_window": 6,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": (1.0, 1.5),
            "long_factor": (1.0, 4.0),
            "original_max_position_embeddings": 12,
        },
    },
    "smollm3": {
        "model_type": "SMOLLM3",
        "no_bias": True,
        "nope_layers": (1, 3),
        "tie_word_embeddings": True,
    },
    "baichuan2": {
        "model_type": "BAICHUAN2",
        "no_bias": True,
        "num_kv_attention_heads": None,
        "norm_head": True,
    },
    "tied": {"model_type": "QWEN2", "o_bias": False, "tie_word_embeddings": True},
    "olmo2": {
        "model_type": "OLMO2",
        "no_bias": True,
        "qk_norm": True,
        "qk_norm_over": "projection",
        "norm_placement": "after",
    },
    "gemma": {
        "model_type": "GEMMA",
        "no_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 8,
        **architecture_of("GEMMA"),
    },
    "gemma2": {
        "model_type": "GEMMA2",
        "no_bias": True,
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "query_pre_attn_scalar": 20.0,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
        **architecture_of("GEMMA2"),
    },
    "gemma3": {
        "model_type": "GEMMA3",
        "no_bias": True,
        "qk_norm": True,
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "local_rope_base": 100.0,
        **architecture_of("GEMMA3"),
    },
    "llama3": {"model_type": "LLAMA2", "no_bias": True, "rope_scaling": LLAMA3},
    "post_norm": {
        "model_type": "INTERNLM2_PUBLIC",
        "apply_post_layer_norm": True,
        "norm_type": "layernorm",
    },
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes (what is left of ``ranks`` is data parallel), and whatever else a run may vary."""

    tensor: int = 1
    mode: str = "mtp"
    pipeline: int = 1
    chunks: int = 1
    schedule: str | None = None
    zero1: int = -1
    weight: int = 1
    ranks: int = 4
    family: str = "llama"
    layers: int = 4
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    parallel: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)
    smoothing: float = 0.0
    z_loss: float = 0.0
    packs: int = 4
    adam: bool = False  # ZeroOptimizer instead of plain SGD
    rule: str = "adamw"  # of ZeroOptimizer
    groups: tuple[ParameterGroupConfig, ...] = ()  # likewise

    def __str__(self) -> str:
        data = self.ranks // self.tensor // self.pipeline
        parts = [
            self.family,
            f"{self.mode}{self.tensor}",
            f"dp{data}",
            f"pp{self.pipeline}",
        ]
        parts += [f"wp{self.weight}"] if self.weight > 1 else []
        parts += [f"zero{self.zero1}"] if self.zero1 > 0 else []
        parts += (
            [f"{self.schedule or 'chunks'}{self.chunks}"] if self.chunks > 1 else []
        )
        parts += [f"{key}={value}" for key, value in self.model.items()]
        parts += [
            f"{key}={value}"
            for section in self.parallel.values()
            for key, value in section.items()
        ]
        parts += ["adam"] if self.adam else []
        parts += [self.rule] if self.rule != "adamw" else []
        parts += ["groups"] if self.groups else []
        parts += [f"packs{self.packs}"] if self.packs != 4 else []
        parts += ["smooth"] if self.smoothing else []
        parts += ["z"] if self.z_loss else []
        return "-".join(parts)

    @property
    def terms(self) -> LossTerms:
        return LossTerms(self.smoothing, self.z_loss)

    @property
    def config(self) -> Config:
        parallel: dict[str, dict[str, Any]] = {
            "tensor": {"size": self.tensor, "mode": self.mode},
            "pipeline": {"size": self.pipeline, "schedule": self.schedule},
            "weight": {"size": self.weight},
            "zero1": {"size": self.zero1},
        }
        for name, section in self.parallel.items():
            parallel[name] |= section
        model = {
            **SIZES,
            **family_of_depth(self.family, self.layers),
            **self.model,
            "num_chunks": self.chunks,
        }
        return Config.model_validate(
            {
                "model": model,
                "parallel": parallel,
                "data": {"seq_len": T, "micro_num": self.packs},
            }
        )


def family_of_depth(family: str, layers: int) -> dict[str, Any]:
    """Return a family's switches for a number of layers; two of them are the first and the last of four."""
    switches = {"num_layers": layers} | FAMILIES[family]
    if layers < 4 and "layer_types" in switches:
        first, *_, last = switches["layer_types"]
        switches["layer_types"] = (first, last)
    if layers < 4 and "nope_layers" in switches:
        switches["nope_layers"] = (layers - 1,)
    return switches


@dataclass
class Piece:
    """One rank's shard of a tensor, and its position in the global tensor: (start, stop) of each dim."""

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


def packs(step: int, indices: range) -> Batch:
    """Packs ``indices`` of global ``step``, with ragged documents: a fixed function of both (invariant 10)."""
    rows = [pack(step, index) for index in indices]
    ids, labels, positions, bounds = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )
    return Batch(ids, labels, positions, torch.zeros_like(ids), bounds, T)


def pack(step: int, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input ids, labels, positions [T] and document bounds [K] of one pack."""
    draw = torch.Generator().manual_seed(1000 * step + index)
    ids = torch.randint(0, VOCAB, (T,), generator=draw)
    cuts = sorted(
        {0, T, *torch.randint(1, T, (index % 3 + 1,), generator=draw).tolist()}
    )
    labels, positions = torch.full((T,), IGNORE), torch.zeros(T, dtype=torch.long)
    for start, stop in pairwise(cuts):
        labels[start : stop - 1] = ids[start + 1 : stop]
        positions[start:stop] = torch.arange(stop - start)
    return (
        ids,
        labels,
        positions,
        torch.tensor(cuts + [T] * (5 - len(cuts)), dtype=torch.int32),
    )


def stages_of(layout: Layout) -> tuple[ModelStages, Grid]:
    """Build this rank's stages in a layout, with their first weights."""
    grid = Grid()
    if layout.ranks > 1:
        sizes = {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "weight": layout.weight,
            "zero1": layout.zero1,
        }
        grid = grid_of(mode=layout.mode, **sizes)
    stages = build_stages(layout.config, grid, MODES[layout.mode], torch.device("cpu"))
    stages.initialize(SEED, grid)
    return stages, grid


def train(rank: int, layout: Layout) -> Trained:
    stages, grid = stages_of(layout)
    initial = pieces(stages, grid)
    if layout.adam:
        return adam(stages, layout, grid, initial)
    losses, gradients = [], {}
    for step in range(STEPS):
        losses.append(forward_backward(stages, layout, grid, step))
        synchronise(stages, grid)
        if step == 0:
            gradients = pieces(stages, grid, gradients=True)
        with torch.no_grad():
            for parameter in stages.parameters().values():
                assert parameter.grad is not None
                local(parameter).sub_(local(parameter.grad), alpha=RATE)
                parameter.grad = None
    return Trained(losses, initial, gradients, pieces(stages, grid))


def adam(
    stages: ModelStages, layout: Layout, grid: Grid, initial: dict[str, Piece]
) -> Trained:
    """Three steps of the real optimizer; a large epsilon, since Adam's division amplifies the order of sums."""
    config = layout.config
    changes = {"adam_eps": 1.0, "groups": layout.groups}
    settings = config.adam.model_copy(update=changes)
    zero = config.hybrid_zero_optimizer.model_copy(
        update={"clip_grad_norm": 0.3, "reduce_bucket_size": 4000}
    )
    optimizer = ZeroOptimizer(
        stages.parameters().items(),
        settings,
        zero,
        grid,
        stages.module,
        OptimizerConfig.model_validate(RULES.get(layout.rule, {"type": layout.rule})),
        config.model.width_multiplier,
    )
    losses = []
    for step in range(STEPS):
        optimizer.expect_micro_batches(layout.packs // grid.dp.size)
        losses.append(forward_backward(stages, layout, grid, step))
        result = optimizer.step(RATE, 0.95, 1.0)
        assert result.check == "ok" and result.grad_norm > 0.3
        optimizer.zero_grad()
        losses.append(result.grad_norm)
    optimizer.wait_for_parameters()
    trained = pieces(stages, grid)
    if optimizer.ema is None:
        held = optimizer.evaluated_weights()
    else:
        held = optimizer.averaged_weights()
    with held:
        # What is evaluated, by a forward too: FSDP2 gathers weights there.
        final = pieces(stages, grid)
        losses.append(evaluate(stages, layout, grid))
    for name, piece in pieces(stages, grid).items():
        assert torch.equal(piece.local, trained[name].local), name
    losses.append(forward_backward(stages, layout, grid, STEPS))
    return Trained(losses, initial, {}, final)


def evaluate(stages: ModelStages, layout: Layout, grid: Grid) -> float:
    own = packs(STEPS, range(grid.dp.rank, layout.packs, grid.dp.size))
    if layout.config.model.has_dropout:
        own = own.numbered(SEED, STEPS, grid.dp.rank, grid.dp.size)
    total = torch.zeros((), dtype=torch.float64)

    def add(index: int, output: LossOutput) -> None:
        total.add_(output.scaled_sum.detach())

    stages.schedule.evaluate(own, add)
    return float(all_reduce_no_grad(total, grid.dp, grid.pp))


def forward_backward(
    stages: ModelStages, layout: Layout, grid: Grid, step: int
) -> float:
    everything = packs(step, range(layout.packs))
    scale = 1.0 / int((everything.labels != IGNORE).sum())
    own = packs(step, range(grid.dp.rank, layout.packs, grid.dp.size))
    if layout.config.model.has_dropout:
        own = own.numbered(SEED, step, grid.dp.rank, grid.dp.size)
    total = torch.zeros((), dtype=torch.float64)
    seen = []

    def add(index: int, output: LossOutput) -> None:
        total.add_(output.scaled_sum.detach())
        seen.append(index)

    stages.schedule.train(own, [scale] * len(own.tokens), layout.terms, add)
    assert seen in (
        ([], list(range(len(own.tokens))))
        if grid.pp.size > 1
        else (list(range(len(own.tokens))),)
    )
    return float(all_reduce_no_grad(total, grid.dp, grid.pp))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def synchronise(stages: ModelStages, grid: Grid) -> None:
    """Sum every gradient over the axes on which it is partial according to its spec, and over the data axes."""
    for parameter in stages.parameters().values():
        spec = spec_of(parameter)
        zero, replica, _ = optimizer_axes(spec, grid)
        if (zero.name, 0) in spec.shards:  # fsdp has summed over it
            zero = Axis(zero.name)
        partial = [getattr(grid, name) for name in sorted(spec.partial)]
        assert parameter.grad is not None
        local(parameter.grad).copy_(
            all_reduce_no_grad(local(parameter.grad), *partial, zero, replica)
        )


def pieces(
    stages: ModelStages, grid: Grid, gradients: bool = False
) -> dict[str, Piece]:
    found = {}
    for name, parameter in stages.parameters().items():
        spec: ShardSpec = spec_of(parameter)
        ranges = spec.local_ranges(grid.axes)
        tensor = parameter.grad if gradients else parameter.detach()
        assert tensor is not None
        found[name] = Piece(
            local(tensor).clone(), tuple((r.start, r.stop) for r in ranges), spec.shape
        )
    return found


def join(ranks: list[Trained]) -> Trained:
    """All ranks' parts put together; parts of the same place must be bit-equal (replicas, invariant 6)."""
    assert len({tuple(one.losses) for one in ranks}) == 1, (
        "every rank reports the same loss"
    )
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
            tensor = whole.setdefault(
                name, torch.full(piece.shape, torch.nan, dtype=piece.local.dtype)
            )
            place = tensor[tuple(slice(*where) for where in piece.where)]
            assert place.isnan().all() or torch.equal(place, piece.local), (
                f"replicas of {name} differ"
            )
            place.copy_(piece.local)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
        if name in ("embedding.weight", "head.weight"):
            whole[name] = tensor[:VOCAB]
    return whole
