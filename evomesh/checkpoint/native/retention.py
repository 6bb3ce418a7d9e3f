"""Delete old checkpoints by the rules of retention.

Their files go in a safe order, and nothing of anybody else's does.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.commit import new_attempt, parent_folder
from evomesh.checkpoint.native.find import Candidate, candidates, open_checkpoint
from evomesh.checkpoint.native.format import foreign_names
from evomesh.checkpoint.native.unfinished import is_marked, mark_for_deletion
from evomesh.checkpoint.native.verify import verify
from evomesh.errors import UserError
from evomesh.storage.base import Storage, join

logger = logging.getLogger(__name__)
ALWAYS_KEPT = 2  # the newest that verify
PIN = ".pin"  # the file {folder}.pin next to a step folder exempts it from retention
SHOWN = 3  # foreign names in a warning


class Retention:
    """Decides which checkpoints are kept.

    These are the newest ``keep_last``, steps that ``keep_every`` divides, pinned ones,
    and always the newest two that verify. A damaged checkpoint is neither counted nor
    deleted: it may be the only copy left. Neither is a folder deleted that is pinned,
    that is a link, or that holds a file which no save writes. Checkpoints of later steps
    than the one just committed are another run's; they are not counted either, or they
    would push this run's own out at once.

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
        """Take a checkpoint that this process committed as verified.

        Its hashes were computed from memory.
        """
        self._verified[folder] = True

    def distrust(self, folders: Iterable[str]) -> None:
        """Take checkpoints that the start of this run reported and skipped as damaged."""
        for folder in folders:
            self._verified[folder] = False

    def apply(
        self,
        storage: Storage,
        root: str,
        own: str,
        in_use: Collection[str] = (),
    ) -> list[str]:
        """Delete what no rule keeps and return the folders. Call it on one rank.

        Args:
            own: the step folder that this run has just committed.
            in_use: step folders that are being read; a later call deletes them.
        """
        # 1. What is there. The checkpoint just committed can be missing: a store may list
        #    it late, and a user may have moved it. Then nothing is certain, so nothing is
        #    deleted.
        found = candidates(storage, root)
        committed = [candidate for candidate in found if candidate.committed]
        if own not in {candidate.folder for candidate in committed}:
            return []
        newest, later, older = _around(own, committed)
        self._warn_of_later(newest, later)

        # 2. What no rule keeps.
        unneeded = []
        if self.keep_last is not None:
            unneeded = self.to_delete([newest, *older])
        unneeded += self._interrupted(found, newest.step)

        # 3. Delete it.
        deleted = []
        for candidate in unneeded:
            if candidate.folder not in in_use:
                delete_checkpoint(candidate)
                deleted.append(candidate.folder)
        self._delete_leftovers(newest)
        return deleted

    def _warn_of_later(self, own: Candidate, later: Sequence[Candidate]) -> None:
        """Warn once of checkpoints that a resume would choose or skip before this run's."""
        root = parent_folder(own.folder)
        if not later or root in self._warned:
            return
        self._warned.add(root)
        skipped = [one for one in later if self._verified.get(one.folder) is False]
        usable = [one for one in later if one not in skipped]
        if skipped:
            logger.warning(
                "%s: checkpoints of later steps (%s) than this run's %d were skipped as damaged: they stay for repair, "
                "and each start skips them again until this run has passed them; delete them if they are not needed",
                root,
                _listed(skipped),
                own.step,
            )
        if usable:
            logger.warning(
                "%s holds checkpoints of later steps (%s) than this run's %d: they are another run's and stay, and "
                "auto_resume would continue from step %d; move them away, or set another save_ckpt_folder",
                root,
                _listed(usable),
                own.step,
                usable[0].step,
            )

    def to_delete(self, committed: list[Candidate]) -> list[Candidate]:
        """Return those of the committed checkpoints, newest first, that no rule keeps."""
        # A damaged checkpoint takes no place among the newest ``keep_last``: with
        # keep_last 2 and the newest two damaged, the two before them stay.
        intact = [candidate for candidate in committed if self._opens(candidate)]
        unneeded = []
        for position, candidate in enumerate(intact):
            if not self._is_kept(position, candidate):
                unneeded.append(candidate)
        if not unneeded:
            return []
        # Only now is data read, and only until two safe checkpoints are known. Where
        # there are no two, nothing is deleted: even an old one may be needed.
        safe = self._newest_that_verify(intact)
        if len(safe) < ALWAYS_KEPT:
            return []
        return self._deletable(
            [candidate for candidate in unneeded if candidate.folder not in safe]
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
        """Return those of the candidates that a save wrote and nobody pinned.

        Warns once of each that holds something else.
        """
        if not unneeded:
            return []
        first = unneeded[0]
        parent = parent_folder(first.folder)
        names = first.storage.list(parent)
        neighbors = {name.rstrip("/") for name in names}
        deletable = []
        for candidate in unneeded:
            _, _, step_folder = candidate.folder.rpartition("/")
            if step_folder + PIN in neighbors:
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


def _listed(found: Sequence[Candidate]) -> str:
    """Return the first steps of several, in words."""
    steps = ", ".join(str(candidate.step) for candidate in found[:SHOWN])
    return steps + (", ..." if len(found) > SHOWN else "")


def _reason_to_stay(candidate: Candidate) -> str:
    """Return why a step folder that no rule keeps must stay; "" if it may be deleted."""
    storage = candidate.storage
    folder = candidate.folder
    if storage.is_link(folder):
        return "it is a link to another place"
    names = storage.list(folder)
    foreign = foreign_names(names)
    if foreign:
        shown = ", ".join(foreign[:SHOWN])
        more = ", ..." if len(foreign) > SHOWN else ""
        return f"it holds files that no save writes ({shown}{more})"
    if candidate.committed:
        return ""
    if names and not is_marked(names):
        return f"it may be a whole checkpoint that lost its {fmt.COMMIT}; delete the folder if it is not"
    return ""


def delete_checkpoint(candidate: Candidate) -> None:
    """Delete a checkpoint, its commit record first.

    Killed at any point, it leaves no checkpoint or a whole one.
    """
    storage = candidate.storage
    folder = candidate.folder
    if candidate.committed:
        mark_for_deletion(storage, folder, new_attempt())
        storage.delete(join(folder, fmt.COMMIT))
        # Without this a power failure may undo the deletion of the record and keep that
        # of a data file: a checkpoint that claims to be whole.
        storage.sync(folder)
    names = storage.list(folder)
    foreign = foreign_names(names)
    marks_last = sorted(names, key=lambda name: is_marked([name]))
    for name in marks_last:
        if name not in foreign:
            storage.delete(join(folder, name))
    try:
        storage.delete_folder(folder)
    except OSError as error:  # someone else put a file there
        logger.warning("%s: %s", folder, error)
