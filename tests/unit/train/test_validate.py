"""Figures of a validation whose losses are known, against sums by hand."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from evomesh.config.data import DataConfig
from evomesh.config.schema import IGNORE
from evomesh.data.batch import Batch
from evomesh.data.build import build_valid_data
from evomesh.layers.loss import LossOutput
from evomesh.parallel.grid import Grid
from evomesh.train.stages import ModelStages
from evomesh.train.validate import announcement, validate, validation_figures
from tests.support.golden import write_bin


class KnownLosses:
    """Stages whose loss of a target is a hundredth of its id."""

    def __init__(self) -> None:
        self.module = torch.nn.Module()
        self.schedule = self

    def evaluate(self, batch: Batch, add: Callable[[int, LossOutput], None]) -> None:
        for index, labels in enumerate(batch.labels):
            nll = torch.where(labels == IGNORE, 0, labels).double() / 100
            add(index, LossOutput(nll.sum(), nll, labels == 3))


def open_sets(folder: Path, **values: Any) -> Any:
    config = DataConfig(
        seq_len=8, micro_num=2, valid_folder=str(folder), valid_every=1, **values
    )
    return build_valid_data(config, 100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of "en" with 40 bytes each, and "cn" of another tool."""
    write_bin(tmp_path / "en/a.bin", [[1, 2, 3, 4], [5, 6]])
    write_bin(tmp_path / "en/b.bin", [list(range(10, 30))])
    write_bin(tmp_path / "cn/c.bin", [[7, 8, 9]])
    for name in ("a", "b"):
        (tmp_path / f"en/{name}.bin.json").write_text(json.dumps({"text_bytes": 40}))
    return tmp_path


def test_bits_per_byte(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "evomesh")
    sets = open_sets(folder)
    stages = cast(ModelStages, KnownLosses())
    results = validate(stages, sets, Grid(), torch.device("cpu"))
    nats = (2 + 3 + 4 + 6 + sum(range(11, 30))) / 100
    assert results["val/en_bpb"] == pytest.approx(nats / math.log(2) / 80, rel=1e-12)
    assert results["val/cn_loss"] == pytest.approx(0.085, rel=1e-12)
    assert sorted(results) == sorted(validation_figures(sets))
    assert "val/cn_bpb" not in results
    assert "no bits per byte of validation set cn: cn/c.bin: its fing" in caplog.text
    assert "tokenize the texts again" in caplog.text


def test_conversations_need_not_be_tokenized_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = {"options": {"schema": "messages"}}
    (folder / "cn/c.bin.json").write_text(json.dumps(record))
    caplog.set_level(logging.INFO, "evomesh")
    open_sets(folder)
    assert "(schema messages) are not counted" in caplog.text
    assert "again" not in caplog.text


def test_none_where_documents_are_left_out(folder: Path) -> None:
    names = validation_figures(open_sets(folder, valid_min_length=3))
    assert "val/en_loss" in names and "val/en_bpb" not in names


def test_a_long_validation_is_announced(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "evomesh")
    sets = open_sets(folder)
    stages = cast(ModelStages, KnownLosses())
    device = torch.device("cpu")
    # Segments of at most 8 tokens: 4, 2, 8, 8 and 4 of "en" fill 4 packs, two in a batch.
    validate(stages, sets, Grid(), device, announced_from=4)
    assert "validating" not in caplog.text
    validate(stages, sets, Grid(), device, announced_from=3)
    assert "validating: 3 batches (cn 1, en 2)" in caplog.text
    line = announcement({"en": 1200}, 4)
    assert (
        line == "validating: 1,200 batches on each of 4 data-parallel ranks (en 1,200)"
    )
