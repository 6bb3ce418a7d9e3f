"""A lock in an object store: one object that its holder rewrites again and again.

The holder puts the object with ``If-None-Match: *`` and renews it in the background
with ``If-Match: ETAG``, so that of two writers the store itself lets only one through.
Each renewal changes the ETag. Whoever finds the object waits:

    ETag changes                          the holder lives: refused, with the name it left
    ETag stays for the time of a lease    the holder died or hangs: the lock is taken over with If-Match
    holder is a dead process of this      the same, at once
      machine, or has released the lock

Nobody compares the clocks of two machines: the waiting one measures how long *it* saw
no change. A holder that hung and comes back finds another ETag; from then on ``check``
refuses, and with it every commit of that job.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass
from typing import Protocol

from evomesh.errors import UserError, printable
from evomesh.storage.base import LockTakenError, StorageError
from evomesh.storage.process_identity import ProcessIdentity

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0  # without a change after which a holder counts as dead
RENEWALS = 6  # in that time
POLLS = 30  # looks of a waiting job in that time
SETTLE_SECONDS = 2.0  # before a store without conditional writes is read back
NO_SUCH_TAG = '"00000000000000000000000000000000"'
UNNAMED = "(it left no name)"
# What a record that somebody else wrote raises when it is parsed.
MALFORMED = (ValueError, KeyError, TypeError, RecursionError)


class TaggedObjects(Protocol):
    """Small objects of a store and the tag that each write gives them."""

    def name_of(self, path: str) -> str:
        """Return the path with its bucket, for messages."""

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        """Return content and ETag.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def put(self, path: str, data: bytes, **conditions: str) -> str:
        """Write an object and return its ETag.

        Raises:
            FileExistsError, FileNotFoundError: a condition does not hold.
            ConditionUnknownError: the store has no such condition.
        """


@dataclass(frozen=True)
class LockRecord:
    """The content of the lock object.

    Attributes:
        holder: name for people; "" after a release.
        process: of the holder.
        renewal: counts, so that every write changes the ETag.
    """

    holder: str
    process: ProcessIdentity
    renewal: int = 0

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> LockRecord:
        """Parse the object.

        One that says nothing useful has a holder without a name, of an unknown process.
        """
        try:
            value = json.loads(data)
            process = ProcessIdentity.from_json(value["process"])
            # It comes from the store and is shown in messages: without control
            # characters, and not endless.
            holder = printable(str(value["holder"]), keep="")
            renewal = int(value["renewal"])
        except MALFORMED:
            unknown = ProcessIdentity("", 0, 0)
            return LockRecord(UNNAMED, unknown)
        return LockRecord(holder[:200], process, renewal)


class ConditionUnknownError(StorageError):
    """The store does not implement the condition of a write."""


class LockLostError(StorageError):
    """The lease ran out while this job hung, and another job writes now."""

    def __init__(self, path: str, holder: str) -> None:
        super().__init__(
            f"this job hung or was disconnected for longer than its lease, and another one writes here now: {holder}",
            where=path,
            expected="one writer at a time",
            fix="let that job train and end this one, or give this one another save_ckpt_folder",
            code="EVO-CKPT-011",
        )


