"""The lock of a writer in an object store: holders that live, end, die, hang and come back; stores of every kind."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.errors import UserError
from evomesh.storage.base import LockTakenError, StorageError
from evomesh.storage.process_identity import ProcessIdentity
from evomesh.storage.s3 import S3Storage, make_client
from evomesh.storage.s3_lock import (
    ConditionUnknownError,
    LockLostError,
    LockRecord,
    S3Lock,
)
from tests.support.interpreter import Interpreter

from .test_storage import BUCKET, endpoint, keys  # noqa: F401

# A lease that is not renewed while a test runs: its holder might as well hang.
NEVER = 1e9
SOON = 0.2  # a waiting job gives up on the holder
LONG = 10.0  # a waiting job surely sees a renewal of a living holder; it looks every third of a second
QUICK = 0.1  # renewed every 17 ms

ELSEWHERE = ProcessIdentity("another machine", 7, 1)
THIRD = ProcessIdentity("a third machine", 7, 1)


class Objects:
    """A store in memory.

    Args:
        obeys: which conditions it knows; it ignores others in silence.
        quoted: compare ``IfMatch`` with the quotes that an ETag has, or without them as Ceph's gateway does.
        refuses: answer that conditions are not implemented.
    """

    def __init__(
        self,
        obeys: tuple[str, ...] = ("IfNoneMatch", "IfMatch"),
        quoted: bool = True,
        refuses: bool = False,
    ) -> None:
        self.obeys, self.quoted, self.refuses = obeys, quoted, refuses
        self.content: dict[str, tuple[bytes, str]] = {}
        self.puts = 0
        self.lose_answers = 0
        self.down = False
        self._turn = threading.Lock()

    def name_of(self, path: str) -> str:
        return f"memory://{path}"

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        if self.down:
            raise StorageError("gave up")
        if path not in self.content:
            raise FileNotFoundError(2, "no such object", path)
        return self.content[path]

    def put(self, path: str, data: bytes, **conditions: str) -> str:
        with self._turn:
            if self.down:
                raise StorageError("gave up")
            if conditions and self.refuses:
                raise ConditionUnknownError(
                    "put_object: NotImplemented (HTTP 501)", where=path
                )
            self._check(
                path,
                {
                    name: value
                    for name, value in conditions.items()
                    if name in self.obeys
                },
            )
            self.puts += 1
            self.content[path] = (data, f'"tag{self.puts}"')
            tag = self.content[path][1]
        # The client asks again, and its condition no longer holds.
        if self.lose_answers:
            self.lose_answers -= 1
            return self.put(path, data, **conditions)
        return tag

    def _check(self, path: str, conditions: dict[str, str]) -> None:
        current = self.content.get(path, (b"", ""))[1]
        if "IfNoneMatch" in conditions and current:
            raise FileExistsError(17, "exists", path)
        wanted = conditions.get("IfMatch")
        if wanted is not None and not current:
            raise FileNotFoundError(2, "no such object", path)
        if wanted is not None and wanted != (
            current if self.quoted else current.strip('"')
        ):
            raise FileExistsError(17, "changed", path)

    def record(self) -> LockRecord:
        return LockRecord.from_bytes(self.content["k"][0])


STORES: dict[str, Any] = {
    "conditional": Objects,
    "etag without quotes": functools.partial(Objects, quoted=False),
    "conditions not implemented": functools.partial(Objects, refuses=True),
    "conditions ignored": functools.partial(Objects, obeys=()),
    "If-Match ignored": functools.partial(Objects, obeys=("IfNoneMatch",)),
}
ALL_STORES = pytest.mark.parametrize("store", STORES)


@pytest.fixture(autouse=True)
def brief_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomesh.storage.s3_lock.SETTLE_SECONDS", 0.05)


def hung(
    objects: Any, process: ProcessIdentity = ELSEWHERE, holder: str = "job one"
) -> S3Lock:
    """A lock of another machine that is not renewed."""
    return S3Lock(objects, "k", holder, lease=NEVER, process=process)


@ALL_STORES
def test_a_second_job_is_refused_while_the_holder_lives(store: str) -> None:
    objects = STORES[store]()
    holder = S3Lock(objects, "k", "job one on host a", lease=QUICK, process=ELSEWHERE)
    with pytest.raises(
        LockTakenError,
        match=r"memory://k: another live job writes here: job one on host a(.|\n)*fix",
    ):
        S3Lock(objects, "k", "job two", lease=LONG)
    holder.check()
    holder.release()


@ALL_STORES
def test_a_released_lock_is_free_at_once(store: str) -> None:
    objects = STORES[store]()
    hung(objects).release()
    second = S3Lock(objects, "k", "job two", lease=NEVER)
    assert objects.record().holder == "job two"
    second.check()


@ALL_STORES
def test_the_lock_of_a_dead_or_hanging_holder_is_taken_over_and_the_holder_is_fenced_off(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    objects = STORES[store]()
    first = hung(objects)
    second = S3Lock(objects, "k", "job two on host b", lease=SOON)
    assert "held by job one" in caplog.text and "taking over" in caplog.text
    second.check()
    for _ in range(2):  # comes back, and is refused permanently
        with pytest.raises(
            LockLostError, match="another one writes here now: job two on host b"
        ):
            first.check()
    second.release()
    with pytest.raises(LockLostError):
        first.check()
    first.release()
    # A fenced job does not touch the lock.
    assert objects.record().process == second._process


def test_a_holder_that_hung_while_nobody_came_continues() -> None:
    objects = Objects()
    lock = hung(objects)
    for _ in range(3):
        lock.check()
    assert objects.record().holder == "job one"


def test_of_two_waiting_jobs_one_gets_the_lock() -> None:
    objects = Objects()
    hung(objects)
    outcomes: list[str] = []

    def compete(process: ProcessIdentity) -> None:
        try:
            S3Lock(objects, "k", process.machine, lease=SOON, process=process).check()
            outcomes.append("held")
        except LockTakenError:
            outcomes.append("refused")

    threads = [
        threading.Thread(target=compete, args=[process])
        for process in (THIRD, ProcessIdentity("d", 1, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused"]


def test_clocks_of_machines_are_never_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record holds no time, and the wall clock is not read."""
    for name in ("time", "time_ns"):
        monkeypatch.setattr(
            f"time.{name}", lambda: pytest.fail("the wall clock was read")
        )
    objects = Objects()
    hung(objects).check()
    fields = {"holder", "process", "renewal"}
    assert set(LockRecord.__dataclass_fields__) == fields
    monkeypatch.undo()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_write_whose_answer_is_lost_is_recognized(lost: int) -> None:
    objects = Objects()
    objects.lose_answers = lost
    lock = hung(objects)
    objects.lose_answers = 1
    lock.check()
    lock.check()


