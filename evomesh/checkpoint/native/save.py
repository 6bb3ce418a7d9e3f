"""Save the state of a run, on one process or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.agreement import (
    ErrorMessage,
    error_from_json,
    run_on_all_ranks,
)
from evomesh.checkpoint.native.claim import FolderClaim
from evomesh.checkpoint.native.commit import (
    choose_folder,
    commit_together,
    new_attempt,
    new_record,
    parent_folder,
)
from evomesh.checkpoint.native.disk_space import check_space
from evomesh.checkpoint.native.find import Checkpoint, SaveFolder
from evomesh.checkpoint.native.format import (
    CheckpointError,
    CommitRecord,
    ParentRecord,
)
from evomesh.checkpoint.native.listener import CommitListener, NoListener
from evomesh.checkpoint.native.plan import (
    LocalTensor,
    SavePlan,
    WriteItem,
    describe,
    layout_of,
    make_plan,
    signature,
)
from evomesh.checkpoint.native.retention import Retention
from evomesh.checkpoint.native.staging import StagingBuffers
from evomesh.checkpoint.native.store_errors import as_checkpoint_error
from evomesh.errors import UserError
from evomesh.monitor.log import ALL_RANKS
from evomesh.parallel.exchange import Exchange, SingleProcessExchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard
from evomesh.storage.base import Storage
from evomesh.storage.staged import staged

logger = logging.getLogger(__name__)
MAX_FAILED_SAVES = 3  # in a row that the store may refuse before a save raises
SNAPSHOTS_KEPT = 2


@dataclass(frozen=True)
class _SaveDecision:
    """Rank 0's decision before a save.

    Attributes:
        folder: step folder.
        replan: the tensors of some rank changed their layout, so the plan must be made
            again.
        error: why the store cannot be used, None if it can.
    """

    attempt: str
    folder: str
    replan: bool
    error: ErrorMessage | None = None

    @staticmethod
    def from_json(value: dict[str, Any]) -> _SaveDecision:
        error = error_from_json(value.pop("error"))
        return _SaveDecision(**value, error=error)


class _SaveJob(NamedTuple):
    """A save that is decided: what this rank writes, and into which step folder."""

    plan: SavePlan
    items: list[WriteItem]
    folder: str
    record: CommitRecord


class CheckpointWriter:
    """The one writer of a save folder.

    Every rank of ``exchange`` makes one with the same arguments and calls every method
    in the same order.

    Args:
        folder: save folder as the user typed it (``llm_ckpts``, ``local:llm_ckpts``), or
            an open one.
        grid: where this rank is; with a tensor's ``ShardSpec`` it determines which box of
            it is here.
        exchange: how the ranks agree; by default this process saves alone.
        keep_last, keep_every: see ``Retention``; None keeps everything.
        upload_folder: local folder in which files for an object store are written first
            (``async_upload_tmp_folder``).
        listener: hears of each checkpoint, but not of snapshots.
    """

    def __init__(
        self,
        folder: str | SaveFolder,
        *,
        grid: Grid | None = None,
        exchange: Exchange | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        upload_folder: str | None = None,
        listener: CommitListener | None = None,
    ) -> None:
        opened = SaveFolder.open(folder) if isinstance(folder, str) else folder
        self.root = opened.root
        self.snapshot_root = opened.snapshot_root
        self.storage = opened.storage
        self.snapshot_storage = opened.snapshot_storage
        self.grid = grid or Grid()
        self.exchange = exchange or SingleProcessExchange()
        if upload_folder is not None:
            name = f"{fmt.sha256(opened.root.encode())[:8]}-rank{self.exchange.rank}"
            self.storage = staged(self.storage, upload_folder, name)
            self.snapshot_storage = staged(
                self.snapshot_storage, upload_folder, f"{name}-snapshot"
            )
        self._listener = listener or NoListener()
        self._claim = FolderClaim(self.root, self.exchange)
        # For the thread that writes while training runs. In one group with the messages
        # of the main thread, each rank would send the two kinds in another order, and
        # collectives are matched by order alone.
        self._background_exchange = self.exchange.twin()
        self._retention = Retention(keep_last, keep_every)
        self._snapshot_retention = Retention(keep_last=SNAPSHOTS_KEPT)
        self._staging = StagingBuffers()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[str] | None = None
        self._failed_saves = 0
        # Signature of the layout that it was made for, plan.
        self._plan: tuple[str, SavePlan] | None = None
        # The last one loaded or committed.
        self._parent: ParentRecord | None = None
        self.on_refusal: Callable[[str], object] | None = None  # gets a sentence
        self.bytes_per_save = 0  # of the tensors, over all ranks
        # (step, snapshot) -> folder; of this process only.
        self.committed: dict[tuple[int, bool], str] = {}

    @property
    def folder(self) -> SaveFolder:
        """The save folder, for a reader."""
        return SaveFolder(
            self.storage, self.root, self.snapshot_storage, self.snapshot_root
        )

    def claim(self) -> None:
        """Make this job the one writer of the folder, until ``close`` or its end.

        ``save`` does it if need be.

        Raises:
            UserError: another running job holds the folder, it cannot be written, or not
                all ranks see it.
        """
        self._claim.take(self.storage)

    def prepare(
        self,
        tensors: Mapping[str, Tensor | LocalShard],
        *,
        saves: int | None = None,
        blocking: bool = True,
    ) -> None:
        """Refuse what would fail the first save, before any step is trained.

        That is a bad layout, a busy folder, or a disk that is too small.

        Args:
            tensors: as in ``save``.
            saves: how many the run will make, for the forecast of disk need.
            blocking: False: also allocate the staging buffers for saves in the background.
        """
        self.claim()
        local = describe(tensors, self.grid)
        plan = self._replan(local)
        if not blocking:
            self._staging.prepare(plan.items(local))
        run_on_all_ranks(self.exchange, lambda: self._forecast(plan, saves))

    def _forecast(self, plan: SavePlan, saves: int | None) -> None:
        """Log the forecast of disk need; rank 0 only."""
        if self.exchange.rank:
            return
        found = self.folder.candidates()
        forecast = check_space(
            self.storage,
            self.root,
            one=plan.total_bytes,
            held=sum(candidate.committed for candidate in found),
            saves=saves,
            keep_last=self._retention.keep_last,
        )
        self._report(forecast)

    def _current_plan(
        self, local: Mapping[str, LocalTensor], decision: _SaveDecision
    ) -> SavePlan:
        """Return the plan of the last save, or a new one if any rank needs one."""
        if self._plan is None or decision.replan:
            return self._replan(local)
        return self._plan[1]

    def _replan(self, local: Mapping[str, LocalTensor]) -> SavePlan:
        """Make a plan for this layout and remember it for the next saves."""
        plan = make_plan(local, self.exchange)
        self._plan = signature(local), plan
        self.bytes_per_save = plan.total_bytes
        return plan

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | LocalShard],
        state: dict[str, Any],
        config: dict[str, Any],
        *,
        blocking: bool = True,
        snapshot: bool = False,
        final: bool = False,
    ) -> str | None:
        """Commit a checkpoint of ``step`` and return its folder.

        Returns None if the store refused (disk full, ...), which is logged.

        Args:
            tensors: live tensors by global name; those of other ranks complete them.
            state, config: see ``new_record``; they must not depend on the layout.
            blocking: False: return once the tensors may change; see ``wait``.
            snapshot: into the snapshot folder.
            final: raise even the first refusal of the store.

        Raises:
            UserError: a second writer, or too many refusals in a row.
        """
        # 1. One save at a time, and one checkpoint of a step.
        self.claim()
        self.wait()
        earlier = self.committed.get((step, snapshot))
        if earlier is not None:
            self._report_earlier(step, earlier)
            return earlier

        # 2. Rank 0 names the attempt and its folder; a changed layout needs a new plan.
        local = describe(tensors, self.grid)
        try:
            decision = self._decide_attempt(step, snapshot, signature(local))
        except CheckpointError as error:
            self._on_failed_save(error, final)
            return None
        plan = self._current_plan(local, decision)

        # 3. The record, still without its files.
        record = new_record(
            step,
            decision.attempt,
            config=config,
            state=state,
            layout=layout_of(self.grid, self.exchange.size),
            parent=self._parent,
            snapshot=snapshot,
        )

        # 4. Write, index and commit: now, or in the background from a copy.
        job = _SaveJob(plan, plan.items(local), decision.folder, record)
        if blocking:
            self._run_now(job)
            return self.wait(final=final)
        copies = self._staging.copy(job.items)
        return self._run_in_background(job._replace(items=copies))

    def _report_earlier(self, step: int, folder: str) -> None:
        line = f"step {step} is already committed in {folder}, not rewritten"
        self._report(line, is_known_to_all=True)

    def _decide_attempt(
        self,
        step: int,
        snapshot: bool,
        layout: str,
    ) -> _SaveDecision:
        """Let rank 0 choose attempt and folder, and whether a new plan is needed.

        Args:
            layout: the signature of this rank's tensors.
        """
        # A new plan is a collective, so either all ranks make one or none does: a change
        # on one rank counts for all.
        is_changed = self._plan is None or self._plan[0] != layout
        changed = self.exchange.gather(is_changed)
        message = None
        if changed is not None:
            replan = any(changed)
            decision = self._new_attempt(step, snapshot, replan)
            message = asdict(decision)
        answer = self.exchange.broadcast(message)
        decision = _SaveDecision.from_json(dict(answer))
        error = decision.error
        if error is not None:
            _, root = self._target(snapshot)
            raise replace(error, where=root, expected="", of_store=False).to_error()
        return decision

    def _new_attempt(self, step: int, snapshot: bool, replan: bool) -> _SaveDecision:
        """Name an attempt and its folder; rank 0 only."""
        storage, root = self._target(snapshot)
        attempt = new_attempt()
        folder = ""
        message = None
        try:
            folder = choose_folder(storage, root, step, attempt)
        except (OSError, UserError) as error:
            failure = as_checkpoint_error(error, root)
            message = ErrorMessage.of(failure)
        return _SaveDecision(attempt, folder, replan, message)

    def _run_now(self, job: _SaveJob) -> None:
        # As a pending save that is over: ``wait`` treats a failure of both kinds alike.
        done: Future[str] = Future()
        try:
            committed = self._commit(job)
            done.set_result(committed)
        except CheckpointError as error:
            done.set_exception(error)
        self._pending = done

    def _run_in_background(self, job: _SaveJob) -> str:
        """Start a commit in the background and return the folder it writes to."""
        self._thread = self._thread or ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint"
        )
        self._pending = self._thread.submit(self._commit, job)
        return job.folder

    def _commit(self, job: _SaveJob) -> str:
        """Do the part of a save that can run in the background.

        Write, commit, delete old checkpoints.
        """
        folder = job.folder
        record = job.record
        exchange = self._background_exchange
        storage, _ = self._target(record.snapshot)
        commit_together(
            storage,
            exchange,
            folder,
            {exchange.rank: job.items},
            job.plan.tensors,
            record,
            before_publishing=self._claim.check,
        )
        self._parent = ParentRecord(record.step, record.attempt)
        self.committed[record.step, record.snapshot] = folder
        kind = "snapshot" if record.snapshot else "checkpoint"
        self._report(
            f"{kind} of step {record.step} committed: {folder}", is_known_to_all=True
        )
        # Only now, with the new one safe, may an old one be deleted.
        if exchange.rank == 0:
            if not record.snapshot:
                self._listener.committed(folder, record)
            self._delete_old(folder, record.snapshot)
        return folder

    def _delete_old(self, committed: str, snapshot: bool) -> None:
        """Apply retention after a commit; a failure to delete does not fail the save."""
        storage, root = self._target(snapshot)
        retention = self._snapshot_retention if snapshot else self._retention
        retention.trust(committed)
        in_use = self._listener.in_use()
        try:
            deleted = retention.apply(storage, root, committed, in_use)
        except (OSError, UserError) as error:
            self._report(f"old checkpoints were not deleted: {error}", logging.WARNING)
            return
        for folder in deleted:
            self._report(f"deleted {folder}")

    @property
    def saving(self) -> bool:
        """True while a save is being written in the background."""
        return self._pending is not None and not self._pending.done()

    def wait(self, *, final: bool = False) -> str | None:
        """Wait for the pending save and return its folder.

        None if there is none or the store refused it.

        Raises:
            UserError: as ``save``.
        """
        if self._pending is None:
            return None
        pending = self._pending
        self._pending = None
        try:
            folder = pending.result()
        except CheckpointError as error:
            self._on_failed_save(error, final)
            return None
        self._failed_saves = 0
        return folder

    def _on_failed_save(self, error: CheckpointError, final: bool) -> None:
        """Log the failure, or raise it if the save was final or too many failed in a row.

        Raises:
            CheckpointError: with the exit code of a restart if the store is down, of a
                user's mistake if it is full.
        """
        self._failed_saves += 1
        if self.on_refusal is not None:
            self.on_refusal(str(error))
        count = f"refusal {self._failed_saves} of {MAX_FAILED_SAVES} in a row"
        if self._failed_saves >= MAX_FAILED_SAVES:
            raise CheckpointError(
                f"the run ends because a checkpoint was refused, the third in a row: {error.found}",
                where=error.where,
                expected=error.expected,
                fix=error.fix
                or "repair the store, then run the same command again to resume",
                exit_code=error.exit_code,
                code="EVO-CKPT-021",
            )
        if final:
            raise error
        place = f"{error.where}: " if error.where else ""
        fix = f"; fix: {error.fix}" if error.fix else ""
        self._report(
            f"checkpoint not saved ({place}{error.found}){fix}; continuing to train ({count})",
            logging.WARNING,
            is_known_to_all=True,
        )

    def continue_from(
        self, checkpoint: Checkpoint, skipped: Iterable[str] = ()
    ) -> None:
        """Record what the run was resumed from, and the folders that were skipped as damaged.

        It is the parent of the next checkpoint, and its step is not saved again.
        """
        self._retention.distrust(skipped)
        self._snapshot_retention.distrust(skipped)
        step = checkpoint.step
        folder = checkpoint.folder
        self._parent = ParentRecord(step, checkpoint.attempt)
        parent = parent_folder(folder)
        for snapshot in (False, True):
            _, root = self._target(snapshot)
            if parent == root:
                self.committed[step, snapshot] = folder
        is_own = parent == self.root
        if is_own and self.exchange.rank == 0:
            self._listener.committed(folder, checkpoint.record)

    def close(self) -> None:
        """Wait for the pending save and release the folder; the background exchange ends with the world."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._claim.release()

    def _target(self, snapshot: bool) -> tuple[Storage, str]:
        """Return the storage and root that a save goes to."""
        if snapshot:
            return self.snapshot_storage, self.snapshot_root
        return self.storage, self.root

    def _report(
        self, line: str, level: int = logging.INFO, *, is_known_to_all: bool = False
    ) -> None:
        """Log a line once for all ranks, so that it reaches the terminal in every layout.

        Args:
            is_known_to_all: every rank calls this, so the run's main rank can log it,
                next to the steps.
        """
        speaks = self.exchange.rank == 0
        if is_known_to_all and self.grid.world_size == self.exchange.size:
            speaks = self.grid.is_main
        if speaks:
            logger.log(level, "%s", line, extra=ALL_RANKS)
        else:
            logger.debug("%s", line)