class S3Lock:
    """The lock of one writer, renewed on a thread until ``release`` or the end of the process.

    Args:
        objects: where the lock object is.
        path: of the lock object.
        holder: left in it for people to read.
        lease: seconds without a renewal after which the lock is free.
        process: that holds it, by default this one. As with locks on a disk, a process
            may take its own lock again.

    Raises:
        LockTakenError: a living job holds it.
        StorageError: the store fails.
    """

    def __init__(
        self,
        objects: TaggedObjects,
        path: str,
        holder: str,
        *,
        lease: float = LEASE_SECONDS,
        process: ProcessIdentity | None = None,
    ) -> None:
        self._objects = objects
        self._path = path
        self._name = objects.name_of(path)
        self._lease = lease
        self._process = process or ProcessIdentity.of_this_process()
        self._holder = holder
        self._renewal = 0
        self._tag = ""
        self._conditional = True
        # Ceph's gateway compares If-Match without the quotes that its ETags have.
        self._quoted = True
        self._lost: LockLostError | None = None
        self._turn = threading.Lock()  # one renewal at a time
        self._ended = threading.Event()
        self._acquire()
        self._check_conditions()
        self._thread = threading.Thread(
            target=self._renew_until_released, name="s3-lock", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Renew the lease now; what happens right after this call is still under the lock.

        Raises:
            LockLostError: another job took the lock over.
            StorageError: the store fails.
        """
        with self._turn:
            self._renew()

    def release(self) -> None:
        """Let the next writer start at once.

        The object stays, with a record that names no holder.
        """
        self._ended.set()
        # A renewal that waits for a store which is down must not keep the run from
        # ending.
        if not self._turn.acquire(timeout=self._lease / RENEWALS):
            logger.warning(
                "%s was not released; it expires in %.0f s", self._name, self._lease
            )
            return
        try:
            if self._lost is None:
                self._holder = ""
                self._replace(self._tag)
        except (OSError, UserError) as error:
            logger.warning(
                "%s was not released; it expires in %.0f s: %s",
                self._name,
                self._lease,
                error,
            )
        finally:
            self._turn.release()

    # -------------------------------------------------------------------------------------------------- acquire

    def _acquire(self) -> None:
        while not self._create():
            try:
                data, tag = self._objects.read_tagged(self._path)
            except FileNotFoundError:
                continue
            record = LockRecord.from_bytes(data)
            free = self._is_free(record) or self._stays_unchanged(record, tag)
            if free and self._replace(tag):
                return

    def _create(self) -> bool:
        """Put the object if there is none; return whether that made this process the holder."""
        try:
            self._objects.read_tagged(self._path)
        except FileNotFoundError:
            return self._put_first()
        return False

    def _put_first(self) -> bool:
        try:
            self._tag = self._put(IfNoneMatch="*")
        except FileExistsError:
            return self._was_written()
        except ConditionUnknownError:
            self._drop_conditions()
            return self._replace("")
        return True

    def _is_free(self, record: LockRecord) -> bool:
        """Return whether nobody holds the lock.

        It was released, is this process's own, or is of a process that is known to be
        gone.
        """
        return (
            not record.holder
            or record.process == self._process
            or record.process.has_ended(self._process)
        )

    def _stays_unchanged(self, record: LockRecord, tag: str) -> bool:
        """Wait for a change; return whether there was none for a whole lease.

        Raises:
            LockTakenError: the holder renewed the lock.
        """
        logger.warning(
            "%s is held by %s; waiting up to %.0f s to see whether that job is alive",
            self._name,
            record.holder,
            self._lease,
        )
        deadline = _now() + self._lease
        while _now() < deadline:
            self._ended.wait(self._lease / POLLS)
            try:
                data, current = self._objects.read_tagged(self._path)
            except FileNotFoundError:
                return False
            if current != tag:
                latest = LockRecord.from_bytes(data)
                if self._is_free(latest):
                    return False  # ``_acquire`` looks again
                raise LockTakenError(self._name, latest.holder)
        logger.warning(
            "%s: no sign of life from %s: taking over", self._name, record.holder
        )
        return True

    # ---------------------------------------------------------------------------------------------------- renew

    def _renew_until_released(self) -> None:
        while not self._ended.wait(self._lease / RENEWALS):
            try:
                with self._turn:
                    self._renew()
            except LockLostError as error:
                logger.error("%s", error)
                return
            except (OSError, UserError) as error:
                # The lease still runs; if it runs out meanwhile, the next renewal finds
                # out.
                logger.warning("%s was not renewed: %s", self._name, error)

    def _renew(self) -> None:
        if self._lost is None and not self._replace(self._tag):
            self._adopt_or_lose()
        if self._lost is not None:
            raise self._lost

    def _adopt_or_lose(self) -> None:
        """Find out who changed the object: this process or another one.

        It was this one if the answer to a renewal was lost.
        """
        try:
            data, tag = self._objects.read_tagged(self._path)
        except FileNotFoundError:
            if not self._create():  # deleted by hand
                self._adopt_or_lose()
            return
        record = LockRecord.from_bytes(data)
        if record.process == self._process:
            self._tag = tag
        else:
            self._lost = LockLostError(
                self._name, record.holder or "a job that has ended since"
            )

    def _replace(self, tag: str) -> bool:
        """Write the object if it still has ``tag``; return whether it had.

        Raises:
            StorageError: the store fails.
        """
        if not self._conditional:
            return self._replace_unconditionally(tag)
        try:
            self._tag = self._put(IfMatch=tag if self._quoted else tag.strip('"'))
        except (FileExistsError, FileNotFoundError):
            return self._was_written() or self._replace_in_other_form(tag)
        except ConditionUnknownError:
            self._drop_conditions()
            return self._replace_unconditionally(tag)
        return True

    def _was_written(self) -> bool:
        """Return whether a write that the store refused took place after all."""
        # Its answer was lost, it was sent again, and the second try met the object of the
        # first: refused, but by this process's own record.
        try:
            data, tag = self._objects.read_tagged(self._path)
        except FileNotFoundError:
            return False
        record = LockRecord.from_bytes(data)
        if (record.process, record.renewal) != (self._process, self._renewal):
            return False
        self._tag = tag
        return True

    def _replace_in_other_form(self, tag: str) -> bool:
        """Try again if nobody changed the object.

        Then the store wants its ETag without quotes, or cannot compare.
        """
        try:
            _, current = self._objects.read_tagged(self._path)
        except FileNotFoundError:
            return False
        if current != tag:
            return False
        if self._quoted:
            self._quoted = False
        else:
            self._drop_conditions()
        return self._replace(tag)

    def _replace_unconditionally(self, tag: str) -> bool:
        """Write as safely as a store without conditions allows.

        Look, write, wait, and look whether it is still there.
        """
        try:
            if self._objects.read_tagged(self._path)[1] != tag:
                return False
        except FileNotFoundError:
            if tag:
                return False
        # Two jobs may both have found no object. Both write, and of the two objects the
        # later one stays; after a wait longer than a write takes, each sees whose it is.
        is_new = not self._tag
        written = self._put()
        if is_new:
            self._ended.wait(min(SETTLE_SECONDS, self._lease / RENEWALS))
            if self._objects.read_tagged(self._path)[1] != written:
                return False
        self._tag = written
        return True

    def _put(self, **conditions: str) -> str:
        self._renewal += 1
        record = LockRecord(self._holder, self._process, self._renewal)
        return self._objects.put(self._path, record.to_bytes(), **conditions)

    # ------------------------------------------------------------------------------- stores without conditions

    def _check_conditions(self) -> None:
        """Find out whether the store obeys conditions.

        Each of these two writes must be refused. Some stores accept the headers and
        ignore them.
        """
        conditions: list[dict[str, str]] = [
            {"IfNoneMatch": "*"},
            {"IfMatch": NO_SUCH_TAG},
        ]
        for condition in conditions if self._conditional else []:
            try:
                self._tag = self._put(**condition)
            except (FileExistsError, FileNotFoundError):
                continue
            except ConditionUnknownError:
                pass
            self._drop_conditions()
            return

    def _drop_conditions(self) -> None:
        self._conditional = False
        logger.warning(
            "%s: this store has no conditional writes; two jobs that start here within %.0f s of each other may both "
            "write, so start one at a time",
            self._name,
            SETTLE_SECONDS,
        )


def _now() -> float:
    """Return seconds of a clock that nobody sets.

    It also runs while the machine sleeps, where there is such a clock.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
