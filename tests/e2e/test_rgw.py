"""The storage contract and checkpoints on Ceph's S3 gateway, which checks signatures, also through a faulty line."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.errors import UserError
from evomesh.storage.s3 import S3Storage, make_client
from tests.support import rgw
from tests.support.fault_proxy import FAULTS, FaultProxy
from tests.support.interpreter import Interpreter
from tests.unit.storage import test_s3_lock, test_storage

BUCKET = "weights"
pytestmark = pytest.mark.skipif(
    not rgw.available(), reason="needs Debian's radosgw, ceph-mon and ceph-osd"
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with rgw.gateway() as gateway:
        client = make_client(
            f"http://{gateway.address}",
            {"S3_ACCESS_KEY_ID": rgw.KEY, "S3_SECRET_ACCESS_KEY_ID": rgw.SECRET},
        )
        client.create_bucket(Bucket=BUCKET)
        yield gateway.address


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ACCESS_KEY_ID", rgw.KEY)
    monkeypatch.setenv("S3_SECRET_ACCESS_KEY_ID", rgw.SECRET)
    monkeypatch.setenv("EVOMESH_S3_LEASE", "1e9")  # no renewals after a test


def store(address: str, **options: float) -> S3Storage:
    return S3Storage(make_client(f"http://{address}"), BUCKET, **options)  # type: ignore[arg-type]


def test_contract(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_storage.test_contract((store(address), "contract"))
    test_storage.test_many_parts((store(address), "parts"), monkeypatch)
    test_storage.test_an_aborted_file_is_never_seen(
        (store(address), "aborted"), monkeypatch
    )


def test_checkpoints(address: str) -> None:
    url = f"boto3:s3://{BUCKET}.{address}/runs"
    writer = CheckpointWriter(url, keep_last=2)
    for step in (1, 2, 3):
        writer.save(
            step,
            {"w": torch.full((3000, 2000), float(step))},
            {"step": step},
            {},
            final=True,
        )
    target = torch.zeros(3000, 2000)
    found = CheckpointReader().resolve(f"{url}/3")
    assert CheckpointReader().load(found, {"w": target}) == {"step": 3} and bool(
        (target == 3).all()
    )
    assert [c.step for c in writer.folder.candidates()] == [3, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("S3_ACCESS_KEY_ID", "InvalidAccessKeyId"),
        ("S3_SECRET_ACCESS_KEY_ID", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials(
    address: str, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setenv(name, "wrong")
    with pytest.raises(UserError, match=words) as error:
        CheckpointWriter(f"boto3:s3://{BUCKET}.{address}/x").claim()
    assert "set S3_" in str(error.value)


def test_the_lock_of_a_writer(address: str) -> None:
    interpreter = Interpreter()
    try:
        keys = {"S3_ACCESS_KEY_ID": rgw.KEY, "S3_SECRET_ACCESS_KEY_ID": rgw.SECRET}
        test_s3_lock.check_two_jobs(
            f"boto3:s3://{BUCKET}.{address}/jobs", interpreter, keys
        )
    finally:
        interpreter.close()
    lock = store(address).lock("alone/.writer", "job")
    lock.check()  # this gateway compares ETags without their quotes
    lock.release()


def test_faults_on_the_line(address: str, tmp_path: Path) -> None:
    draw = random.Random(5)
    kinds = [fault for fault in FAULTS if fault != "hang"]
    with FaultProxy(
        address, lambda *_: draw.choice(kinds) if draw.random() < 0.3 else None
    ) as proxy:
        for step in (1, 2, 3):
            writer = CheckpointWriter(f"boto3:s3://{BUCKET}.{proxy.address}/faults")
            writer.storage = writer.snapshot_storage = store(
                proxy.address, attempts=12, wait=0.01
            )
            source, target = torch.full((100, 30), float(step)), torch.zeros(100, 30)
            assert writer.save(step, {"w": source}, {}, {}, final=True)
            found = CheckpointReader().newest(writer.folder)
            assert found is not None and found.step == step
            CheckpointReader().load(found, {"w": target})
            assert torch.equal(source, target)
        assert len(proxy.faults) > 10
