"""Objects in an S3 store, by boto3.

An object appears whole or not at all. The commit record is put with ``If-None-Match: *``, so of two writers one wins.
``s3_client.py`` has the forms of a URL, ``s3_lock.py`` the lock of a writer.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeVar

from evomesh.errors import EXIT_RESTART, EXIT_USER_ERROR
from evomesh.storage.base import StorageError, join
from evomesh.storage.s3_client import make_client, parse
from evomesh.storage.s3_lock import LEASE_SECONDS, ConditionUnknownError, S3Lock

logger = logging.getLogger(__name__)
T = TypeVar("T")

PART = 16 << 20  # bytes of a multipart upload's part, and most of one merged read
GAP = 4 << 10  # unwanted bytes that a merged read may fetch between two wanted ranges
IN_FLIGHT = 8  # parts or blocks that travel at the same time
ATTEMPTS = 6
LONGEST_PAUSE = 20.0  # seconds between two tries
MISSING = ("404", "NoSuchKey", "NotFound")
EXISTS = ("412", "PreconditionFailed")
# Codes below 500 that ask for another try. A conflict is two conditional writes that
# meet: one of them is to come back.
REPEATABLE = (
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "TooManyRequests",
    "429",
    "409",
    "ConditionalRequestConflict",
    "OperationAborted",
)
# Of one object, where others can be read.
UNREADABLE = ("AccessDenied", "403", "InvalidObjectState")
ADVICE = {
    "NoSuchBucket": "make the bucket, or correct its name in the path",
    "InvalidAccessKeyId": "set S3_ACCESS_KEY_ID (or AWS_ACCESS_KEY_ID) to a key this store knows",
    "SignatureDoesNotMatch": "set S3_SECRET_ACCESS_KEY_ID (or AWS_SECRET_ACCESS_KEY) to the key's own secret",
    "AccessDenied": "give this key the right to list, read, write and delete in the bucket",
    "403": "check the credentials, and that they may use the bucket",
    "RequestTimeTooSkewed": "set this machine's clock",
}
OUTAGE_FIX = "run the same command again once the store answers; check the endpoint if it never did"


class S3Storage:
    """A ``Storage`` over one bucket.

    Args:
        client: a boto3 S3 client without retries.
        attempts: tries of one request before giving up.
        wait: seconds before the second try; doubles with each more, at most ``LONGEST_PAUSE``.
    """

    remote = True

    def __init__(
        self, client: Any, bucket: str, *, attempts: int = ATTEMPTS, wait: float = 0.5
    ) -> None:
        self._client, self.bucket = client, bucket
        self._attempts, self._wait = attempts, wait
        self.pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="s3")

    def name_of(self, path: str) -> str:
        """Return the path with its bucket, for messages."""
        return f"s3://{self.bucket}/{path}"

    def call(self, operation: str, key: str, **arguments: Any) -> Any:
        """Send one request, again while the store asks for patience, and return boto3's answer.

        Raises:
            FileNotFoundError, FileExistsError: what S3's 404 and 412 mean.
            StorageError: everything else, in words.
        """
        named = {"Key": key} if key else {}
        return self.repeat(
            operation,
            key,
            lambda: getattr(self._client, operation)(
                Bucket=self.bucket, **named, **arguments
            ),
        )

    def repeat(self, operation: str, key: str, request: Callable[[], T]) -> T:
        """Run ``request`` until it succeeds or another try would not change the answer.

        Raises:
            FileNotFoundError, FileExistsError, PermissionError, StorageError: as ``call``.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        place = self.name_of(key)
        reason = ""
        for attempt in range(1, self._attempts + 1):
            try:
                return request()
            except ClientError as error:
                reason = _repeatable_answer(error.response, operation, place)
            except (BotoCoreError, OSError, EOFError) as error:
                reason = _repeatable_failure(error, operation, place)
            if attempt < self._attempts:
                pause = min(LONGEST_PAUSE, self._wait * 2 ** (attempt - 1))
                logger.warning(
                    "%s: %s; try %d of %d in %.1f s",
                    place,
                    reason,
                    attempt + 1,
                    self._attempts,
                    pause,
                )
                time.sleep(pause)
        raise StorageError(
            f"gave up after {self._attempts} tries: {reason}",
            where=place,
            fix=OUTAGE_FIX,
            exit_code=EXIT_RESTART,
        )

    def make_folder(self, folder: str) -> None:
        return

    def create(self, path: str) -> S3Writer:
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, "the object exists", path)
        return S3Writer(self, path)

    def put(self, path: str, data: bytes, **conditions: str) -> str:
        """Write a whole object and return its ETag.

        Raises:
            FileExistsError: one of the conditions (``IfNoneMatch``, ``IfMatch``) does not hold.
        """
        answer = self.call(
            "put_object", path, Body=data, ContentMD5=_md5(data), **conditions
        )
        return str(answer["ETag"])

    def publish(self, path: str, data: bytes, token: str) -> None:
        try:
            self.put(path, data, IfNoneMatch="*")
        except ConditionUnknownError:
            if self.exists(path):
                raise FileExistsError(errno.EEXIST, "the object exists", path) from None
            self.put(path, data)  # an old store without conditional writes

    def sync(self, folder: str) -> None:
        return

    def open(self, path: str) -> S3Reader:
        return S3Reader(self, path)

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        span = {}
        if start or length is not None:
            last = "" if length is None else start + length - 1
            span["Range"] = f"bytes={start}-{last}"

        def fetch() -> bytes:
            answer = self._client.get_object(Bucket=self.bucket, Key=path, **span)
            data = _body(answer)
            if length is not None and len(data) != length:
                raise EOFError(f"{len(data)} bytes came, {length} were wanted")
            return data

        return self.repeat("get_object", path, fetch)

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        """Return content and ETag of a small object."""

        def fetch() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=path)
            return _body(answer), str(answer["ETag"])

        return self.repeat("get_object", path, fetch)

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
        folder = folder.strip("/")
        prefix = f"{folder}/" if folder else ""
        names: list[str] = []
        position: dict[str, str] = {}
        # An answer has up to a thousand names, and the token with which the next one
        # continues.
        while True:
            answer = self.call(
                "list_objects_v2",
                "",
                Prefix=prefix,
                Delimiter="/",
                **position,
            )
            for entry in answer.get("CommonPrefixes", []):
                name = entry["Prefix"].removeprefix(prefix)
                names.append(name)
            for entry in answer.get("Contents", []):
                key = entry["Key"]
                if key != prefix:  # the object that stands for the folder itself
                    names.append(key.removeprefix(prefix))
            if not answer.get("IsTruncated"):
                return sorted(names)
            position = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, path: str) -> None:
        self.call("delete_object", path)

    def delete_folder(self, folder: str) -> None:
        return

    def free_bytes(self, folder: str) -> int | None:
        return None

    def lock(self, path: str, holder: str) -> S3Lock:
        lease = float(os.environ.get("EVOMESH_S3_LEASE", LEASE_SECONDS))
        # An unknown bucket or key is best refused by a listing.
        self.list(path.rpartition("/")[0])
        return S3Lock(self, path, holder, lease=lease)


