"""Find, verify and load checkpoints, on one process or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.agreement import run_on_all_ranks
from evomesh.checkpoint.native.find import (
    Candidate,
    Checkpoint,
    CheckpointLookup,
    SaveFolder,
    locate,
)
from evomesh.checkpoint.native.format import CheckpointError, CommitRecord
from evomesh.checkpoint.native.intact import reading
from evomesh.checkpoint.native.plan import describe
from evomesh.checkpoint.native.read import (
    ReadItem,
    items_for,
    match,
    refuse_unwanted,
)
from evomesh.checkpoint.native.replicas import find_replicas, read_with_replicas
from evomesh.checkpoint.native.verify import (
    Depth,
    open_records,
    verify_data,
    verify_records,
)
from evomesh.parallel.exchange import Exchange, SingleProcessExchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard
from evomesh.storage.base import Storage
from evomesh.storage.urls import open_storage

logger = logging.getLogger(__name__)
Report = Callable[[str], None]
Check = Callable[[Checkpoint], None]


@dataclass(frozen=True)
class _SkippedCandidate:
    """Why a candidate is not used; only for a committed one this is a warning.

    Attributes:
        level: of the log.
    """

    level: int
    reason: str

    @staticmethod
    def of(candidate: Candidate, error: CheckpointError) -> _SkippedCandidate:
        level = logging.WARNING if candidate.committed else logging.INFO
        fix = f" (fix: {error.fix})" if error.fix else ""
        return _SkippedCandidate(level, f"{candidate.folder}: {error.found}{fix}")


class CheckpointReader:
    """Finds, verifies and loads checkpoints of any folder.

    It holds no process group, lock or buffer. Every rank of ``exchange`` makes one and
    calls every method with the same arguments in the same order.

    Args:
        grid: where this rank is; with a tensor's ``ShardSpec`` it determines which boxes
            of it are here.
        exchange: how the ranks agree; by default this process reads alone.
        report: where messages of one line go, on rank 0; None: to the log, those on
            damage as warnings.

    Attributes:
        skipped: the committed step folders that were not used because they do not verify; the same on all ranks.
    """

    def __init__(
        self,
        grid: Grid | None = None,
        exchange: Exchange | None = None,
        report: Report | None = None,
    ) -> None:
        self.grid = grid or Grid()
        self.exchange = exchange or SingleProcessExchange()
        self._custom_report = report
        self.skipped: set[str] = set()

    def newest(
        self, folder: SaveFolder, verify: Depth = "data", check: Check | None = None
    ) -> Checkpoint | None:
        """Return the newest checkpoint of a save folder that verifies, None if it has none.

        Reports each newer one that does not, with the reason.

        Args:
            check: raises any error at a checkpoint that cannot be used although its
                hashes are right.

        Raises:
            CheckpointError: there are checkpoints, and none verifies (never a silent
                fresh start).
        """
        storages = (folder.storage, folder.snapshot_storage)
        lookup = self._agree_on(storages, folder.lookup)
        return self._first_intact(lookup.candidates, verify, check)

    def resolve(self, url: str, verify: Depth = "data") -> Checkpoint:
        """Return the newest checkpoint that verifies of those that a path means.

        Args:
            url: ``llm_ckpts``, ``llm_ckpts/49``, ``llm_ckpts/snapshot/1/`` or a step folder.

        Raises:
            CheckpointError: nothing there (with what is near it), only interrupted saves,
                or none that verifies.
        """
        storage, _ = open_storage(url)
        lookup = self._agree_on((storage,), lambda: locate(url, storage))
        if not lookup.candidates:
            raise CheckpointError(lookup.problem, fix=lookup.fix, code="EVO-CKPT-001")
        checkpoint = self._first_intact(lookup.candidates, verify)
        if checkpoint is None:
            lines = [f"{url!r} has only interrupted saves, none with a {fmt.COMMIT}:"]
            for candidate in lookup.candidates:
                names = candidate.storage.list(candidate.folder)
                lines.append(f"{candidate.folder}: {', '.join(names) or 'empty'}")
            raise CheckpointError(
                "\n  ".join(lines),
                fix="give an older checkpoint, or start from scratch without a load path",
                code="EVO-CKPT-001",
            )
        return checkpoint

    def load(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, Tensor | LocalShard],
        *,
        strict: bool = True,
        cast: bool = False,
        unread: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Fill the tensors in place, whatever layout they were saved in.

        Args:
            tensors: live tensors by global name.
            strict: refuse a checkpoint with tensors that no rank wants.
            cast: convert from another dtype.
            unread: prefixes of names that may stay unread even so.

        Returns:
            the stored state.

        Raises:
            CheckpointError: on every rank, for a name, shape, dtype or hash that does not
                fit; the tensors then hold a mixture and must be loaded again.
        """
        # The layout that wrote the checkpoint plays no part: each rank wants the pieces
        # that overlap its own boxes, and ranks that want the same ones read them once,
        # together. Only whether a tensor is wanted by nobody needs all
        # ranks, since a pipeline stage wants some layers only.
        local = describe(tensors, self.grid)
        names_by_rank = self.exchange.gather(list(local))
        wanted: set[str] | None = None  # by any rank; only rank 0 knows
        if strict and names_by_rank is not None:
            wanted = set().union(*names_by_rank)

        def find_items() -> list[ReadItem]:
            index = checkpoint.index()
            records = index.records(local)
            where = checkpoint.folder
            match(records, local, cast, where, index.names)
            if wanted is not None:
                names = index.names()
                stored = _names_to_read(names, unread)
                refuse_unwanted(stored, wanted, where)
            return items_for(records, local)

        items = run_on_all_ranks(self.exchange, find_items)
        groups = find_replicas(items, self.exchange)
        run_on_all_ranks(
            self.exchange,
            lambda: read_with_replicas(checkpoint, groups, self.exchange),
        )
        return checkpoint.state

    def _agree_on(
        self, storages: Sequence[Storage], look_up: Callable[[], CheckpointLookup]
    ) -> CheckpointLookup:
        """Return rank 0's lookup everywhere.

        A listing may change from one moment to the next.

        Args:
            storages: those that the candidates are in, the same on every rank.
        """

        def look_up_on_rank_0() -> CheckpointLookup | None:
            return look_up() if self.exchange.rank == 0 else None

        # 1. Rank 0 looks. A storage cannot be sent to another rank; its number in
        #    ``storages`` can.
        lookup = run_on_all_ranks(self.exchange, look_up_on_rank_0)
        message = None
        if lookup is not None:
            rows = []
            for found in lookup.candidates:
                number = storages.index(found.storage)
                row = [number, found.folder, found.step, found.committed]
                rows.append(row)
            message = [rows, lookup.problem, lookup.fix]

        # 2. Every rank makes its own candidates of the answer.
        answer = self.exchange.broadcast(message)
        rows, problem, fix = answer
        candidates = []
        for number, *fields in rows:
            storage = storages[number]
            candidate = Candidate(storage, *fields)
            candidates.append(candidate)
        return CheckpointLookup(storages[0], candidates, problem, fix)

    def _first_intact(
        self, candidates: Sequence[Candidate], depth: Depth, check: Check | None = None
    ) -> Checkpoint | None:
        """Return the first candidate that verifies, None if all are interrupted saves."""
        # A ``StorageError`` is not caught: a store that is down must stop the run, not
        # send it back to an older checkpoint.
        skipped: list[_SkippedCandidate] = []
        for candidate in candidates:
            try:
                checkpoint = self._verify(candidate, depth, check)
            except CheckpointError as error:
                skipped.append(_SkippedCandidate.of(candidate, error))
                if candidate.committed:
                    self.skipped.add(candidate.folder)
                continue
            self._report_skipped(skipped, checkpoint)
            return checkpoint
        if any(candidate.committed for candidate in candidates):
            lines = [row.reason for row in skipped]
            raise CheckpointError(
                "\n  ".join(["no checkpoint verifies:", *lines]),
                fix="repair one of them, or train into another save_ckpt_folder to start from scratch",
                code="EVO-CKPT-003",
            )
        for row in skipped:
            self._report(row.level, f"ignored {row.reason}")
        return None

    def _report_skipped(
        self, skipped: Sequence[_SkippedCandidate], used: Checkpoint
    ) -> None:
        """Report why newer candidates are not used, and which one is."""
        if not skipped:
            return
        for row in skipped:
            self._report(row.level, f"skipped {row.reason}")
        highest = max(row.level for row in skipped)
        self._report(highest, f"using {used.folder}")

    def _report(self, level: int, line: str) -> None:
        if self.exchange.rank == 0:
            if self._custom_report is not None:
                self._custom_report(line)
            else:
                logger.log(level, "%s", line)

    def _verify(
        self, candidate: Candidate, depth: Depth, check: Check | None
    ) -> Checkpoint:
        """Verify one candidate.

        A thousand ranks would ask a store a million times for the sizes of a thousand
        files, and parse an index of 41 MB a thousand times: rank 0 reads the records,
        and each rank checks a share of what they say.
        """
        exchange = self.exchange
        checkpoint = self._open_records(candidate)

        def verify_share() -> None:
            verify_records(checkpoint, exchange.rank, exchange.size)
            if check is not None:
                with reading("the stored state", candidate.folder):
                    check(checkpoint)

        run_on_all_ranks(exchange, verify_share)
        if depth == "data":
            run_on_all_ranks(
                exchange,
                lambda: verify_data(checkpoint, exchange.rank, exchange.size),
            )
        return checkpoint

    def _open_records(self, candidate: Candidate) -> Checkpoint:
        """Read the records on rank 0, and return them on every rank."""
        exchange = self.exchange

        def open_on_rank_0() -> Checkpoint | None:
            return open_records(candidate) if exchange.rank == 0 else None

        # Thousands of ranks that read one file at once would be a load for the storage:
        # one reads, and the bytes of the index travel as text that restores them exactly.
        checkpoint = run_on_all_ranks(exchange, open_on_rank_0)
        message = None
        if checkpoint is not None and checkpoint.index_data is not None:
            text = checkpoint.index_data.decode("utf-8", "surrogateescape")
            record_fields = checkpoint.record.to_json()
            message = [record_fields, text]
        answer = exchange.broadcast(message)
        if checkpoint is not None:
            return checkpoint
        record_fields, text = answer
        record = CommitRecord.from_json(record_fields)
        index_data = text.encode("utf-8", "surrogateescape")
        return Checkpoint(candidate.storage, candidate.folder, record, index_data)


def _names_to_read(names: Iterable[str], unread: tuple[str, ...]) -> list[str]:
    """Return the names that begin with no prefix in ``unread``."""
    to_read = []
    for name in names:
        may_be_left = name.startswith(unread)
        if not may_be_left:
            to_read.append(name)
    return to_read


def resolve(
    url: str, verify: Depth = "record", report: Report | None = None
) -> Checkpoint:
    """Return the checkpoint that a path means, on this process alone.

    See ``CheckpointReader.resolve``.
    """
    return CheckpointReader(report=report).resolve(url, verify)
