"""Objects in an S3 store, by boto3.

A URL is ``boto3:s3://BUCKET.ENDPOINT/KEY`` as in the documents (split at the first dot), ``s3:ENDPOINT/BUCKET/KEY``
with an endpoint like ``https://HOST:PORT``, or ``s3://BUCKET/KEY`` with the endpoint from ``AWS_ENDPOINT_URL_S3``,
``AWS_ENDPOINT_URL`` or AWS itself. An object appears whole or not at all;
the commit record is put with ``If-None-Match: *``, so of two writers one wins.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from evomesh.errors import UserError
from evomesh.storage.base import StorageError, join

logger = logging.getLogger(__name__)
T = TypeVar("T")

PART = 16 << 20  # bytes of a multipart upload's part, and most of one merged read
GAP = 4 << 10  # unwanted bytes that a merged read may fetch between two wanted ranges
IN_FLIGHT = 8
ATTEMPTS = 6
MISSING = ("404", "NoSuchKey", "NotFound")
EXISTS = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
ADVICE = {
    "NoSuchBucket": "make the bucket, or mend its name in the path",
    "InvalidAccessKeyId": "set S3_ACCESS_KEY_ID (or AWS_ACCESS_KEY_ID) to a key this store knows",
    "SignatureDoesNotMatch": "set S3_SECRET_ACCESS_KEY_ID (or AWS_SECRET_ACCESS_KEY) to the key's own secret",
    "AccessDenied": "give this key the right to list, read, write and delete in the bucket",
    "403": "check the credentials, and that they may use the bucket",
    "RequestTimeTooSkewed": "set this machine's clock",
}


@dataclass(frozen=True)
class S3Address:
    """Where a URL points: ``endpoint`` None means AWS's own."""

    bucket: str
    key: str
    endpoint: str | None


