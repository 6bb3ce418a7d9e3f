"""Saves and loads the state of a run, on one process or many."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from evomesh.checkpoint import find, read, write
from evomesh.checkpoint import format as fmt
from evomesh.checkpoint.exchange import Exchange, default_exchange
from evomesh.checkpoint.find import Candidate, Found
from evomesh.checkpoint.format import CheckpointError
from evomesh.checkpoint.plan import Entry, Plan, describe, make_plan, signature
from evomesh.errors import UserError
from evomesh.parallel.grid import Grid
from evomesh.storage.base import Lock, join, open_storage

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class CheckpointManager:
    """All checkpoints of one save folder.

    Every rank makes one with the same arguments and calls every method in the same order.

    Args:
        root: save folder as the user typed it (``llm_ckpts``, ``local:llm_ckpts``).
        grid: where this rank stands; with each tensor's ``ShardSpec`` it says which box of a global tensor is here.
        exchange: how the ranks agree; by default over all ranks of the job.
        keep_last, keep_every: retention, see ``retention.py``; None keeps everything.
        max_failed_saves: saves in a row that the store may refuse before ``save`` raises.
        report: where one-line messages go.
    """

    def __init__(
        self,
        root: str,
        *,
        grid: Grid | None = None,
        exchange: Exchange | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        max_failed_saves: int = 3,
        report: Callable[[str], None] = log.info,
    ) -> None:
        self.storage, self.root = open_storage(root)
        self.grid = grid or Grid()
        self.exchange = exchange or default_exchange()
        self._keep_last, self._keep_every = keep_last, keep_every
        self._max_failed_saves, self._failed_saves = max_failed_saves, 0
        self._report = report
        self._lock: Lock | None = None
        self._plan: tuple[str, Plan] | None = None
        self._parent: dict[str, Any] | None = None  # step and attempt of the last one loaded or committed
        self._committed: dict[int, str] = {}  # step -> folder, of this process

    # ---- save -------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Makes this job the one writer of the folder, until ``close`` or its end; ``save`` does it if need be.

        Raises:
            UserError: another live job holds the folder, or it cannot be written.
        """
        if self._lock is None:
            self._everywhere(self._claim)

    def _claim(self) -> None:
        if self.exchange.rank == 0:
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            try:
                self._lock = self.storage.lock(join(self.root, ".writer"), holder)
            except OSError as error:
                raise _refused(error, self.root) from None
        else:
            self._lock = _Elsewhere()

    def close(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        config: dict[str, Any],
        *,
        blocking: bool = True,
        final: bool = False,
    ) -> str | None:
        """Commits a checkpoint of ``step`` and returns its folder.

        Args:
            tensors: live tensors by global name; those of other ranks complete them.
            state: JSON values (NaN, infinities and bytes allowed) that do not depend on the layout.
            config: the resolved config without secrets.
            blocking: False: return when the tensors may change again.
            final: raise also the first refusal of the store.

        Returns:
            None when the store refused (disk full, ...): the reason is reported and training may go on.

        Raises:
            UserError: a second writer, or too many refusals in a row.
        """
        self.claim()
        local = describe(tensors, self.grid)
        if step in self._committed:
            self._report(f"step {step} is already committed in {self._committed[step]}, not rewritten")
            return self._committed[step]
        order = self._order(step, signature(local))
        if order["replan"] or self._plan is None:
            self._plan = signature(local), make_plan(local, self.exchange)
        plan = self._plan[1]
        body = write.body(step, order["attempt"], state, config) | {"layout": self._layout(), "parent": self._parent}
        try:
            folder = self._write(plan, plan.entries(local), join(self.root, order["folder"]), body)
        except CheckpointError as error:
            self._failed_saves += 1
            if final or self._failed_saves >= self._max_failed_saves:
                raise
            self._report(f"checkpoint of step {step} not saved ({error.found}); training goes on")
            return None
        self._failed_saves = 0
        self._committed[step] = folder
        self._report(f"checkpoint of step {step} committed: {folder}")
        return folder

    def _order(self, step: int, mine: str) -> dict[str, Any]:
        """What rank 0 decides for a save: attempt id, folder, whether any rank's tensors changed their layout."""
        changed = self.exchange.gather(self._plan is None or self._plan[0] != mine)
        order = None
        if changed is not None:
            attempt, folder = secrets.token_hex(4), fmt.folder_name(step)
            if self.storage.exists(join(self.root, folder, fmt.COMMIT)):
                folder = fmt.folder_name(step, attempt)  # a committed folder is never written again
            order = {"attempt": attempt, "folder": folder, "replan": any(changed)}
        answer: dict[str, Any] = self.exchange.broadcast(order)
        return answer

    def _write(self, plan: Plan, entries: list[Entry], folder: str, body: dict[str, Any]) -> str:
        """Data on every rank, then index and commit on rank 0; the same verdict everywhere."""
        storage, exchange, attempt = self.storage, self.exchange, body["attempt"]
        message: dict[str, Any]
        try:
            storage.make_folder(folder)
            message = write.write_data(storage, folder, attempt, exchange.rank, entries)
            storage.sync(self.root)
        except (OSError, UserError) as error:
            message = {"error": _refused(error, folder).found}
        messages = exchange.gather(message)
        verdict = None
        if messages is not None:
            errors = [f"rank {rank}: {m['error']}" for rank, m in enumerate(messages) if "error" in m]
            try:
                if not errors:
                    body |= write.write_index(storage, folder, attempt, plan.tensors, messages)
                    write.publish(storage, folder, body)
            except (OSError, UserError) as error:
                errors = [f"rank 0: {_refused(error, folder).found}"]
            verdict = {"errors": errors}
        errors = exchange.broadcast(verdict)["errors"]
        if errors:
            raise CheckpointError("; ".join(errors[:4]), where=folder)
        self._parent = {"step": body["step"], "attempt": attempt}
        return folder

    def _layout(self) -> dict[str, int]:
        grid = self.grid
        axes = {axis.name: axis.size for axis in (grid.tp, grid.wp, grid.pp, grid.dp, grid.zero)}
        return {"world": self.exchange.size, **axes}

    # ---- find and load ----------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Step folders of the save folder and its snapshots, newest first, interrupted ones too."""
        return find.everything(self.storage, self.root)

    def newest(self, verify: bool = True) -> Found | None:
        """The newest checkpoint that verifies, None when there is none; reports what it skipped and why.

        Args:
            verify: read every byte and check its hash (the ranks share the files); else only records and file sizes.

        Raises:
            CheckpointError: there are checkpoints, and none verifies.
        """
        return self._agree(lambda: find.newest(self.candidates(), self._check(verify), self._report), verify)

    def resolve(self, path: str, verify: bool = True) -> Found:
        """The checkpoint that a path of the documents means: ``llm_ckpts``, ``llm_ckpts/49``, ``.../snapshot/1/``.

        Raises:
            CheckpointError: none there that verifies; says what lies beside it.
        """
        found = self._agree(lambda: find.resolve(path, self._check(verify), self._report), verify)
        assert found is not None
        return found

    def _check(self, verify: bool) -> Callable[[Candidate], Found]:
        return lambda candidate: check(candidate, data=verify)

    def _agree(self, choose: Callable[[], Found | None], verify: bool) -> Found | None:
        """Rank 0 chooses; every rank opens the same one."""
        answer: dict[str, Any] | None = None
        found: Found | None = None
        if self.exchange.rank == 0:
            try:
                found = choose()
                answer = {"folder": found.folder if found else None, "attempt": found.attempt if found else ""}
            except UserError as error:
                answer = {"error": [error.found, error.where, error.expected, error.fix]}
        answer = self.exchange.broadcast(answer)
        if "error" in answer:
            text, where, expected, fix = answer["error"]
            raise CheckpointError(text, where=where, expected=expected, fix=fix)
        if found is None and answer["folder"] is not None:
            found = find.open_checkpoint(self.storage, answer["folder"])
        return found

    def load(
        self, found: Found, tensors: Mapping[str, Tensor], *, strict: bool = True, cast: bool = False
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
        local = describe(tensors, self.grid)
        names = self.exchange.gather(list(local))

        def fill() -> None:
            records = found.records()
            read.match(records, local, cast, found.folder)
            if strict and names is not None:
                read.refuse_unwanted(records, {name for of_rank in names for name in of_rank}, found.folder)
            read.run(found, read.jobs_for(records, local))

        self._everywhere(fill)
        self._parent = {"step": found.step, "attempt": found.attempt}
        if found.folder.startswith(self.root):
            self._committed[found.step] = found.folder
        return found.state

    def _everywhere(self, action: Callable[[], Result]) -> Result:
        """Runs the action on every rank; when one fails, all raise its error."""
        problem: list[str] | None = None
        result: Result
        try:
            result = action()
        except UserError as error:
            problem = [error.found, error.where, error.expected, error.fix]
        problems = self.exchange.gather(problem)
        first = next((p for p in problems if p), None) if problems is not None else None
        first = self.exchange.broadcast(first)
        if first:
            raise CheckpointError(first[0], where=first[1], expected=first[2], fix=first[3])
        return result


class _Elsewhere:
    """Rank 0 holds the lock."""

    def release(self) -> None:
        return


def check(candidate: Candidate, *, data: bool) -> Found:
    """Opens a candidate and verifies it: records and file sizes, and with ``data`` the hash of every piece."""
    found = find.open_checkpoint(candidate.storage, candidate.folder)
    found.index()
    if data:
        read.verify_data(found)
    return found


def _refused(error: Exception, path: str) -> CheckpointError:
    """One sentence for whatever the store said."""
    if isinstance(error, UserError):
        return CheckpointError(error.found, where=error.where, expected=error.expected, fix=error.fix)
    if isinstance(error, OSError):
        place = error.filename or path
        return CheckpointError(f"{place}: {error.strerror or error} (errno {error.errno})")
    return CheckpointError(f"{path}: {error}")
