"""Delete old checkpoints by the rules of retention, their files in a safe order, and nothing of anybody else."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.commit import parent_folder
from evomesh.checkpoint.native.find import Candidate, candidates, open_checkpoint
from evomesh.checkpoint.native.format import foreign_names
from evomesh.checkpoint.native.verify import verify
from evomesh.errors import UserError
from evomesh.storage.base import Storage, join

logger = logging.getLogger(__name__)
ALWAYS_KEPT = 2  # the newest that verify
PIN = ".pin"  # the file {folder}.pin next to a step folder exempts it from retention
SHOWN = 3  # foreign names in a warning


class Retention:
    """Decides which checkpoints are kept: the newest ``keep_last``, steps that ``keep_every`` divides, pinned ones.

    The newest two that verify are always kept. A damaged checkpoint is neither counted
    nor deleted: it may be the only copy left. Neither is a folder deleted that is
    pinned, that is a link, or that holds a file which no save writes. Checkpoints of
    later steps than the one just committed are another run's; they are not counted
    either, or they would push this run's own out at once.

    Args:
        keep_last: None keeps everything.
    """

    def __init__(
        self, keep_last: int | None = None, keep_every: int | None = None
    ) -> None:
        self.keep_last = keep_last
        self._keep_every = keep_every
        self._verified: dict[str, bool] = {}
        self._warned: set[str] = set()

    def trust(self, folder: str) -> None:
        """Take a checkpoint that this process committed as verified: its hashes were computed from memory."""
        self._verified[folder] = True

    def apply(self, storage: Storage, root: str, own: str) -> list[str]:
        """Delete what no rule keeps and return the folders. Call it on one rank.

        Args:
            own: the step folder that this run has just committed.
        """
        found = candidates(storage, root)
        committed = [candidate for candidate in found if candidate.committed]
        if not any(candidate.folder == own for candidate in committed):
            return []
        newest, later, older = _around(own, committed)
        self._warn_of_later(newest, later)
        deleted = []
        if self.keep_last is not None:
            deleted = self.to_delete([newest, *older])
        deleted += self._interrupted(found, newest.step)
        for candidate in deleted:
            delete_checkpoint(candidate)
        self._delete_leftovers(newest)
        return [candidate.folder for candidate in deleted]

    def _warn_of_later(self, own: Candidate, later: Sequence[Candidate]) -> None:
        """Say once that the folder holds another run's checkpoints, which a resume would choose."""
        root = parent_folder(own.folder)
        if not later or root in self._warned:
            return
        self._warned.add(root)
        steps = ", ".join(str(candidate.step) for candidate in later[:SHOWN])
        more = ", ..." if len(later) > SHOWN else ""
        logger.warning(
            "%s holds checkpoints of later steps (%s%s) than this run's %d: they are another run's and stay, and "
            "auto_resume would continue from step %d; move them away, or set another save_ckpt_folder",
            root,
            steps,
            more,
            own.step,
            later[0].step,
        )

    def to_delete(self, committed: list[Candidate]) -> list[Candidate]:
        """Return those of the committed checkpoints, newest first, that no rule keeps."""
        intact = [candidate for candidate in committed if self._opens(candidate)]
        kept = {
            candidate.folder
            for position, candidate in enumerate(intact)
            if self._is_kept(position, candidate)
        }
        if len(kept) < len(intact):
            # Only now is data read, and only until two safe checkpoints are known.
            safe = self._newest_that_verify(intact)
            if len(safe) < ALWAYS_KEPT:
                return []
            kept |= safe
        return self._deletable(
            [candidate for candidate in intact if candidate.folder not in kept]
        )

    def _is_kept(self, position: int, candidate: Candidate) -> bool:
        """Return whether a rule keeps a candidate, ``position`` being 0 for the newest."""
        if self.keep_last is None or position < self.keep_last:
            return True
        return self._keep_every is not None and candidate.step % self._keep_every == 0

    def _interrupted(
        self, found: Sequence[Candidate], newest_step: int
    ) -> list[Candidate]:
        """Return what interrupted saves of steps before the newest left.

        Those of later steps may belong to a save that another job is still writing.
        """
        older = [
            candidate
            for candidate in found
            if not candidate.committed and candidate.step < newest_step
        ]
        return self._deletable(older)

    def _deletable(self, unneeded: Sequence[Candidate]) -> list[Candidate]:
        """Return those of the candidates that are this program's own and not pinned; warn once of each other one."""
        if not unneeded:
            return []
        storage = unneeded[0].storage
        neighbors = {
            name.rstrip("/") for name in storage.list(parent_folder(unneeded[0].folder))
        }
        deletable = []
        for candidate in unneeded:
            if candidate.folder.rpartition("/")[2] + PIN in neighbors:
                continue
            reason = _reason_to_stay(candidate)
            if not reason:
                deletable.append(candidate)
            elif candidate.folder not in self._warned:
                self._warned.add(candidate.folder)
                logger.warning("%s is not deleted: %s", candidate.folder, reason)
        return deletable

    def _newest_that_verify(self, committed: list[Candidate]) -> set[str]:
        safe: set[str] = set()
        for candidate in committed:
            if len(safe) == ALWAYS_KEPT:
                break
            if self._verifies(candidate):
                safe.add(candidate.folder)
        return safe

    def _opens(self, candidate: Candidate) -> bool:
        if self._verified.get(candidate.folder) is False:
            return False  # reported before
        try:
            open_checkpoint(candidate.storage, candidate.folder)
        except UserError as error:
            self._report_damage(candidate, error)
            return False
        return True

    def _verifies(self, candidate: Candidate) -> bool:
        """Return whether every byte verifies; each checkpoint is read once."""
        if candidate.folder not in self._verified:
            try:
                verify(candidate, "data")
                self._verified[candidate.folder] = True
            except UserError as error:
                self._report_damage(candidate, error)
        return self._verified[candidate.folder]

    def _report_damage(self, candidate: Candidate, error: UserError) -> None:
        self._verified[candidate.folder] = False
        logger.warning(
            "%s is damaged (%s); it is kept for repair", candidate.folder, error.found
        )

    def _delete_leftovers(self, candidate: Candidate) -> None:
        """Delete files that other attempts at saving left in a committed folder."""
        storage, folder = candidate.storage, candidate.folder
        if storage.is_link(folder):
            return
        try:
            record = open_checkpoint(storage, folder).record
        except UserError:
            return
        names = storage.list(folder)
        needed = {
            fmt.COMMIT,
            record.index.file,
            *(file.name for file in record.files),
            *foreign_names(names),
        }
        for name in names:
            if name not in needed:
                storage.delete(join(folder, name))


