"""A start from a Hugging Face folder on several ranks: what each of them reads of its files."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.checkpoint import lazy_replicas
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.load import ForeignTensor, load_huggingface
from evomesh.checkpoint.loaders import fill_on_all_ranks
from evomesh.checkpoint.native.boxes import Box
from evomesh.checkpoint.native.plan import describe
from evomesh.config.schema import ModelConfig
from evomesh.errors import UserError
from evomesh.models.registry import build_model
from evomesh.parallel.grid import Grid
from evomesh.storage.local import LocalReader
from tests.unit.checkpoint.huggingface.hf_models import (
    export,
    model_config,
    save_model,
)
from tests.unit.checkpoint.native.ranks import ThreadExchange, grids, run_ranks

CHUNK = 4096  # bytes, so that the model is a few dozen chunks
OPTIONS = ExportOptions(tokenizer="none", compare=False, max_shard_bytes=30000)


@dataclass
class ExportedModel:
    """A model with its folder.

    Attributes:
        headers: by file, how many bytes come before its tensors.
        data_bytes: of all tensors.
    """

    folder: Path
    config: ModelConfig
    weights: dict[str, Tensor]
    headers: dict[str, int]
    data_bytes: int


@pytest.fixture(params=["internlm2", "llama"])
def exported(tmp_path: Path, request: pytest.FixtureRequest) -> ExportedModel:
    config = model_config("INTERNLM2_PUBLIC", vocab_size=64, qk_interleaved=False)
    model, found = save_model(tmp_path / "c", config)
    options = replace(OPTIONS, arch=request.param)
    folder = export(found, tmp_path / "hf", options, lambda line: None)
    headers = {}
    data_bytes = 0
    for file in Path(folder).glob("*.safetensors"):
        content = file.read_bytes()
        headers[str(file)] = 8 + int.from_bytes(content[:8], "little")
        data_bytes += len(content) - headers[str(file)]
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return ExportedModel(Path(folder), config, weights, headers, data_bytes)


@dataclass
class TensorReads:
    """Bytes of tensors that each rank read, and the places in the files."""

    exported: ExportedModel
    by_rank: Counter[str] = field(default_factory=Counter)
    places: Counter[tuple[str, int]] = field(default_factory=Counter)

    def count(self, reader: LocalReader, start: int, size: int) -> None:
        if start < self.exported.headers.get(reader._path, math.inf):
            return
        self.by_rank[threading.current_thread().name] += size
        self.places.update((reader._path, start + byte) for byte in range(size))


@pytest.fixture
def reads(
    exported: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TensorReads]:
    counted = TensorReads(exported)
    read_into = LocalReader.read_into

    def count_and_read(reader: LocalReader, start: int, buffer: memoryview) -> None:
        counted.count(reader, start, len(buffer))
        read_into(reader, start, buffer)

    monkeypatch.setattr(LocalReader, "read_into", count_and_read)
    monkeypatch.setattr(lazy_replicas, "CHUNK_BYTES", CHUNK)
    yield counted


def model_of(exported: ExportedModel, grid: Grid) -> dict[str, Tensor]:
    """Return the parameters that a rank holds, with other values than those of the folder."""
    config = exported.config
    per_stage = config.num_layers // grid.pp.size
    first = grid.pp.rank * per_stage
    layers = range(first, first + per_stage)
    model = build_model(config, grid=grid, layer_range=layers)
    return dict(model.named_parameters())


def load(
    exported: ExportedModel, exchange: ThreadExchange, **layout: int
) -> dict[str, Tensor]:
    """Fill the model of one rank from the folder, and compare it with what was exported."""
    threading.current_thread().name = f"rank {exchange.rank}"
    grid = grids(**layout)[exchange.rank]
    parameters = model_of(exported, grid)
    local = describe(parameters, grid)
    folder = str(exported.folder)
    fill_on_all_ranks(
        local,
        lambda: load_huggingface(folder, exported.config.model_dump()),
        folder,
        set(exported.weights),
        exchange,
    )
    for name, tensor in local.items():
        whole = Box.whole(tensor.shape)
        for part in tensor.parts:
            expected = exported.weights[name][part.box.within(whole)]
            assert torch.equal(part.tensor, expected), name
    return parameters


@pytest.mark.parametrize(
    "layout", [{"dp": 4}, {"dp": 3}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}], ids=str
)
def test_replicas_read_each_byte_once(
    exported: ExportedModel, reads: TensorReads, layout: dict[str, int]
) -> None:
    size = math.prod(layout.values())
    run_ranks(size, lambda exchange: load(exported, exchange, **layout))
    assert sum(reads.by_rank.values()) == exported.data_bytes
    assert set(reads.places.values()) == {1}
    if set(layout) == {"dp"}:
        # Each its share, to within a chunk.
        assert max(reads.by_rank.values()) <= exported.data_bytes / size + 2 * CHUNK


def test_without_replicas_a_rank_reads_what_it_holds(
    exported: ExportedModel, reads: TensorReads
) -> None:
    (parameters, _) = run_ranks(2, lambda exchange: load(exported, exchange, tp=2))
    vectors = sum(value.nbytes for value in parameters.values() if value.dim() == 1)
    held = sum(value.nbytes for value in parameters.values())
    # Norms are whole on both, so that either reads some of them for both.
    assert held - vectors <= reads.by_rank["rank 0"] <= held
    assert sum(reads.by_rank.values()) == exported.data_bytes


def test_a_tensor_that_is_only_read_whole_is_read_by_each_rank(
    exported: ExportedModel, reads: TensorReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ForeignTensor, "reads_boxes", False)
    run_ranks(2, lambda exchange: load(exported, exchange, dp=2))
    assert set(reads.by_rank.values()) == {exported.data_bytes}


def test_nan_that_one_rank_reads_ends_all_with_its_name(
    exported: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_replicas, "CHUNK_BYTES", CHUNK)
    read = ForeignTensor.read

    def read_nan(tensor: ForeignTensor, box: Box | None = None) -> Tensor:
        values = read(tensor, box)
        if tensor.link.native == "head.weight":
            values.view(-1)[0] = math.nan
        return values

    monkeypatch.setattr(ForeignTensor, "read", read_nan)

    def refused(exchange: ThreadExchange) -> str:
        with pytest.raises(UserError, match=r"head\.weight.*NaN or infinite") as error:
            load(exported, exchange, dp=4)
        return error.value.found

    messages: list[Any] = run_ranks(4, refused)
    assert len(set(messages)) == 1
