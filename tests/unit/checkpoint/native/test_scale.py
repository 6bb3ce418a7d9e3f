"""What each rank asks of a store and parses, counted: a thousand ranks multiply it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.format import COMMIT, PieceRecord, TensorRecord
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, ShardSpec
from evomesh.storage.local import LocalStorage
from tests.unit.checkpoint.native.ranks import ThreadExchange, grids, run_ranks

RANKS = 4
LAYERS = 12
ROWS = 8


def layers_of(grid: Grid) -> dict[str, LocalShard]:
    """Layers of a stage, each divided over the ranks of ``zero``."""
    local = {}
    for layer in range(grid.pp.rank, LAYERS, grid.pp.size):
        whole = torch.arange(ROWS * 3.0).view(ROWS, 3) + layer
        part = whole.chunk(grid.zero.size)[grid.zero.rank].clone()
        spec = ShardSpec((ROWS, 3), (("zero", 0),))
        local[f"layers.{layer}.w"] = LocalShard(part, spec)
    return local


def save(root: Path, **layout: int) -> None:
    def save_share(exchange: ThreadExchange) -> None:
        grid = grids(**layout)[exchange.rank]
        writer = CheckpointWriter(str(root), grid=grid, exchange=exchange)
        writer.save(5, layers_of(grid), {}, {})

    run_ranks(RANKS, save_share)


def load(root: Path, after_verifying: Callable[[], None], **layout: int) -> None:
    """Load on all ranks, and compare each tensor with what was saved."""

    def load_share(exchange: ThreadExchange) -> None:
        grid = grids(**layout)[exchange.rank]
        reader = CheckpointReader(grid, exchange)
        found = reader.newest(SaveFolder.open(str(root)))
        assert found is not None
        exchange.gather(None)  # all have verified
        after_verifying()
        wanted = layers_of(grid)
        expected = layers_of(grid)
        for shard in wanted.values():
            shard.tensor.zero_()
        reader.load(found, wanted)
        for name, shard in wanted.items():
            assert torch.equal(shard.tensor, expected[name].tensor)

    run_ranks(RANKS, load_share)


def test_records_are_read_once_and_sizes_are_asked_for_once_per_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, zero=RANKS)
    calls: Counter[tuple[str, str]] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(LocalStorage, name)

        def call(storage: LocalStorage, path: str, *rest: Any) -> Any:
            calls[name, path.rpartition("/")[2]] += 1
            return method(storage, path, *rest)

        return call

    for name in ("size", "read"):
        monkeypatch.setattr(LocalStorage, name, counted(name))
    load(tmp_path, lambda: None, zero=RANKS)
    sizes = {file: count for (name, file), count in calls.items() if name == "size"}
    data_files = [file for file in sizes if file.endswith(".safetensors")]
    assert len(data_files) == RANKS
    assert set(sizes.values()) == {1}
    (index,) = [file for file in sizes if file.endswith("-index.jsonl")]
    assert calls["read", index] == 1
    assert calls["read", COMMIT] == 1


def test_a_rank_makes_records_of_its_own_tensors_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, pp=RANKS)
    parsed: Counter[int] = Counter()
    pieces: Counter[int] = Counter()
    parse_line, parse_piece = TensorRecord.from_line, PieceRecord.from_json

    def parse_line_counted(*arguments: Any) -> TensorRecord:
        parsed[threading.get_ident()] += 1
        return parse_line(*arguments)

    def parse_piece_counted(*arguments: Any) -> PieceRecord:
        pieces[threading.get_ident()] += 1
        return parse_piece(*arguments)

    monkeypatch.setattr(TensorRecord, "from_line", parse_line_counted)
    monkeypatch.setattr(PieceRecord, "from_json", parse_piece_counted)
    while_verifying: list[dict[int, int]] = []

    def verified() -> None:
        while_verifying.append(dict(parsed))

    load(tmp_path, verified, pp=RANKS)
    own = LAYERS // RANKS
    # A share of the lines is checked, and those of the rank's own layers are loaded.
    assert set(while_verifying[0].values()) == {own}
    assert list(parsed.values()) == [2 * own] * RANKS
    # Pieces: the same, and those of the file whose bytes the rank verifies.
    assert list(pieces.values()) == [3 * own] * RANKS


def test_a_rank_gets_no_other_ranks_list_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scattered: list[list[Any]] = []
    broadcast: list[Any] = []
    scatter, send = ThreadExchange.scatter, ThreadExchange.broadcast

    def record_scatter(exchange: ThreadExchange, messages: list[Any] | None) -> Any:
        if messages is not None:
            scattered.append(messages)
        return scatter(exchange, messages)

    def record_broadcast(exchange: ThreadExchange, message: Any) -> Any:
        if exchange.rank == 0:
            broadcast.append(message)
        return send(exchange, message)

    monkeypatch.setattr(ThreadExchange, "scatter", record_scatter)
    monkeypatch.setattr(ThreadExchange, "broadcast", record_broadcast)
    save(tmp_path, zero=RANKS)
    (messages,) = scattered
    assert [len(message["owned"]) for message in messages] == [LAYERS] * RANKS
    others = [message for message in broadcast if message is not messages]
    assert others
    assert not [message for message in others if "layers.0.w" in str(message)]
