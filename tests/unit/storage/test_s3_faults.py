"""Checkpoints on a store that fails now and then: nothing wrong is ever loaded, and patience has an end."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.errors import UserError
from evomesh.storage.s3 import S3Storage, make_client
from tests.support.fault_proxy import FAULTS, FaultProxy

from .test_storage import BUCKET, endpoint, keys  # noqa: F401


def on(address: str, root: str, attempts: int = 8) -> CheckpointWriter:
    writer = CheckpointWriter(f"boto3:s3://{BUCKET}.{address}/{root}")
    writer.storage = S3Storage(make_client(f"http://{address}"), BUCKET, attempts=attempts, wait=0.01)
    writer.snapshot_storage = writer.storage
    return writer


def save_and_load(writer: CheckpointWriter, step: int) -> None:
    source = torch.full((1000,), float(step))
    assert writer.save(step, {"w": source}, {"step": step}, {}, final=True)
    found = CheckpointReader().newest(writer.folder)
    assert found is not None and found.step == step
    target = torch.zeros(1000)
    CheckpointReader().load(found, {"w": target})
    assert torch.equal(source, target)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMESH_S3_READ_TIMEOUT", "1")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_request_fails_once(endpoint: str, tmp_path: Path, short: None, fault: str) -> None:  # noqa: F811
    """Every third request fails in this way; each is asked again until it succeeds."""
    every = 12 if fault == "hang" else 3
    with FaultProxy(endpoint, lambda number, *_: fault if number % every == 0 else None, hang=1.5) as proxy:
        for step in (1,):
            save_and_load(on(proxy.address, f"{fault.replace(' ', '')}/{tmp_path.name}"), step)
        assert len(proxy.faults) >= 1


def test_random_faults(endpoint: str, tmp_path: Path, short: None) -> None:  # noqa: F811
    draw = random.Random(3)
    kinds = [fault for fault in FAULTS if fault != "hang"]
    script: Callable[..., str | None] = lambda *_: draw.choice(kinds) if draw.random() < 0.3 else None  # noqa: E731
    with FaultProxy(endpoint, script) as proxy:
        for step in range(1, 4):
            save_and_load(on(proxy.address, f"random/{tmp_path.name}", attempts=12), step)


def test_a_store_that_stays_down_is_logged_and_training_continues(
    endpoint: str,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    down = itertools.count()
    with FaultProxy(endpoint, lambda *_: "slowdown" if next(down) > 40 else None) as proxy:
        writer = on(proxy.address, f"down/{tmp_path.name}", attempts=3)
        assert writer.save(1, {"w": torch.ones(3)}, {}, {})
        down = itertools.count(100)
        assert writer.save(2, {"w": torch.ones(3)}, {}, {}) is None
        assert "gave up after 3 tries" in caplog.messages[-1] and "(HTTP 503)" in caplog.messages[-1]
        with pytest.raises(UserError, match="gave up"):  # an outage is not taken for damage
            CheckpointReader().newest(writer.folder)
    found = CheckpointReader().newest(on(endpoint, f"down/{tmp_path.name}").folder)
    assert found is not None and found.step == 1