def parse(scheme: str, rest: str, env: Mapping[str, str] = os.environ) -> S3Address:
    """Understands what stands behind ``boto3:`` or ``s3:``.

    Raises:
        UserError: no bucket or, in the documents' form, no endpoint.
    """
    if scheme == "s3" and rest.startswith(("http://", "https://")):
        protocol, _, text = rest.partition("://")
        host, _, text = text.partition("/")
        bucket, _, key = text.partition("/")
        if not host or not bucket:
            raise UserError(f"s3:{rest}: no bucket", expected="s3:https://HOST/BUCKET/KEY")
        return S3Address(bucket, key.strip("/"), f"{protocol}://{host}")
    text = rest.removeprefix("s3:").lstrip("/")
    host, _, key = text.partition("/")
    if scheme == "s3":
        if not host:
            raise UserError(f"s3:{rest}: no bucket", expected="s3://BUCKET/KEY")
        return S3Address(host, key.strip("/"), env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"))
    bucket, _, endpoint = host.partition(".")
    if not bucket or not endpoint:
        raise UserError(f"boto3:{rest}: no bucket or no endpoint", expected="boto3:s3://BUCKET.ENDPOINT/KEY")
    return S3Address(bucket, key.strip("/"), _endpoint_url(endpoint))


def _endpoint_url(endpoint: str) -> str:
    """https for names; http for a bare IP address, which no certificate is made for."""
    name = endpoint.rsplit(":", 1)[0] if endpoint.count(":") == 1 else endpoint
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return f"https://{endpoint}"
    logger.warning("the endpoint %s is an IP address: bytes and keys travel unencrypted (http)", endpoint)
    return f"http://{endpoint}"


def make_client(endpoint: str | None, env: Mapping[str, str] = os.environ) -> Any:
    """A boto3 client; the documents' names of the credentials come before AWS's own."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise UserError("an s3 path needs boto3", fix="pip install 'evomesh[s3]'") from None
    key, secret = (
        next((env[name] for name in names if env.get(name)), None)
        for names in (
            ("S3_ACCESS_KEY_ID", "ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
            ("S3_SECRET_ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"),
        )
    )
    config = Config(
        # One layer of retries, ours: it knows which calls may be repeated, and says what it waits for.
        retries={"max_attempts": 0},
        connect_timeout=float(env.get("EVOMESH_S3_CONNECT_TIMEOUT", "10")),
        read_timeout=float(env.get("EVOMESH_S3_READ_TIMEOUT", "60")),
        s3={"addressing_style": "path" if endpoint else "auto"},
        max_pool_connections=2 * IN_FLIGHT,
        request_checksum_calculation="when_required",  # stores other than AWS's refuse the newer trailers
        response_checksum_validation="when_required",
    )
    verify = None if env.get("EVOMESH_S3_VERIFY", "1") not in ("0", "false") else False
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name=env.get("AWS_DEFAULT_REGION") or env.get("AWS_REGION") or "us-east-1",
        config=config,
        verify=verify,
    )


class S3Storage:
    """A ``Storage`` over one bucket.

    Args:
        client: a boto3 S3 client without retries of its own.
        attempts: tries of one request before giving up.
        wait: seconds before the second try; doubles with each more, at most 20.
    """

    remote = True

    def __init__(self, client: Any, bucket: str, *, attempts: int = ATTEMPTS, wait: float = 0.5) -> None:
        self._client, self.bucket = client, bucket
        self._attempts, self._wait = attempts, wait
        self.pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="s3")

    def call(self, operation: str, key: str, **arguments: Any) -> Any:
        """One request, repeated while the store asks for patience.

        Raises:
            FileNotFoundError, FileExistsError: what S3's 404 and 412 mean.
            StorageError: everything else, in words.
        """
        named = {"Key": key} if key else {}
        return self.patiently(
            operation, key, lambda: getattr(self._client, operation)(Bucket=self.bucket, **named, **arguments)
        )

    def patiently(self, operation: str, key: str, request: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError

        place = f"s3://{self.bucket}/{key}"
        for attempt in range(1, self._attempts + 1):
            try:
                return request()
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
                if code in MISSING:
                    raise FileNotFoundError(2, "no such object", place) from None
                if code in EXISTS:
                    raise FileExistsError(17, "the object exists", place) from None
                reason = f"{operation}: {code or 'error'} (HTTP {status})"
                if status < 500 and code not in (
                    "SlowDown",
                    "RequestTimeout",
                    "Throttling",
                    "TooManyRequests",
                    "429",
                ):
                    fix = ADVICE.get(code, "")
                    raise StorageError(f"the store refuses: {reason}", where=place, fix=fix) from None
            except (BotoCoreError, OSError, EOFError) as error:
                reason = f"{operation}: {error}"
                if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                    raise StorageError(
                        "no credentials for the object store",
                        where=place,
                        fix="set S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY_ID",
                    ) from None
            if attempt < self._attempts:
                pause = min(20.0, self._wait * 2 ** (attempt - 1))
                logger.warning(
                    "%s: %s; try %d of %d in %.1f s", place, reason, attempt + 1, self._attempts, pause
                )
                time.sleep(pause)
        raise StorageError(f"gave up after {self._attempts} tries: {reason}", where=place)

    def make_folder(self, folder: str) -> None:
        return

    def create(self, path: str) -> S3Writer:
        if self.exists(path):
            raise FileExistsError(17, "the object exists", path)
        return S3Writer(self, path)

    def put(self, path: str, data: bytes, **arguments: Any) -> None:
        self.call("put_object", path, Body=data, ContentMD5=_md5(data), **arguments)

    def publish(self, path: str, data: bytes, token: str) -> None:
        try:
            self.put(path, data, IfNoneMatch="*")
        except StorageError as error:
            if "NotImplemented" not in error.found and "HTTP 501" not in error.found:
                raise
            if self.exists(path):
                raise FileExistsError(17, "the object exists", path) from None
            self.put(path, data)  # an old store without conditional writes

    def sync(self, folder: str) -> None:
        return

    def open(self, path: str) -> S3Reader:
        return S3Reader(self, path)

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        span = {} if start == 0 and length is None else {"Range": f"bytes={start}-{_last(start, length)}"}

        def fetch() -> bytes:
            answer = self._client.get_object(Bucket=self.bucket, Key=path, **span)
            data: bytes = answer["Body"].read()
            if len(data) != answer["ContentLength"] or (length is not None and len(data) != length):
                raise EOFError(f"{len(data)} bytes came, {length or answer['ContentLength']} were wanted")
            return data

        return self.patiently("get_object", path, fetch)

    def size(self, path: str) -> int:
        return int(self.call("head_object", path)["ContentLength"])

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def is_link(self, path: str) -> bool:
        return False

    def list(self, folder: str) -> list[str]:
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        names: list[str] = []
        more: dict[str, str] = {}
        while True:
            answer = self.call("list_objects_v2", "", Prefix=prefix, Delimiter="/", **more)
            names += [entry["Prefix"][len(prefix) :] for entry in answer.get("CommonPrefixes", [])]
            names += [
                entry["Key"][len(prefix) :] for entry in answer.get("Contents", []) if entry["Key"] != prefix
            ]
            if not answer.get("IsTruncated"):
                return sorted(names)
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, path: str) -> None:
        self.call("delete_object", path)

    def delete_folder(self, folder: str) -> None:
        return

    def free_bytes(self, folder: str) -> int | None:
        return None

    def lock(self, path: str, holder: str) -> S3NoLock:
        """S3 has no locks; the conditional commit keeps a second writer out. Bucket and credentials are tried here."""
        self.list(path.rpartition("/")[0])
        return S3NoLock()


class S3NoLock:
    def release(self) -> None:
        return


class S3Writer:
    """A multipart upload; small files are put in one request."""

    def __init__(self, storage: S3Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[Future[str]] = []
        self._size = 0
        self._room = threading.Semaphore(IN_FLIGHT)  # bounds the copies of parts that wait

    def write(self, data: memoryview | bytes) -> None:
        self._size += len(data)
        self._buffer += data
        while len(self._buffer) >= PART:
            self._send(bytes(self._buffer[:PART]))
            del self._buffer[:PART]

    def _send(self, part: bytes) -> None:
        if self._upload is None:
            self._upload = self._storage.call("create_multipart_upload", self._key)["UploadId"]
        number = len(self._parts) + 1
        self._room.acquire()

        def send() -> str:
            try:
                answer = self._storage.call(
                    "upload_part",
                    self._key,
                    UploadId=self._upload,
                    PartNumber=number,
                    Body=part,
                    ContentMD5=_md5(part),
                )
                return str(answer["ETag"])
            finally:
                self._room.release()

        self._parts.append(self._storage.pool.submit(send))

    def finish(self) -> None:
        if self._upload is None:
            self._storage.put(self._key, bytes(self._buffer))
        else:
            if self._buffer:
                self._send(bytes(self._buffer))
            tags = [{"PartNumber": i + 1, "ETag": part.result()} for i, part in enumerate(self._parts)]
            try:
                self._storage.call(
                    "complete_multipart_upload",
                    self._key,
                    UploadId=self._upload,
                    MultipartUpload={"Parts": tags},
                )
            except StorageError:
                # A lost answer to a completion that took place looks like an unknown upload when asked again.
                if not self._storage.exists(self._key):
                    raise
        self._upload, self._buffer = None, bytearray()
        actual = self._storage.size(self._key)
        if actual != self._size:
            raise StorageError(f"the store has {actual} bytes, {self._size} were sent", where=self._key)

    def abort(self) -> None:
        if self._upload is not None:
            upload, self._upload = self._upload, None
            try:
                for part in self._parts:
                    if not part.cancel():
                        wait([part])  # a part that arrives after the abort would stay in the bucket
                self._storage.call("abort_multipart_upload", self._key, UploadId=upload)
            except (StorageError, OSError) as error:
                logger.warning("%s: an unfinished upload may be left in the bucket: %s", self._key, error)


class S3Reader:
    """Range reads; what ``expect`` announced is fetched ahead in merged blocks."""

    def __init__(self, storage: S3Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._blocks: list[tuple[int, int]] = []
        self._ahead: dict[int, Future[bytes]] = {}

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        self._blocks = list(merge(ranges))

    def read_into(self, start: int, buffer: memoryview) -> None:
        stop = start + len(buffer)
        for number, (first, last) in enumerate(self._blocks):
            if first <= start and stop <= last:
                data = self._block(number)
                buffer[:] = data[start - first : stop - first]
                return
        buffer[:] = self._storage.read(self._key, start, len(buffer))

    def _block(self, number: int) -> bytes:
        for done in [n for n in self._ahead if n < number]:
            del self._ahead[done]  # reads come in file order
        for ahead in range(number, min(number + IN_FLIGHT, len(self._blocks))):
            if ahead not in self._ahead:
                first, last = self._blocks[ahead]
                self._ahead[ahead] = self._storage.pool.submit(
                    self._storage.read, self._key, first, last - first
                )
        return self._ahead[number].result()

    def close(self) -> None:
        self._ahead.clear()


def merge(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, stop) ranges in order, neighbours joined up to ``PART`` bytes."""
    current: tuple[int, int] | None = None
    for start, stop in sorted(ranges):
        if current and start <= current[1] + GAP and stop - current[0] <= PART:
            current = current[0], max(current[1], stop)
            continue
        if current:
            yield current
        current = start, stop
    if current:
        yield current


def _last(start: int, length: int | None) -> str:
    return "" if length is None else str(start + length - 1)


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def open_s3(scheme: str, rest: str) -> tuple[S3Storage, str]:
    """The storage and the key that a URL means."""
    address = parse(scheme, rest)
    return S3Storage(make_client(address.endpoint), address.bucket), join(address.key or "/").strip("/")