def _repeatable_answer(response: dict[str, Any], operation: str, place: str) -> str:
    """Return the reason of an answer that asks for another try; raise what any other one means."""
    error = response.get("Error", {})
    metadata = response.get("ResponseMetadata", {})
    code = str(error.get("Code", ""))
    status = int(metadata.get("HTTPStatusCode", 0))
    shown_code = code or "error"
    reason = f"{operation}: {shown_code} (HTTP {status})"
    # 501, not implemented, is the one answer of a server at fault that stays the same.
    is_fault = status >= 500 and status != 501
    may_change = is_fault or code in REPEATABLE
    if not may_change or code in MISSING or code in EXISTS:
        _raise_refusal(reason, operation, place, code, status)
    return reason


def _raise_refusal(
    reason: str,
    operation: str,
    place: str,
    code: str,
    status: int,
) -> NoReturn:
    # The store's answers as the errors of local files, so that callers know one kind.
    if code in MISSING:
        raise FileNotFoundError(errno.ENOENT, "no such object", place) from None
    if code in EXISTS:
        raise FileExistsError(errno.EEXIST, "the object exists", place) from None
    refusal = f"the store refuses: {reason}"
    is_read = operation in ("get_object", "head_object")
    if is_read and code in UNREADABLE:
        raise PermissionError(errno.EACCES, refusal, place) from None
    is_unknown_condition = code == "NotImplemented" or status == 501
    kind = ConditionUnknownError if is_unknown_condition else StorageError
    advice = ADVICE.get(code, "")
    raise kind(refusal, where=place, fix=advice) from None


