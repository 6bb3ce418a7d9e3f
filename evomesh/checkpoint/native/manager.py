"""Saves and loads the state of a run, on one process or many."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from torch import Tensor

from evomesh.checkpoint.native import find, read, write
from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.disk_space import check_space
from evomesh.checkpoint.native.find import Candidate, Checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.plan import LocalTensor, SavePlan, WriteItem, describe, make_plan, signature
from evomesh.checkpoint.native.retention import Retention
from evomesh.checkpoint.native.staging import StagingBuffers
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange, default_exchange
from evomesh.parallel.grid import Grid
from evomesh.storage.base import Storage, StorageError, StorageLock, join
from evomesh.storage.staged import staged
from evomesh.storage.urls import open_storage

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class CheckpointManager:
    """All checkpoints of one save folder.

    Every rank makes one with the same arguments and calls every method in the same order.

    Args:
        root: save folder as the user typed it (``llm_ckpts``, ``local:llm_ckpts``).
        snapshots: folder of the snapshots, by default ``{root}/snapshot``; it keeps the two newest.
        grid: where this rank stands; with each tensor's ``ShardSpec`` it says which box of a global tensor is here.
        exchange: how the ranks agree; by default over all ranks of the job.
        keep_last, keep_every: retention, see ``retention.py``; None keeps everything.
        upload_folder: local folder in which files for an object store are made first (``async_upload_tmp_folder``).
        busy: what a save does while the one before is still being written.
        max_failed_saves: saves in a row that the store may refuse before ``save`` raises.
        report: where one-line messages go (of rank 0).
    """

    def __init__(
        self,
        root: str,
        *,
        snapshots: str | None = None,
        grid: Grid | None = None,
        exchange: Exchange | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        upload_folder: str | None = None,
        busy: Literal["wait", "skip"] = "wait",
        max_failed_saves: int = 3,
        report: Callable[[str], None] = logger.info,
    ) -> None:
        self.storage, self.root = open_storage(root)
        self.snapshot_storage, self.snapshots = open_storage(snapshots or join(root, find.SNAPSHOTS))
        self.grid = grid or Grid()
        self.exchange = exchange or default_exchange()
        if upload_folder is not None:
            own = f"{fmt.sha256(root.encode())[:8]}-rank{self.exchange.rank}"
            self.storage = staged(self.storage, upload_folder, own)
            self.snapshot_storage = staged(self.snapshot_storage, upload_folder, f"{own}-snapshot")
        self._behind = self.exchange.twin()  # for the writer thread
        self._busy, self._max_failed_saves, self._failed_saves = busy, max_failed_saves, 0
        self._report = report if self.exchange.rank == 0 else logger.debug
        self._retention = Retention(keep_last, keep_every)
        self._snapshot_retention = Retention(keep_last=2)
        self._staging = StagingBuffers()
        self._writer: ThreadPoolExecutor | None = None
        self._running: Future[str] | None = None
        self._lock: StorageLock | None = None
        self._plan: tuple[str, SavePlan] | None = None
        self._parent: dict[str, Any] | None = None  # step and attempt of the last one loaded or committed
        self._committed: dict[tuple[int, bool], str] = {}  # (step, snapshot) -> folder, of this process

    def claim(self) -> None:
        """Makes this job the one writer of the folder, until ``close`` or its end; ``save`` does it if need be.

        Raises:
            UserError: another live job holds the folder, it cannot be written, or not all ranks see it.
        """
        if self._lock is not None:
            return
        probe = self.exchange.broadcast(f".probe-{secrets.token_hex(4)}" if self.exchange.rank == 0 else None)
        self._everywhere(lambda: self._lock_folder(probe))
        self._everywhere(lambda: self._see(probe))
        if self.exchange.rank == 0:
            with contextlib.suppress(OSError):  # an empty file left over does no harm
                self.storage.delete(join(self.root, probe))

    def _lock_folder(self, probe: str) -> None:
        if self.exchange.rank:
            return
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            self._lock = self.storage.lock(join(self.root, ".writer"), holder)
            self.storage.create(join(self.root, probe)).finish()
        except OSError as error:
            self.close()
            raise write.refusal(error, self.root) from None

    def _see(self, probe: str) -> None:
        if not self.storage.exists(join(self.root, probe)):
            raise CheckpointError(
                f"rank {self.exchange.rank} on {socket.gethostname()} does not see what rank 0 writes",
                where=self.root,
                expected="one folder shared by all nodes",
                fix="use a shared file system or an object store as save_ckpt_folder",
            )
        self._lock = self._lock or _RemoteLock()

    def prepare(
        self, tensors: Mapping[str, Tensor], *, saves: int | None = None, blocking: bool = True
    ) -> None:
        """At start-up: refuses a bad layout, a busy folder and a disk too small before any step is trained.

        Args:
            tensors: as in ``save``.
            saves: how many the run will make, for the forecast of disk need.
            blocking: False: also makes the buffers of saves behind the training.
        """
        self.claim()
        local = describe(tensors, self.grid)
        plan = self._make_plan(local, make_plan(local, self.exchange))
        if not blocking:
            self._staging.prepare(plan.entries(local))
        self._everywhere(lambda: self._forecast(plan, saves))

    def _forecast(self, plan: SavePlan, saves: int | None) -> None:
        if self.exchange.rank == 0:
            held = sum(1 for c in self.candidates() if c.committed)
            line = check_space(
                self.storage, self.root, plan.total_bytes, held, saves, self._retention.keep_last
            )
            self._report(line)

    def _make_plan(self, local: Mapping[str, LocalTensor], plan: SavePlan) -> SavePlan:
        self._plan = signature(local), plan
        return plan

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        config: dict[str, Any],
        *,
        blocking: bool = True,
        snapshot: bool = False,
        final: bool = False,
    ) -> str | None:
        """Commits a checkpoint of ``step`` and returns its folder.

        Args:
            tensors: live tensors by global name; those of other ranks complete them.
            state: JSON values (NaN, infinities and bytes allowed) that do not depend on the layout.
            config: the resolved config without secrets.
            blocking: False: return when the tensors may change again; ``wait`` tells the rest.
            snapshot: into the snapshot folder.
            final: raise also the first refusal of the store.

        Returns:
            None when the store refused (disk full, ...) or a save in flight made this one skip: the reason is
            reported and training may go on.

        Raises:
            UserError: a second writer, or too many refusals in a row.
        """
        self.claim()
        if self._busy == "skip" and not final and self.exchange.broadcast(self.saving):
            self._report(f"step {step} not saved: the save before is still being written")
            return None
        self.wait()
        if (step, snapshot) in self._committed:
            self._report(
                f"step {step} is already committed in {self._committed[step, snapshot]}, not rewritten"
            )
            return self._committed[step, snapshot]
        local = describe(tensors, self.grid)
        storage, root = self._place(snapshot)
        try:
            order = self._order(step, storage, root, signature(local))
        except CheckpointError as error:
            self._refused(error, final)
            return None
        if order["replan"] or self._plan is None:
            self._make_plan(local, make_plan(local, self.exchange))
        assert self._plan is not None
        plan = self._plan[1]
        body = write.body(step, order["attempt"], state, config) | {
            "layout": self._layout(),
            "parent": self._parent,
            "snapshot": snapshot,
        }
        folder = join(root, order["folder"])
        self._start(blocking, plan, plan.entries(local), folder, body)
        return self.wait(final=final) if blocking else folder

    def _start(
        self, blocking: bool, plan: SavePlan, entries: list[WriteItem], folder: str, body: dict[str, Any]
    ) -> None:
        """Commits here and now, or copies what this rank owns and commits behind the training."""
        if blocking:
            self._running = Future()
            try:
                self._running.set_result(self._commit(plan, entries, folder, body))
            except CheckpointError as error:
                self._running.set_exception(error)
            return
        copies = self._staging.copy(entries)
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running = self._writer.submit(self._commit, plan, copies, folder, body)

    @property
    def saving(self) -> bool:
        """A save is still being written behind the training."""
        return self._running is not None and not self._running.done()

    def wait(self, *, final: bool = False) -> str | None:
        """Waits for the save in flight; its folder once committed, None if there is none or the store refused it.

        Raises:
            UserError: as ``save``.
        """
        if self._running is None:
            return None
        running, self._running = self._running, None
        try:
            folder = running.result()
        except CheckpointError as error:
            self._refused(error, final)
            return None
        self._failed_saves = 0
        return folder

    def _refused(self, error: CheckpointError, final: bool) -> None:
        self._failed_saves += 1
        if final or self._failed_saves >= self._max_failed_saves:
            raise error
        self._report(f"checkpoint not saved ({error.found}); training goes on")

    def close(self) -> None:
        """Waits for the save in flight and gives the folder back."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _place(self, snapshot: bool) -> tuple[Storage, str]:
        return (self.snapshot_storage, self.snapshots) if snapshot else (self.storage, self.root)

    def _order(self, step: int, storage: Storage, root: str, mine: str) -> dict[str, Any]:
        """What rank 0 decides for a save: attempt id, folder, whether any rank's tensors changed their layout."""
        changed = self.exchange.gather(self._plan is None or self._plan[0] != mine)
        order = None
        if changed is not None:
            attempt, folder = secrets.token_hex(4), fmt.folder_name(step)
            order = {"attempt": attempt, "folder": folder, "replan": any(changed)}
            try:
                if storage.exists(join(root, folder, fmt.COMMIT)):
                    order["folder"] = fmt.folder_name(
                        step, attempt
                    )  # a committed folder is never written again
            except (OSError, UserError) as error:
                order["error"] = write.refusal(error, root).found
        answer: dict[str, Any] = self.exchange.broadcast(order)
        if "error" in answer:
            raise CheckpointError(answer["error"], where=root)
        return answer

    def _commit(self, plan: SavePlan, entries: list[WriteItem], folder: str, body: dict[str, Any]) -> str:
        """All that may run behind the training."""
        snapshot, step = body["snapshot"], body["step"]
        storage, root = self._place(snapshot)
        write.attempt(storage, self._behind, root, folder, plan, entries, body)
        self._parent = {"step": step, "attempt": body["attempt"]}
        self._committed[step, snapshot] = folder
        self._report(f"{'snapshot' if snapshot else 'checkpoint'} of step {step} committed: {folder}")
        if self.exchange.rank == 0:
            retention = self._snapshot_retention if snapshot else self._retention
            retention.trust(folder)
            try:
                for dropped in retention.apply(storage, root):
                    self._report(f"deleted {dropped}")
            except OSError as error:
                self._report(f"deleting old checkpoints: {error}")
        return folder

    def _layout(self) -> dict[str, int]:
        grid = self.grid
        axes = {axis.name: axis.size for axis in (grid.tp, grid.wp, grid.pp, grid.dp, grid.zero)}
        return {"world": self.exchange.size, **axes}

    def candidates(self) -> list[Candidate]:
        """Step folders of the save folder and its snapshots, newest first, interrupted ones too."""
        normal = find.candidates(self.storage, self.root)
        return find.in_order(normal, find.candidates(self.snapshot_storage, self.snapshots))

    def newest(self, verify: bool = True) -> Checkpoint | None:
        """The newest checkpoint that verifies, None when there is none; reports what it skipped and why.

        Args:
            verify: read every byte and check its hash (the ranks share the files); else only records and file sizes.

        Raises:
            CheckpointError: there are checkpoints, and none verifies.
        """
        place = self._agree(lambda: find.CheckpointLookup(self.candidates()))
        return find.newest(place.choices, lambda choice: self._check(choice, verify), self._report)

    def resolve(self, path: str, verify: bool = True) -> Checkpoint:
        """The checkpoint that a path of the documents means: ``llm_ckpts``, ``llm_ckpts/49``, ``.../snapshot/1/``.

        Raises:
            CheckpointError: none there that verifies; says what lies beside it.
        """
        place = self._agree(lambda: find.locate(path))
        return find.choose(path, place, lambda choice: self._check(choice, verify), self._report)

    def _agree(self, look: Callable[[], find.CheckpointLookup]) -> find.CheckpointLookup:
        """Rank 0 looks; the others take its list, since a listing may differ between two moments."""
        place = look()
        rows = [[c.folder, c.step, c.committed] for c in place.choices]
        rows = self.exchange.broadcast(rows)
        stores = {c.folder: c.storage for c in place.choices}
        fallback = next(iter(stores.values()), self.storage)
        return find.CheckpointLookup(
            [Candidate(stores.get(f, fallback), f, s, c) for f, s, c in rows], place.problem, place.fix
        )

    def _check(self, choice: Candidate, data: bool) -> Checkpoint:
        """Verifies one candidate together: each rank reads its share of the files."""

        def mine() -> Checkpoint:
            found = find.open_checkpoint(choice.storage, choice.folder)
            found.index()
            if data:
                read.verify_data(found, self.exchange.rank, self.exchange.size)
            return found

        return self._everywhere(mine)

    def load(
        self, found: Checkpoint, tensors: Mapping[str, Tensor], *, strict: bool = True, cast: bool = False
    ) -> dict[str, Any]:
        """Fills the tensors in place, from whatever layout they were saved in, and returns the stored state.

        Args:
            tensors: live tensors by global name.
            strict: refuse a checkpoint with tensors that no rank wants.
            cast: convert from another dtype.

        Raises:
            CheckpointError: on every rank, for a name, shape, dtype or hash that does not fit; the tensors then hold
                a mixture and must be loaded again.
        """
        self.wait()
        local = describe(tensors, self.grid)
        names = self.exchange.gather(list(local))

        def fill() -> None:
            records = found.records()
            read.match(records, local, cast, found.folder)
            if strict and names is not None:
                read.refuse_unwanted(records, set().union(*names), found.folder)
            read.run(found, read.jobs_for(records, local))

        self._everywhere(fill)
        self._parent = {"step": found.step, "attempt": found.attempt}
        for snapshot, root in ((False, self.root), (True, self.snapshots)):
            if found.folder.rpartition("/")[0] == root:
                self._committed[found.step, snapshot] = found.folder
        return found.state

    def _everywhere(self, action: Callable[[], Result]) -> Result:
        """Runs the action on every rank; when one fails, all raise its error."""
        problem: list[Any] | None = None
        result: Result
        try:
            result = action()
        except UserError as error:
            problem = [error.found, error.where, error.expected, error.fix, isinstance(error, StorageError)]
        problems = self.exchange.gather(problem)
        first = next((p for p in problems if p), None) if problems is not None else None
        first = self.exchange.broadcast(first)
        if first:
            found, where, expected, fix, of_store = first
            # A store out of reach is no damage: it must not make a resume fall back to an older checkpoint.
            kind = StorageError if of_store else CheckpointError
            raise kind(found, where=where, expected=expected, fix=fix)
        return result


class _RemoteLock:
    """Rank 0 holds the lock."""

    def release(self) -> None:
        return