def _around(
    own: str, committed: Sequence[Candidate]
) -> tuple[Candidate, list[Candidate], list[Candidate]]:
    """Return a run's newest checkpoint, those of later steps and the rest, both newest first."""
    (newest,) = [candidate for candidate in committed if candidate.folder == own]
    later = [candidate for candidate in committed if candidate.step > newest.step]
    older = [
        candidate
        for candidate in committed
        if candidate.step <= newest.step and candidate != newest
    ]
    return newest, later, older


def _reason_to_stay(candidate: Candidate) -> str:
    """Return why a step folder must not be deleted although no rule keeps it; "" if it may."""
    storage, folder = candidate.storage, candidate.folder
    if storage.is_link(folder):
        return "it is a link to another place"
    names = storage.list(folder)
    foreign = foreign_names(names)
    if foreign:
        shown = ", ".join(foreign[:SHOWN]) + (", ..." if len(foreign) > SHOWN else "")
        return f"it holds files that no save writes ({shown})"
    if not candidate.committed and any(fmt.INDEX_NAME.match(name) for name in names):
        # A save that is interrupted has no index yet, but for the moment between index
        # and commit record.
        return f"it may be a whole checkpoint that lost its {fmt.COMMIT}; delete the folder if it is not"
    return ""


def delete_checkpoint(candidate: Candidate) -> None:
    """Delete a checkpoint, its commit record first: killed at any point, it leaves no checkpoint or a whole one."""
    storage, folder = candidate.storage, candidate.folder
    if candidate.committed:
        storage.delete(join(folder, fmt.COMMIT))
        storage.sync(folder)
    names = storage.list(folder)
    foreign = foreign_names(names)
    for name in names:
        if name not in foreign:
            storage.delete(join(folder, name))
    try:
        storage.delete_folder(folder)
    except OSError as error:  # someone else put a file there
        logger.warning("%s: %s", folder, error)
