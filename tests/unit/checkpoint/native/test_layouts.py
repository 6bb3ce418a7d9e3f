"""Any layout to any layout: ranks simulated by threads, tensors cut by an independent slicing."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.errors import UserError
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, ShardSpec
from tests.unit.checkpoint.native.ranks import ThreadExchange, grids, run_ranks

LAYOUTS = [
    {},
    {"tp": 2},
    {"tp": 4},
    {"zero": 2},
    {"zero": 3},
    {"tp": 2, "zero": 2},
    {"tp": 2, "pp": 2},
    {"replica": 2},
]
GLOBAL = {
    "embedding.weight": torch.randn(12, 8).to(torch.bfloat16),
    "layers.0.w": torch.randn(8, 12),
    "layers.1.w": torch.randn(8, 12),
    "norm.weight": torch.randn(7),
}
CUTS = {  # parameter -> (axis, dim), outer to inner
    "embedding.weight": (("tp", 0), ("zero", 0)),
    "layers.0.w": (("tp", 1), ("zero", 0)),
    "layers.1.w": (("tp", 0), ("zero", 0)),
    "norm.weight": (("zero", 0),),
}
STAGE = {"embedding.weight": 0, "layers.0.w": 0, "layers.1.w": -1, "norm.weight": -1}


def local(grid: Grid, fill: bool) -> dict[str, LocalShard]:
    out = {}
    for name, whole in GLOBAL.items():
        if STAGE[name] % grid.pp.size != grid.pp.rank:
            continue
        part = whole
        for axis_name, dim in CUTS[name]:
            axis = getattr(grid, axis_name)
            chunks = part.chunk(axis.size, dim)  # torch's own rule is the oracle
            part = (
                chunks[axis.rank] if axis.rank < len(chunks) else part.narrow(dim, 0, 0)
            )
        part = part.clone() if fill else torch.zeros_like(part)
        out[name] = LocalShard(part, ShardSpec(tuple(whole.shape), CUTS[name]))
    return out


@pytest.mark.parametrize(
    ("source", "target"), itertools.product(LAYOUTS, LAYOUTS), ids=str
)
def test_loading_in_another_layout_is_bit_identical(
    tmp_path: Path, source: dict[str, int], target: dict[str, int]
) -> None:
    def save(exchange: ThreadExchange) -> None:
        grid = grids(**source)[exchange.rank]
        writer = CheckpointWriter(str(tmp_path), grid=grid, exchange=exchange)
        writer.save(5, local(grid, fill=True), {"a": 1}, {})

    def load(exchange: ThreadExchange) -> int:
        grid = grids(**target)[exchange.rank]
        reader = CheckpointReader(grid, exchange)
        found = reader.newest(SaveFolder.open(str(tmp_path)))
        assert found is not None
        wanted, expected = local(grid, fill=False), local(grid, fill=True)
        assert reader.load(found, wanted) == {"a": 1}
        assert all(
            torch.equal(wanted[name].tensor, expected[name].tensor) for name in expected
        )
        return found.record.tensor_bytes

    run_ranks(len(grids(**source)), save)
    stored = run_ranks(len(grids(**target)), load)
    # Every element once.
    assert stored[0] == sum(t.numel() * t.element_size() for t in GLOBAL.values())


def test_padding_rows_are_not_stored(tmp_path: Path) -> None:
    whole = torch.randn(10, 3)

    def padded(grid: Grid, value: float) -> LocalShard:
        full = torch.full((16, 3), value)
        if value:
            full[:10] = whole
        part = full.chunk(grid.tp.size)[grid.tp.rank].clone()
        return LocalShard(part, ShardSpec((16, 3), (("tp", 0),), padding=6))

    def save(exchange: ThreadExchange) -> None:
        grid = grids(tp=4)[exchange.rank]
        CheckpointWriter(str(tmp_path), grid=grid, exchange=exchange).save(
            1, {"v": padded(grid, 9.0)}, {}, {}
        )

    run_ranks(4, save)
    target = torch.zeros(10, 3)
    found = CheckpointReader().newest(SaveFolder.open(str(tmp_path)))
    assert found is not None
    CheckpointReader().load(found, {"v": target})
    assert torch.equal(target, whole)


def test_a_bad_layout_is_refused_on_every_rank(tmp_path: Path) -> None:
    def save(exchange: ThreadExchange) -> str:
        part = torch.zeros(3, 2) if exchange.rank else torch.zeros(2, 2)
        writer = CheckpointWriter(str(tmp_path), exchange=exchange)
        with pytest.raises(UserError) as error:
            writer.save(1, {"w": part}, {}, {})
        return error.value.found

    assert run_ranks(2, save) == ["w: rank 1 has F32[3, 2], rank 0 has F32[2, 2]"] * 2


def test_a_failed_rank_is_named_everywhere_and_nothing_is_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def save(exchange: ThreadExchange) -> None:
        writer = CheckpointWriter(
            str(tmp_path), exchange=exchange, grid=grids(tp=2)[exchange.rank]
        )
        part = LocalShard(torch.zeros(2, 2), ShardSpec((4, 2), (("tp", 0),)))
        if exchange.rank == 1:

            def full(path: str) -> None:
                raise OSError(28, "No space left on device", path)

            writer.storage.create = full  # type: ignore[method-assign, assignment]
        assert writer.save(1, {"w": part}, {}, {}) is None

    run_ranks(2, save)
    (text,) = caplog.messages  # rank 0 speaks for all
    assert "rank 1" in text and "No space left on device (ENOSPC)" in text
    assert not (tmp_path / "step-00000001" / "commit.json").exists()
