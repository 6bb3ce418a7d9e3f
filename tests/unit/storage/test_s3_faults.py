"""Checkpoints on a store that fails from time to time: nothing wrong is ever loaded, and retries are limited."""

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
from evomesh.errors import EXIT_RESTART, UserError
from evomesh.storage.s3 import S3Storage, make_client
from tests.support.fault_proxy import FAULTS, FaultProxy

from .test_storage import BUCKET, endpoint, keys  # noqa: F401


def on(address: str, root: str, attempts: int = 8) -> CheckpointWriter:
    writer = CheckpointWriter(f"boto3:s3://{BUCKET}.{address}/{root}")
    writer.storage = S3Storage(
        make_client(f"http://{address}"), BUCKET, attempts=attempts, wait=0.01
    )
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
def test_each_request_fails_once(
    endpoint: str,  # noqa: F811
    tmp_path: Path,
    short: None,
    fault: str,
) -> None:
    """Every third request fails in this way; each is asked again until it succeeds."""
    every = 12 if fault == "hang" else 3
    with FaultProxy(
        endpoint, lambda number, *_: fault if number % every == 0 else None, hang=1.5
    ) as proxy:
        for step in (1,):
            save_and_load(
                on(proxy.address, f"{fault.replace(' ', '')}/{tmp_path.name}"), step
            )
        assert len(proxy.faults) >= 1


def test_random_faults(endpoint: str, tmp_path: Path, short: None) -> None:  # noqa: F811
    draw = random.Random(3)
    kinds = [fault for fault in FAULTS if fault != "hang"]

    def script(*_: object) -> str | None:
        return draw.choice(kinds) if draw.random() < 0.3 else None

    with FaultProxy(endpoint, script) as proxy:
        for step in range(1, 4):
            save_and_load(
                on(proxy.address, f"random/{tmp_path.name}", attempts=12), step
            )


def test_a_store_that_stays_down_is_logged_and_training_continues(
    endpoint: str,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    down = itertools.count()
    with FaultProxy(
        endpoint, lambda *_: "slowdown" if next(down) > 40 else None
    ) as proxy:
        writer = on(proxy.address, f"down/{tmp_path.name}", attempts=3)
        assert writer.save(1, {"w": torch.ones(3)}, {}, {})
        down = itertools.count(100)
        assert writer.save(2, {"w": torch.ones(3)}, {}, {}) is None
        assert (
            "gave up after 3 tries" in caplog.messages[-1]
            and "(HTTP 503)" in caplog.messages[-1]
        )
        assert caplog.records[-1].levelno == logging.WARNING
        assert writer.save(3, {"w": torch.ones(3)}, {}, {}) is None
        with pytest.raises(
            UserError,
            match=r"third in a row: gave up(.|\n)*fix: run the same command again",
        ) as caught:
            writer.save(4, {"w": torch.ones(3)}, {}, {})
        assert caught.value.exit_code == EXIT_RESTART
        with pytest.raises(
            UserError, match="gave up"
        ) as caught:  # an outage is not taken for damage
            CheckpointReader().newest(writer.folder)
        assert caught.value.exit_code == EXIT_RESTART
    found = CheckpointReader().newest(on(endpoint, f"down/{tmp_path.name}").folder)
    assert found is not None and found.step == 1


@pytest.mark.parametrize("fault", ["503", "reset", "nobody listens"])
def test_a_store_that_is_down_at_the_start_asks_for_a_restart(
    endpoint: str,  # noqa: F811
    tmp_path: Path,
    fault: str,
) -> None:
    with FaultProxy(endpoint, lambda *_: fault) as proxy:
        address = proxy.address
        writer = on(address, "start", attempts=2)
        if fault != "nobody listens":
            with pytest.raises(UserError, match="gave up after 2 tries") as caught:
                writer.claim()
            assert caught.value.exit_code == EXIT_RESTART
    with pytest.raises(
        UserError, match=r"gave up after 2 tries(.|\n)*once the store answers"
    ) as caught:
        writer.claim()
    assert caught.value.exit_code == EXIT_RESTART


@pytest.mark.parametrize("name", ["commit.json", "index.jsonl", "safetensors"])
def test_an_object_that_nobody_may_read_is_skipped(
    endpoint: str,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    # Folders of tests that passed are removed, and their names used again.
    root = f"denied/{tmp_path.name}/{name}"
    writer = on(endpoint, root)
    for step in (1, 2):
        writer.save(step, {"w": torch.ones(3)}, {}, {})
    writer.close()
    denied: Callable[..., str | None] = (  # noqa: E731
        lambda _, method, path: (
            "denied"
            if method in ("GET", "HEAD") and "00002/" in path and name in path
            else None
        )
    )
    with FaultProxy(endpoint, denied) as proxy:
        found = CheckpointReader().newest(on(proxy.address, root).folder)
    assert found is not None and found.step == 1
    assert (
        "skipped" in caplog.text and "AccessDenied" in caplog.text
    ) or "403" in caplog.text


@pytest.mark.parametrize("kind", ["commit.json", "index.jsonl", "safetensors"])
def test_a_bit_flipped_once_on_the_line_is_read_again(
    endpoint: str,  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    root = f"flip/{tmp_path.name}/{kind}"
    writer = on(endpoint, root)
    for step in (1, 2):
        writer.save(step, {"w": torch.full((1000,), float(step))}, {}, {})
    writer.close()
    flips = itertools.count()

    def flip(_: int, method: str, path: str) -> str | None:
        wanted = (
            method == "GET"
            and "00002/" in path
            and path.split("?", maxsplit=1)[0].endswith(kind)
        )
        return "flip" if wanted and next(flips) == 0 else None

    with FaultProxy(endpoint, flip) as proxy:
        found = CheckpointReader().newest(on(proxy.address, root).folder)
        assert found is not None and found.step == 2
        assert proxy.faults == ["flip"]
