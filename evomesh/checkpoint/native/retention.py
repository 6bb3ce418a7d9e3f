"""Delete old checkpoints by the rules of retention, their files in a safe order."""

from __future__ import annotations

import logging

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.find import Candidate, candidates, open_checkpoint
from evomesh.checkpoint.native.verify import verify
from evomesh.errors import UserError
from evomesh.storage.base import Storage, join

logger = logging.getLogger(__name__)
ALWAYS_KEPT = 2  # the newest that verify
PIN = ".pin"  # the file {folder}.pin next to a step folder exempts it from retention


class Retention:
    """Decides which checkpoints are kept: the newest ``keep_last``, steps that ``keep_every`` divides, pinned ones.

    The newest two that verify are always kept. A damaged checkpoint is neither counted nor deleted: it may be the only
    copy left.

    Args:
        keep_last: None keeps everything.
    """

    def __init__(self, keep_last: int | None = None, keep_every: int | None = None) -> None:
        self.keep_last = keep_last
        self._keep_every = keep_every
        self._verified: dict[str, bool] = {}

    def trust(self, folder: str) -> None:
        """Take a checkpoint that this process committed as verified: its hashes were computed from memory."""
        self._verified[folder] = True

    def apply(self, storage: Storage, root: str) -> list[str]:
        """Delete what no rule keeps and return the folders. Call it after a commit only, on one rank."""
        found = candidates(storage, root)
        committed = [candidate for candidate in found if candidate.committed]
        deleted = self.to_delete(committed) if self.keep_last is not None else []
        if committed:
            # An older interrupted save is garbage; a newer one may be a save that another job is still writing.
            newest = committed[0].step
            deleted += [
                candidate for candidate in found if not candidate.committed and candidate.step < newest
            ]
        for candidate in deleted:
            delete_checkpoint(candidate)
        if committed:
            self._delete_foreign_files(committed[0])
        return [candidate.folder for candidate in deleted]

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
        return [candidate for candidate in intact if candidate.folder not in kept]

    def _is_kept(self, position: int, candidate: Candidate) -> bool:
        """Return whether a rule keeps a candidate, ``position`` being 0 for the newest."""
        if self.keep_last is None or position < self.keep_last:
            return True
        if self._keep_every is not None and candidate.step % self._keep_every == 0:
            return True
        return candidate.storage.exists(candidate.folder + PIN)

    def _newest_that_verify(self, committed: list[Candidate]) -> set[str]:
        safe: set[str] = set()
        for candidate in committed:
            if len(safe) == ALWAYS_KEPT:
                break
            if self._verifies(candidate):
                safe.add(candidate.folder)
        return safe

    def _opens(self, candidate: Candidate) -> bool:
        try:
            open_checkpoint(candidate.storage, candidate.folder)
        except UserError as error:
            logger.warning("%s is damaged (%s); it is kept for repair", candidate.folder, error.found)
            return False
        return True

    def _verifies(self, candidate: Candidate) -> bool:
        """Return whether every byte verifies; each checkpoint is read once."""
        if candidate.folder not in self._verified:
            try:
                verify(candidate, "data")
                self._verified[candidate.folder] = True
            except UserError as error:
                logger.warning("%s is damaged (%s); it is kept for repair", candidate.folder, error.found)
                self._verified[candidate.folder] = False
        return self._verified[candidate.folder]

    def _delete_foreign_files(self, candidate: Candidate) -> None:
        """Delete files that other attempts left in a committed folder."""
        try:
            record = open_checkpoint(candidate.storage, candidate.folder).record
        except UserError:
            return
        named = {fmt.COMMIT, record.index.file, *(file.name for file in record.files)}
        for name in candidate.storage.list(candidate.folder):
            if name not in named and not name.endswith("/"):
                candidate.storage.delete(join(candidate.folder, name))


def delete_checkpoint(candidate: Candidate) -> None:
    """Delete a checkpoint, its commit record first: killed at any point, it leaves no checkpoint or a whole one."""
    storage, folder = candidate.storage, candidate.folder
    if candidate.committed:
        storage.delete(join(folder, fmt.COMMIT))
        storage.sync(folder)
    for name in storage.list(folder):
        if not name.endswith("/"):
            storage.delete(join(folder, name))
    try:
        storage.delete_folder(folder)
    except OSError as error:  # someone else put a file there
        logger.warning("%s: %s", folder, error)
