"""One contract for every store; S3's runs against moto's server over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.errors import UserError
from evomesh.storage import s3, s3_client
from evomesh.storage.base import Storage, join
from evomesh.storage.staged import StagedStorage
from evomesh.storage.urls import open_storage
from tests.support.covers import covers
from tests.support.moto_store import moto_store

pytestmark = covers("promise:path-forms")

BUCKET = "model_weights"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_store(BUCKET) as address:
        yield address


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("S3_SECRET_ACCESS_KEY_ID", "s")
    # No renewals between the requests that a test looks at.
    monkeypatch.setenv("EVOMESH_S3_LEASE", "1e9")


SERVED = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("boto3", "s3", "staged")
]


@pytest.fixture(params=["local", *SERVED])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Storage, str]:
    if request.param == "local":
        return open_storage(f"local:{tmp_path}/root")
    address = request.getfixturevalue("endpoint")
    if request.param == "boto3":
        return open_storage(f"boto3:s3://{BUCKET}.{address}/runs/{tmp_path.name}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{address}")
    storage, root = open_storage(
        f"s3://{BUCKET}/other/{request.param}/{tmp_path.name}/"
    )
    if request.param == "staged":
        storage = StagedStorage(storage, str(tmp_path / "tmp"), "rank0")  # type: ignore[assignment]
    return storage, root


def write(storage: Storage, path: str, *parts: bytes) -> None:
    writer = storage.create(path)
    for part in parts:
        writer.write(part)
    writer.finish()


def test_contract(place: tuple[Storage, str]) -> None:
    storage, root = place
    assert storage.list(root) == [] and not storage.exists(join(root, "a"))
    storage.make_folder(join(root, "f"))
    path = join(root, "f", "data")
    write(storage, path, b"hello ", b"world")
    storage.sync(join(root, "f"))
    assert storage.exists(path) and storage.size(path) == 11
    assert (
        storage.read(path) == b"hello world"
        and storage.read(path, 6, 3) == b"wor"
        and storage.read(path, 0, 0) == b""
    )
    buffer = bytearray(5)
    reader = storage.open(path)
    reader.expect([(0, 5), (6, 11)])
    reader.read_into(6, memoryview(buffer))
    assert buffer == b"world"
    reader.close()
    with pytest.raises(FileExistsError):
        storage.create(path)
    with pytest.raises(FileNotFoundError):
        storage.size(join(root, "none"))
    storage.publish(join(root, "f", "commit"), b"one", "t1")
    with pytest.raises(FileExistsError):
        storage.publish(join(root, "f", "commit"), b"two", "t2")
    assert storage.read(join(root, "f", "commit")) == b"one"
    assert storage.list(root) == ["f/"]
    assert [
        name for name in storage.list(join(root, "f")) if not name.startswith(".")
    ] == ["commit", "data"]
    storage.delete(path)
    storage.delete(path)
    assert not storage.exists(path)


def test_an_aborted_file_is_never_seen(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, root = place
    if not storage.remote:
        pytest.skip("on a disk the commit record decides")
    monkeypatch.setattr(s3, "PART", 5 << 20)
    writer = storage.create(join(root, "big"))
    writer.write(bytes(6 << 20))
    writer.abort()
    assert storage.list(root) == []


def test_many_parts(
    place: tuple[Storage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, root = place
    monkeypatch.setattr(s3, "PART", 5 << 20)
    storage.make_folder(root)
    data = torch.randint(0, 256, (12 << 20,), dtype=torch.uint8).numpy().tobytes()
    write(storage, join(root, "big"), data[: 7 << 20], data[7 << 20 :])
    assert storage.read(join(root, "big")) == data


@covers("promise:uploads-and-snapshots")
def test_checkpoints(endpoint: str, tmp_path: Path) -> None:
    url = f"boto3:s3://{BUCKET}.{endpoint}/internlm/{tmp_path.name}"
    manager = CheckpointWriter(url, keep_last=2)
    manager.prepare({"w": torch.ones(300, 5000)}, saves=5)
    for step in (10, 20, 30):
        manager.save(
            step, {"w": torch.full((300, 5000), float(step))}, {"step": step}, {}
        )
    manager.save(
        35, {"w": torch.full((300, 5000), 35.0)}, {"step": 35}, {}, snapshot=True
    )
    assert [c.step for c in manager.folder.candidates()] == [35, 30, 20]
    assert CheckpointReader().resolve(f"{url}/snapshot/1/").step == 35
    assert CheckpointReader().resolve(f"{url}/30").step == 30
    found = CheckpointReader().newest(manager.folder)
    assert found is not None
    target = torch.zeros(300, 5000)
    assert CheckpointReader().load(found, {"w": target}) == {"step": 35}
    assert bool((target == 35).all())
    manager.storage.delete(f"{manager.root}/snapshot/step-00000035/commit.json")
    again = CheckpointReader().newest(SaveFolder.open(url))
    assert again is not None and again.step == 30


def test_two_writers_past_the_lock(endpoint: str, tmp_path: Path) -> None:
    """A process may take its own lock again, so both hold it; the commit record still has one writer only."""
    url = f"boto3:s3://{BUCKET}.{endpoint}/two/{tmp_path.name}"
    one, two = CheckpointWriter(url), CheckpointWriter(url)
    decide = two._decide_attempt
    two._decide_attempt = lambda *a: (
        decide(*a),
        one.save(1, {"w": torch.ones(3)}, {}, {}),
    )[0]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="another job committed step 1"):
        two.save(1, {"w": torch.zeros(3)}, {}, {}, final=True)


@covers("ckpt.s3_endpoint")
@pytest.mark.parametrize(
    ("url", "bucket", "key", "endpoint"),
    [
        (
            "boto3:s3://model_weights.10.1.2.3/internlm/49",
            "model_weights",
            "internlm/49",
            "http://10.1.2.3",
        ),
        ("boto3:s3://b.10.1.2.3:9000/k/", "b", "k", "http://10.1.2.3:9000"),
        (
            "boto3:s3://b.oss.example.org/snapshot/1/",
            "b",
            "snapshot/1",
            "https://oss.example.org",
        ),
        ("s3:http://h:9000/b.dots/k/1/", "b.dots", "k/1", "http://h:9000"),
        ("s3:https://store.example.org/b", "b", "", "https://store.example.org"),
    ],
)
def test_urls(url: str, bucket: str, key: str, endpoint: str) -> None:
    scheme, _, rest = url.partition(":")
    assert s3_client.parse(scheme, rest) == s3_client.S3Address(bucket, key, endpoint)


def test_the_plain_form_takes_the_endpoint_from_the_environment() -> None:
    assert s3_client.parse(
        "s3", "//b/k/x", {"AWS_ENDPOINT_URL": "http://h:1"}
    ) == s3_client.S3Address("b", "k/x", "http://h:1")
    assert s3_client.parse("s3", "//b.with.dots/k", {}) == s3_client.S3Address(
        "b.with.dots", "k", None
    )
    with pytest.raises(UserError, match="no bucket or no endpoint"):
        s3_client.parse("boto3", "s3://bucket/key")


def test_a_missing_bucket_and_missing_credentials(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"NoSuchBucket.*\n.*make the bucket"):
        CheckpointWriter(f"boto3:s3://nowhere.{endpoint}/x").claim()
    for name in (
        "S3_ACCESS_KEY_ID",
        "S3_SECRET_ACCESS_KEY_ID",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="no credentials"):
        CheckpointWriter(f"boto3:s3://{BUCKET}.{endpoint}/x").claim()
