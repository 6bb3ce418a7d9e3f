"""Any layout to any layout on four real ranks: parameters, masters and moments of a model, bit for bit."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native.boxes import Box
from evomesh.checkpoint.native.format import DTYPES
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.plan import describe
from evomesh.checkpoint.native.reshard import reshard
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.config.schema import (
    AdamConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ZeroConfig,
)
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.exchange import GroupExchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.parallel.spec import LocalShard
from evomesh.train.stages import build_stages
from tests.support.covers import covers
from tests.support.pool import Pool, grid_of

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tensor": 1, "zero1": 4},
    {"tensor": 1, "zero1": 2},
    {"tensor": 2, "zero1": 1},
    {"tensor": 2, "zero1": 2, "mode": "fsp"},
    {"tensor": 4, "mode": "msp"},
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 4},
    {"mode": "isp", "tensor": 2, "weight": 2},
    {"tensor": 2, "zero1": 2, "fsdp": True},
)
MODEL = ModelConfig(
    model_type="INTERNLM2_PUBLIC",
    num_layers=4,
    hidden_size=32,
    vocab_size=51,  # odd: each tensor size pads it differently
    num_attention_heads=8,
    num_kv_attention_heads=4,
    mlp_ratio=2.0,
    multiple_of=16,
    no_bias=True,
    dtype="bfloat16",
)


TIED = MODEL.model_copy(update={"tie_word_embeddings": True})
# Muon's momenta beside AdamW's moments.
MUON_LAYOUTS: tuple[dict[str, Any], ...] = tuple(
    {**layout, "rule": "muon"}
    for layout in (
        {"tensor": 2, "zero1": 2},
        {"tensor": 2, "pipeline": 2},
        {"mode": "isp", "tensor": 2, "weight": 2},
        {"tensor": 2, "zero1": 2, "fsdp": True},
    )
)
NOT_OF_THE_GRID = ("fsdp", "rule")
TIED_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"pipeline": 4},
    {"tensor": 2, "pipeline": 2},
    {"mode": "isp", "tensor": 2, "weight": 2},
    {"tensor": 2, "zero1": 2, "fsdp": True},
)


@functools.cache
def truth(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor, a function of its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def grid_for(layout: dict[str, Any]) -> Grid:
    return grid_of(
        **{key: value for key, value in layout.items() if key not in NOT_OF_THE_GRID}
    )


def tensors_of(
    grid: Grid, layout: dict[str, Any], model: ModelConfig = MODEL
) -> dict[str, torch.Tensor | LocalShard]:
    parallel = {
        "pipeline": {"size": grid.pp.size},
        "zero1": {"fsdp": layout.get("fsdp", False)},
    }
    config = Config(model=model, parallel=ParallelConfig.model_validate(parallel))
    stages = build_stages(
        config, grid, MODES[layout.get("mode", "mtp")], torch.device("cpu")
    )
    for parameter in stages.parameters().values():
        parameter.data.zero_()
    rule = OptimizerConfig.model_validate({"type": layout.get("rule", "adamw")})
    optimizer = ZeroOptimizer(
        stages.parameters().items(), AdamConfig(), ZeroConfig(), grid, config=rule
    )
    return stages.parameters() | optimizer.state_shards()


def memory_of(tensor: torch.Tensor | LocalShard) -> torch.Tensor:
    return (tensor.tensor if isinstance(tensor, LocalShard) else tensor).detach()


@torch.no_grad()
def set_or_check(
    tensors: dict[str, torch.Tensor | LocalShard], grid: Grid, write: bool
) -> None:
    for name, tensor in tensors.items():
        (described,) = describe({name: tensor}, grid).values()
        whole = truth(name, described.shape, DTYPES[described.dtype])
        for part in described.parts:
            expected = whole[part.box.within(Box.whole(described.shape))]
            if write:
                part.tensor.copy_(expected)
            else:
                assert torch.equal(part.tensor, expected), name
                part.tensor.zero_()


def all_pairs(
    rank: int, root: str, model: ModelConfig, layouts: Sequence[dict[str, Any]]
) -> int:
    all_tensors, grids = [], []
    exchange = GroupExchange()
    for number, layout in enumerate(layouts):
        grid = grid_for(layout)
        writer = CheckpointWriter(f"{root}/{number}", grid=grid, exchange=exchange)
        tensors = tensors_of(grid, layout, model)
        set_or_check(tensors, grid, write=True)
        writer.save(1, tensors, {"from": number}, {}, final=True)
        for tensor in tensors.values():
            memory_of(tensor).zero_()
        writer.close()
        all_tensors.append(tensors)
        grids.append(grid)
    pairs = 0
    for source, target in itertools.product(range(len(layouts)), repeat=2):
        reader = CheckpointReader(grids[target], exchange)
        found = reader.resolve(f"{root}/{source}", verify="record")
        assert reader.load(found, all_tensors[target]) == {"from": source}
        set_or_check(all_tensors[target], grids[target], write=False)
        pairs += 1
    return pairs


@covers("model.tie_word_embeddings")
@pytest.mark.parametrize(
    ("model", "layouts", "pairs"),
    [(MODEL, LAYOUTS, 81), (TIED, TIED_LAYOUTS, 16), (MODEL, MUON_LAYOUTS, 16)],
    ids=["untied", "tied", "muon"],
)
def test_every_pair_of_layouts(
    pool: Pool,
    tmp_path: Path,
    model: ModelConfig,
    layouts: Sequence[dict[str, Any]],
    pairs: int,
) -> None:
    assert (
        pool.run(all_pairs, str(tmp_path), model, layouts, timeout=120) == [pairs] * 4
    )
    # And into one process, that is another world size.
    for number in range(len(layouts)):
        alone = {"rule": layouts[0].get("rule", "adamw")}
        tensors = tensors_of(Grid(), alone, model)
        found = CheckpointReader().resolve(str(tmp_path / str(number)))
        assert ("head.weight" in found.records()) == (not model.tie_word_embeddings)
        assert found.records().keys() == tensors.keys(), "each tensor is stored once"
        CheckpointReader().load(found, tensors)
        set_or_check(tensors, Grid(), write=False)


def load_resharded(rank: int, root: str, layout: dict[str, int]) -> int:
    grid = grid_for(layout)
    reader = CheckpointReader(grid, GroupExchange())
    tensors = tensors_of(grid, {})
    found = reader.resolve(root)
    reader.load(found, tensors)
    set_or_check(tensors, grid, write=False)
    return len(found.files)


def test_offline_reshard(pool: Pool, tmp_path: Path) -> None:
    tensors = tensors_of(Grid(), {})
    set_or_check(tensors, Grid(), write=True)
    writer = CheckpointWriter(str(tmp_path / "one"))
    writer.save(1, tensors, {}, {})
    layout = {"tensor": {"size": 2}, "pipeline": {"size": 2}}
    reshard(
        CheckpointReader().resolve(str(tmp_path / "one")),
        str(tmp_path / "four"),
        MODEL,
        ParallelConfig.model_validate(layout),
        4,
    )
    assert (
        pool.run(load_resharded, str(tmp_path / "four"), {"tensor": 2, "pipeline": 2})
        == [4] * 4
    )
    reshard(
        CheckpointReader().resolve(str(tmp_path / "four")),
        str(tmp_path / "back"),
        MODEL,
        ParallelConfig(),
        1,
    )
    for tensor in tensors.values():
        memory_of(tensor).zero_()
    CheckpointReader().load(CheckpointReader().resolve(str(tmp_path / "back")), tensors)
    set_or_check(tensors, Grid(), write=False)