def test_a_lock_object_that_was_deleted_by_hand_is_made_again() -> None:
    objects = Objects()
    lock = hung(objects)
    del objects.content["k"]
    lock.check()
    assert objects.record().process == ELSEWHERE
    del objects.content["k"]
    S3Lock(objects, "k", "job two", lease=NEVER)
    with pytest.raises(LockLostError):
        lock.check()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"holder": "x"}',
        b"[" * 100_000,
        b"\xff",
        b'{"holder": 1, "process": {}}',
    ],
)
def test_a_lock_object_with_other_content_expires_like_any_other(
    content: bytes,
) -> None:
    objects = Objects()
    objects.content["k"] = (content, '"t"')
    S3Lock(objects, "k", "job two", lease=SOON).check()


def test_escape_codes_in_the_name_of_a_holder_are_not_printed() -> None:
    objects = Objects()
    holder = S3Lock(
        objects, "k", "\x1b[2J\nerror: fake", lease=QUICK, process=ELSEWHERE
    )
    with pytest.raises(LockTakenError) as caught:
        S3Lock(objects, "k", "job two", lease=LONG)
    assert r"\x1b[2J\nerror: fake" in str(caught.value)
    holder.release()


def test_an_outage_loses_no_lock(caplog: pytest.LogCaptureFixture) -> None:
    objects = Objects()
    lock = hung(objects)
    objects.down = True
    with pytest.raises(StorageError, match="gave up"):
        lock.check()
    objects.down = False
    lock.check()
    objects.down = True
    lock.release()  # must not fail either
    assert "was not released" in caplog.text