def _repeatable_failure(error: Exception, operation: str, place: str) -> str:
    """Return the reason of a request without an answer, unless credentials are missing."""
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        raise StorageError(
            "no credentials for the object store",
            where=place,
            fix="set S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY_ID",
            exit_code=EXIT_USER_ERROR,
        ) from None
    return f"{operation}: {error}"


def _body(answer: dict[str, Any]) -> bytes:
    """Return the content of an answer.

    Raises:
        EOFError: the connection ended before.
    """
    data: bytes = answer["Body"].read()
    if len(data) != answer["ContentLength"]:
        raise EOFError(
            f"{len(data)} bytes came, {answer['ContentLength']} were announced"
        )
    return data


class S3Writer:
    """A multipart upload; a small file is put in one request."""

    def __init__(self, storage: S3Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[Future[str]] = []
        self._size = 0
        # Bounds the copies of parts in memory.
        self._free_parts = threading.Semaphore(IN_FLIGHT)

    def write(self, data: memoryview | bytes) -> None:
        self._size += len(data)
        self._buffer += data
        while len(self._buffer) >= PART:
            self._send(bytes(self._buffer[:PART]))
            del self._buffer[:PART]

    def _send(self, part: bytes) -> None:
        if self._upload is None:
            self._upload = self._storage.call("create_multipart_upload", self._key)[
                "UploadId"
            ]
        number = len(self._parts) + 1
        self._free_parts.acquire()

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
                self._free_parts.release()

        self._parts.append(self._storage.pool.submit(send))

    def finish(self) -> None:
        if self._upload is None:
            self._storage.put(self._key, bytes(self._buffer))
        else:
            if self._buffer:
                self._send(bytes(self._buffer))
            tags = [
                {"PartNumber": i + 1, "ETag": part.result()}
                for i, part in enumerate(self._parts)
            ]
            try:
                self._storage.call(
                    "complete_multipart_upload",
                    self._key,
                    UploadId=self._upload,
                    MultipartUpload={"Parts": tags},
                )
            except StorageError:
                # A lost answer to a completion that took place looks like an unknown
                # upload when asked again.
                if not self._storage.exists(self._key):
                    raise
        self._upload, self._buffer = None, bytearray()
        actual = self._storage.size(self._key)
        if actual != self._size:
            raise StorageError(
                f"the store has {actual} bytes, {self._size} were sent", where=self._key
            )

    def abort(self) -> None:
        if self._upload is not None:
            upload, self._upload = self._upload, None
            try:
                for part in self._parts:
                    if not part.cancel():
                        # A part that arrives after the abort would stay in the bucket.
                        wait([part])
                self._storage.call("abort_multipart_upload", self._key, UploadId=upload)
            except (StorageError, OSError) as error:
                logger.warning(
                    "%s: an unfinished upload may be left in the bucket: %s",
                    self._key,
                    error,
                )


class S3Reader:
    """Reads ranges; what ``expect`` announced is fetched ahead in merged blocks."""

    def __init__(self, storage: S3Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._blocks: list[tuple[int, int]] = []
        self._ahead: dict[int, Future[bytes]] = {}

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        self._blocks = list(merge(ranges))

    def read_into(self, start: int, buffer: memoryview) -> None:
        stop = start + len(buffer)
        for number, (first, last) in enumerate(self._blocks):
            is_inside = first <= start and stop <= last
            if is_inside:
                data = self._block(number)
                begin = start - first
                buffer[:] = data[begin : begin + len(buffer)]
                return
        # Not announced by `expect`: read alone.
        buffer[:] = self._storage.read(self._key, start, len(buffer))

    def _block(self, number: int) -> bytes:
        """Return a block, and have the next ones read in the background."""
        done = [earlier for earlier in self._ahead if earlier < number]
        for earlier in done:
            del self._ahead[earlier]  # reads come in file order
        stop = min(number + IN_FLIGHT, len(self._blocks))
        for ahead in range(number, stop):
            if ahead in self._ahead:
                continue
            first, last = self._blocks[ahead]
            self._ahead[ahead] = self._storage.pool.submit(
                self._storage.read,
                self._key,
                first,
                last - first,
            )
        return self._ahead[number].result()

    def close(self) -> None:
        self._ahead.clear()


def merge(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) ranges in order, adjacent ones joined up to ``PART`` bytes."""
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


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def open_s3(scheme: str, rest: str) -> tuple[S3Storage, str]:
    """Return the storage and the key that a URL means."""
    address = parse(scheme, rest)
    return S3Storage(make_client(address.endpoint), address.bucket), join(
        address.key or "/"
    ).strip("/")
