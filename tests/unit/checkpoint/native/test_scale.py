"""What each rank asks of a store and parses, counted: a thousand ranks multiply it."""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native import replicas, write
from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.format import (
    COMMIT,
    CheckpointError,
    PieceRecord,
    TensorRecord,
)
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, ShardSpec
from evomesh.storage.local import LocalReader, LocalStorage
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


MATRIX = (24, 16)  # rows of 64 bytes
BIAS = (7,)  # of bfloat16: what follows begins at no multiple of its size
PIECE = 128  # bytes, so that a matrix is 12 pieces

# By layout: the ranks that want the same pieces of the matrix, which is sharded over
# ``tp``, by rows or by columns, and of the masters, over ``zero`` too.
REPLICAS: list[dict[str, int]] = [
    {"dp": 4},
    {"dp": 3},
    {"tp": 2, "dp": 2},
    {"zero": 2, "replica": 2},
    {"tp": 4},
    {"pp": 2, "dp": 2},
]


def replicated(grid: Grid, seed: int = 0) -> dict[str, LocalShard]:
    """Tensors of a stage: whole ones and sharded ones, of several dtypes."""
    local = {}
    for layer in range(grid.pp.rank, 4, grid.pp.size):
        generator = torch.Generator().manual_seed(seed + layer)
        matrix = torch.randn(MATRIX, generator=generator)
        bias = torch.randn(BIAS, generator=generator).bfloat16()
        rows = ShardSpec(MATRIX, (("tp", 0),))
        columns = ShardSpec(MATRIX, (("tp", 1),))
        masters = ShardSpec(MATRIX, (("zero", 0),))
        whole = ShardSpec(BIAS, ())
        for name, spec, tensor in (
            ("rows", rows, matrix),
            ("columns", columns, matrix + 1),
            ("masters", masters, matrix + 2),
            ("bias", whole, bias),
        ):
            ranges = spec.local_ranges(grid.axes)
            held = tuple(slice(one.start, one.stop) for one in ranges)
            part = tensor[held]
            local[f"layers.{layer}.{name}"] = LocalShard(part.clone(), spec)
    return local


class CountedReads:
    """The bytes of data files that each rank reads, by file and first byte."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[tuple[str, int]] = []
        self.bytes_of_rank: Counter[str] = Counter()
        self._read = LocalReader.read_into
        monkeypatch.setattr(LocalReader, "read_into", self._counted())

    def _counted(self) -> Callable[[LocalReader, int, memoryview], None]:
        def read_into(reader: LocalReader, start: int, buffer: memoryview) -> None:
            self.places.append((reader._path, start))
            self.bytes_of_rank[threading.current_thread().name] += len(buffer)
            self._read(reader, start, buffer)

        return read_into

    def clear(self) -> None:
        self.places.clear()
        self.bytes_of_rank.clear()


def save_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Save as one process in small pieces, and return the number of pieces."""
    monkeypatch.setattr(write.fmt, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(replicas, "PIECE_BYTES", PIECE)
    CheckpointWriter(str(root)).save(5, replicated(Grid()), {}, {})
    found = CheckpointReader().newest(SaveFolder.open(str(root)))
    assert found is not None
    return sum(len(record.pieces) for record in found.records().values())


def load_replicas(
    exchange: ThreadExchange, root: Path, before: Callable[[], None], **layout: int
) -> None:
    """Load as one rank, and compare each tensor with what was saved."""
    grid = grids(**layout)[exchange.rank]
    reader = CheckpointReader(grid, exchange)
    found = reader.newest(SaveFolder.open(str(root)))
    assert found is not None
    exchange.gather(None)  # all have verified
    if exchange.rank == 0:
        before()
    exchange.gather(None)
    threading.current_thread().name = f"rank {exchange.rank}"
    wanted, expected = replicated(grid, seed=100), replicated(grid)
    reader.load(found, wanted)
    for name, shard in wanted.items():
        assert torch.equal(shard.tensor, expected[name].tensor), name


@pytest.mark.parametrize("layout", REPLICAS, ids=str)
def test_ranks_that_want_the_same_pieces_read_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, int]
) -> None:
    pieces = save_whole(tmp_path, monkeypatch)
    reads = CountedReads(monkeypatch)
    size = math.prod(layout.values())
    run_ranks(
        size,
        lambda exchange: load_replicas(exchange, tmp_path, reads.clear, **layout),
    )
    assert len(reads.places) == len(set(reads.places)) == pieces
    if set(layout) == {"dp"}:
        # Each its share, to within a chunk.
        shares = reads.bytes_of_rank.values()
        assert len(shares) == size
        assert max(shares) - min(shares) <= 2 * PIECE


def test_a_ring_passes_each_chunk_to_each_rank_once_in_two_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_whole(tmp_path, monkeypatch)
    sent: Counter[int] = Counter()
    peers: dict[int, set[int]] = defaultdict(set)
    memory: dict[int, set[int]] = defaultdict(set)
    pass_on = ThreadExchange.pass_on

    def pass_on_counted(
        exchange: ThreadExchange,
        data: torch.Tensor,
        to: int,
        received: torch.Tensor,
        source: int,
        ring_name: str,
    ) -> None:
        assert max(data.numel(), received.numel()) <= PIECE
        sent[exchange.rank] += data.numel()
        peers[exchange.rank] |= {to, source}
        memory[exchange.rank] |= {
            tensor.untyped_storage().data_ptr() for tensor in (data, received)
        }
        pass_on(exchange, data, to, received, source, ring_name)

    monkeypatch.setattr(ThreadExchange, "pass_on", pass_on_counted)
    run_ranks(
        RANKS,
        lambda exchange: load_replicas(exchange, tmp_path, lambda: None, dp=RANKS),
    )
    stored = 0
    for shard in replicated(Grid()).values():
        stored += shard.tensor.nbytes
    # What a rank sends on: all chunks but those that the next rank has read itself.
    assert sum(sent.values()) >= (RANKS - 1) * stored
    assert max(sent.values()) <= stored + 64 * 8
    assert peers == {0: {3, 1}, 1: {0, 2}, 2: {1, 3}, 3: {2, 0}}
    assert {len(addresses) for addresses in memory.values()} == {2}


def test_a_damaged_piece_ends_all_ranks_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_whole(tmp_path, monkeypatch)

    def damage() -> None:
        (file,) = tmp_path.rglob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    def load_damaged(exchange: ThreadExchange) -> str:
        with pytest.raises(CheckpointError, match="does not match its hash") as error:
            load_replicas(exchange, tmp_path, damage, dp=RANKS)
        return error.value.found

    messages = run_ranks(RANKS, load_damaged)
    assert len(set(messages)) == 1
    assert "layers." in messages[0]
