"""Find, verify and load checkpoints, on one process or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.agreement import run_on_all_ranks
from evomesh.checkpoint.native.find import Candidate, Checkpoint, CheckpointLookup, SaveFolder, locate
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.plan import describe
from evomesh.checkpoint.native.read import items_for, match, read_items, refuse_unwanted
from evomesh.checkpoint.native.verify import Depth, verify
from evomesh.parallel.exchange import Exchange, SingleProcessExchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard

logger = logging.getLogger(__name__)


class CheckpointReader:
    """Finds, verifies and loads checkpoints of any folder.

    It holds no process group, lock or buffer. Every rank of ``exchange`` makes one and calls every method with the
    same arguments in the same order.

    Args:
        grid: where this rank is; with a tensor's ``ShardSpec`` it determines which boxes of it are here.
        exchange: how the ranks agree; by default this process reads alone.
        report: where messages of one line go, on rank 0.
    """

    def __init__(
        self,
        grid: Grid | None = None,
        exchange: Exchange | None = None,
        report: Callable[[str], None] = logger.info,
    ) -> None:
        self.grid = grid or Grid()
        self.exchange = exchange or SingleProcessExchange()
        self._report = report if self.exchange.rank == 0 else logger.debug

    def newest(self, folder: SaveFolder, verify: Depth = "data") -> Checkpoint | None:
        """Return the newest checkpoint of a save folder that verifies, None if there is none.

        Reports each newer one that does not, with the reason.

        Raises:
            CheckpointError: there are checkpoints, and none verifies (never a silent fresh start).
        """
        lookup = self._agree_on(CheckpointLookup(folder.storage, folder.candidates()))
        return self._first_intact(lookup.candidates, verify)

    def resolve(self, url: str, verify: Depth = "data") -> Checkpoint:
        """Return the newest checkpoint that verifies of those that a path means.

        Args:
            url: ``llm_ckpts``, ``llm_ckpts/49``, ``llm_ckpts/snapshot/1/`` or a step folder.

        Raises:
            CheckpointError: nothing there (with what is near it), only interrupted saves, or none that verifies.
        """
        lookup = self._agree_on(locate(url))
        if not lookup.candidates:
            raise CheckpointError(lookup.problem, fix=lookup.fix)
        checkpoint = self._first_intact(lookup.candidates, verify)
        if checkpoint is None:
            lines = [
                f"\n  {c.folder}: {', '.join(c.storage.list(c.folder)) or 'empty'}" for c in lookup.candidates
            ]
            raise CheckpointError(
                f"{url!r} has only interrupted saves, none with a {fmt.COMMIT}:{''.join(lines)}",
                fix="give an older checkpoint, or start from scratch without a load path",
            )
        return checkpoint

    def load(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, Tensor | LocalShard],
        *,
        strict: bool = True,
        cast: bool = False,
    ) -> dict[str, Any]:
        """Fill the tensors in place, whatever layout they were saved in, and return the stored state.

        Args:
            tensors: live tensors by global name.
            strict: refuse a checkpoint with tensors that no rank wants.
            cast: convert from another dtype.

        Raises:
            CheckpointError: on every rank, for a name, shape, dtype or hash that does not fit; the tensors then hold
                a mixture and must be loaded again.
        """
        local = describe(tensors, self.grid)
        names = self.exchange.gather(list(local))

        def fill() -> None:
            records = checkpoint.records()
            match(records, local, cast, checkpoint.folder)
            if strict and names is not None:
                refuse_unwanted(records, set().union(*names), checkpoint.folder)
            read_items(checkpoint, items_for(records, local))

        run_on_all_ranks(self.exchange, fill)
        return checkpoint.state

    def _agree_on(self, lookup: CheckpointLookup) -> CheckpointLookup:
        """Return rank 0's lookup everywhere, since a listing may change from one moment to the next."""
        rows = [[candidate.folder, candidate.step, candidate.committed] for candidate in lookup.candidates]
        rows, problem, fix = self.exchange.broadcast([rows, lookup.problem, lookup.fix])
        storages = {candidate.folder: candidate.storage for candidate in lookup.candidates}
        candidates = [
            Candidate(storages.get(folder, lookup.storage), folder, step, committed)
            for folder, step, committed in rows
        ]
        return CheckpointLookup(lookup.storage, candidates, problem, fix)

    def _first_intact(self, candidates: Sequence[Candidate], depth: Depth) -> Checkpoint | None:
        """Return the first candidate that verifies, None if all are interrupted saves."""
        skipped: list[str] = []
        any_committed = False
        for candidate in candidates:
            try:
                checkpoint = self._verify(candidate, depth)
            except CheckpointError as error:
                any_committed = any_committed or candidate.committed
                skipped.append(f"{candidate.folder}: {error.found}")
                continue
            for reason in skipped:
                self._report(f"skipped {reason}")
            if skipped:
                self._report(f"using {checkpoint.folder}")
            return checkpoint
        if any_committed:
            raise CheckpointError(
                "no checkpoint verifies:\n  " + "\n  ".join(skipped),
                fix="repair one of them, or train into another save_ckpt_folder to start from scratch",
            )
        for reason in skipped:
            self._report(f"ignored {reason}")
        return None

    def _verify(self, candidate: Candidate, depth: Depth) -> Checkpoint:
        """Verify one candidate; each rank reads its share of the data files."""
        exchange = self.exchange
        return run_on_all_ranks(exchange, lambda: verify(candidate, depth, exchange.rank, exchange.size))


def resolve(url: str, verify: Depth = "record", report: Callable[[str], None] = logger.info) -> Checkpoint:
    """Return the checkpoint that a path means, on this process alone; see ``CheckpointReader.resolve``."""
    return CheckpointReader(report=report).resolve(url, verify)