@pytest.mark.parametrize(
    ("store", "warned"),
    [(store, store != "conditional" and "quotes" not in store) for store in STORES],
)
def test_a_store_without_conditional_writes_is_reported_once(
    store: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lock = hung(STORES[store]())
    lock.check()
    lock.check()
    texts = [text for text in caplog.messages if "no conditional writes" in text]
    assert len(texts) == (1 if warned else 0)


# ------------------------------------------------------------------------------------------------ whole processes


@pytest.mark.slow
def test_which_process_has_ended() -> None:
    here = ProcessIdentity.of_this_process()
    assert not here.has_ended(here)
    # The number is used again.
    assert ProcessIdentity(here.machine, here.pid, here.started + 1).has_ended(here)
    assert not ProcessIdentity("elsewhere", 999_999_999, 1).has_ended(here)
    assert ProcessIdentity(here.machine, 999_999_999, 1).has_ended(here)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, and not collected
    assert ProcessIdentity(here.machine, child, here.started).has_ended(here)
    os.waitpid(child, 0)


MOTO_KEYS = {"S3_ACCESS_KEY_ID": "k", "S3_SECRET_ACCESS_KEY_ID": "s"}


def hold_and_save(url: str, lease: float) -> None:
    """Take the lock, and save step 5 after a SIGUSR1."""
    os.environ["EVOMESH_S3_LEASE"] = str(lease)
    received: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    writer = CheckpointWriter(url)
    writer.claim()
    print(f"holding as {os.getpid()}", flush=True)
    # Not ``signal.pause``: the system may hand the signal to the thread that renews
    # the lock. Not an Event: its lock may be held where the handler interrupts.
    while not received:
        time.sleep(0.05)
    save_with(writer, 5)


def save_once(url: str, step: int, lease: float) -> None:
    os.environ["EVOMESH_S3_LEASE"] = str(lease)
    save_with(CheckpointWriter(url), step)


def save_with(writer: CheckpointWriter, step: int) -> None:
    try:
        print(
            "saved",
            writer.save(step, {"w": torch.ones(3)}, {}, {}, final=True),
            flush=True,
        )
        writer.close()
    except UserError as error:
        print(f"refused: {error}", flush=True)


def check_two_jobs(url: str, interpreter: Interpreter, keys: dict[str, str]) -> None:  # noqa: F811
    """Two jobs on one folder: the holder lives, hangs, comes back; another holder is killed."""
    # A living holder.
    holder = interpreter.start(functools.partial(hold_and_save, url, QUICK), env=keys)
    holder.wait_for("holding")
    text = interpreter.run(functools.partial(save_once, url, 3, LONG), env=keys).stdout
    assert (
        f"another live job writes here: process {holder.pid} on" in text
        and "save_ckpt_folder" in text
    )

    # A holder that hangs loses the lock, and its save is refused when it comes back.
    holder.signal(signal.SIGSTOP)
    assert (
        "saved"
        in interpreter.run(functools.partial(save_once, url, 4, SOON), env=keys).stdout
    )
    holder.signal(signal.SIGCONT)
    holder.signal(signal.SIGUSR1)
    assert "another one writes here now" in holder.wait().stdout
    found = CheckpointReader().resolve(url)
    assert found.step == 4 and found.storage.list(found.folder.rpartition("/")[0]) == [
        ".writer",
        "step-00000004/",
    ]

    # A killed one is noticed at once on its machine, whatever its lease.
    killed = interpreter.start(functools.partial(hold_and_save, url, NEVER), env=keys)
    killed.wait_for("holding")
    killed.kill()
    assert (
        "saved"
        in interpreter.run(functools.partial(save_once, url, 6, NEVER), env=keys).stdout
    )


def test_two_jobs_on_one_folder(endpoint: str, tmp_path: Path) -> None:  # noqa: F811
    interpreter = Interpreter()
    try:
        check_two_jobs(
            f"boto3:s3://{BUCKET}.{endpoint}/jobs/{tmp_path.name}",
            interpreter,
            MOTO_KEYS,
        )
    finally:
        interpreter.close()


def test_a_lock_over_http(endpoint: str, tmp_path: Path) -> None:  # noqa: F811
    storage = S3Storage(make_client(f"http://{endpoint}"), BUCKET)
    first = S3Lock(
        storage, f"{tmp_path.name}/.writer", "job one", lease=NEVER, process=ELSEWHERE
    )
    second = S3Lock(storage, f"{tmp_path.name}/.writer", "job two", lease=SOON)
    with pytest.raises(LockLostError, match="job two"):
        first.check()
    second.release()
