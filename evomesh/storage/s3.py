"""Objects in an S3 store, by boto3.

An object appears whole or not at all. The commit record is put with ``If-None-Match:
*``, so of two writers one wins. ``s3_client.py`` has the forms of a URL,
``s3_answers.py`` what a refusal means, ``s3_lock.py`` the lock of a writer.
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
from typing import Any, TypeVar

from evomesh.errors import EXIT_RESTART
from evomesh.storage.base import StorageError, join
from evomesh.storage.s3_answers import repeatable_answer, repeatable_failure
from evomesh.storage.s3_client import make_client, parse
from evomesh.storage.s3_lock import LEASE_SECONDS, ConditionUnknownError, S3Lock

logger = logging.getLogger(__name__)
T = TypeVar("T")

PART = 16 << 20  # bytes of a multipart upload's part, and most of one merged read
GAP = 4 << 10  # unwanted bytes that a merged read may fetch between two wanted ranges
IN_FLIGHT = 8  # parts or blocks that travel at the same time
ATTEMPTS = 6
LONGEST_PAUSE = 20.0  # seconds between two tries
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
        self._client = client
        self.bucket = bucket
        self._attempts = attempts
        self._wait = wait
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
        arguments["Bucket"] = self.bucket
        if key:
            arguments["Key"] = key

        def send() -> Any:
            method = getattr(self._client, operation)
            return method(**arguments)

        return self.repeat(operation, key, send)

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
                reason = repeatable_answer(error.response, operation, place)
            except (BotoCoreError, OSError, EOFError) as error:
                reason = repeatable_failure(error, operation, place)
            if attempt < self._attempts:
                # Twice as long after each failure: a store that is overloaded is not
                # helped by more requests.
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
            code="EVO-STORE-003",
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
        # The store compares and writes in one step. Looking first and writing after it
        # would let two jobs that look at the same moment both commit.
        try:
            self.put(path, data, IfNoneMatch="*")
        except ConditionUnknownError:
            # An old store without conditional writes: looking first is the best it allows.
            if self.exists(path):
                raise FileExistsError(errno.EEXIST, "the object exists", path) from None
            self.put(path, data)

    def sync(self, folder: str) -> None:
        return

    def open(self, path: str) -> S3Reader:
        return S3Reader(self, path)

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""  # a range of no bytes cannot be written: "0-" means all of them
        request = {"Bucket": self.bucket, "Key": path}
        span = _range_header(start, length)
        if span:
            request["Range"] = span

        def fetch() -> bytes:
            # The body is read inside of what is repeated: most connections that break do
            # so on the way, after the answer has begun.
            data = _body(self._client.get_object(**request))
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
                "list_objects_v2", "", Prefix=prefix, Delimiter="/", **position
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


def _range_header(start: int, length: int | None) -> str:
    """Return ``bytes=FIRST-LAST``, the last one included; "" for a whole object."""
    if length is not None:
        last = start + length - 1
        return f"bytes={start}-{last}"
    return f"bytes={start}-" if start else ""


class S3Writer:
    """A multipart upload; a small file is put in one request.

    An upload that is not completed is no object: a killed run leaves parts that no
    listing shows and no reader finds, which a lifecycle rule of the bucket can delete.
    """

    def __init__(self, storage: S3Storage, key: str) -> None:
        self._storage = storage
        self._key = key
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
            answer = self._storage.call("create_multipart_upload", self._key)
            self._upload = answer["UploadId"]
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
            tags = []
            for number, part in enumerate(self._parts, start=1):
                tags.append({"PartNumber": number, "ETag": part.result()})
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
        self._upload = None
        self._buffer = bytearray()
        actual = self._storage.size(self._key)
        if actual != self._size:
            raise StorageError(
                f"the store has {actual} bytes, {self._size} were sent",
                where=self._key,
                code="EVO-STORE-003",
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
    """Reads ranges; what ``expect`` announced is prefetched in merged blocks."""

    def __init__(self, storage: S3Storage, key: str) -> None:
        self._storage = storage
        self._key = key
        self._blocks: list[tuple[int, int]] = []
        self._ahead: dict[int, Future[bytes]] = {}

    def expect(self, ranges: list[tuple[int, int]]) -> None:
        self._blocks = list(merge(ranges))

    def read_into(self, start: int, buffer: memoryview) -> None:
        size = len(buffer)
        stop = start + size
        for number, (first, last) in enumerate(self._blocks):
            is_inside = first <= start and stop <= last
            if not is_inside:
                continue
            data = self._block(number)
            begin = start - first
            end = begin + size
            buffer[:] = data[begin:end]
            return
        # Not announced by `expect`: read alone.
        buffer[:] = self._storage.read(self._key, start, size)

    def _block(self, number: int) -> bytes:
        """Return a block, and have the next ones read in the background."""
        # Reads come in file order, so earlier blocks are done with. At most IN_FLIGHT
        # blocks of PART bytes are in memory, 128 MiB.
        done = [earlier for earlier in self._ahead if earlier < number]
        for earlier in done:
            del self._ahead[earlier]
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
    """Yield the (start, stop) ranges in order, adjacent ones joined up to ``PART`` bytes.

    0..100, 100..200 and 1,000,000..1,000,100 become 0..200 and the last one alone: a
    request takes longer to start than ``GAP`` bytes take to arrive.
    """
    if not ranges:
        return
    in_order = sorted(ranges)
    first, last = in_order[0]
    for start, stop in in_order[1:]:
        is_near = start <= last + GAP
        if is_near and stop - first <= PART:
            last = max(last, stop)
            continue
        yield first, last
        first = start
        last = stop
    yield first, last


def _md5(data: bytes) -> str:
    # The store compares it with what arrived: a part that was damaged on its way is
    # refused and sent again.
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def open_s3(scheme: str, rest: str) -> tuple[S3Storage, str]:
    """Return the storage and the key that a URL means."""
    address = parse(scheme, rest)
    storage = S3Storage(make_client(address.endpoint), address.bucket)
    key = join(address.key or "/")
    return storage, key.strip("/")
