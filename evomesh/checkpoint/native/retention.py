"""Which old checkpoints go, and in which order their files do."""

from __future__ import annotations

import logging

from evomesh.checkpoint.native import find, read
from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.find import Candidate, Checkpoint
from evomesh.errors import UserError
from evomesh.storage.base import Storage, join

logger = logging.getLogger(__name__)
ALWAYS_KEPT = 2  # the newest verified ones
PIN = ".pin"  # {folder}.pin beside a step folder keeps it for ever


class Retention:
    """Keeps the newest ``keep_last`` checkpoints, each whose step is a multiple of ``keep_every``, pinned ones, and
    always the newest two that verify. ``keep_last=None`` keeps all. A damaged checkpoint is never counted as kept and
    never deleted: it may be the user's last hope.
    """

    def __init__(self, keep_last: int | None = None, keep_every: int | None = None) -> None:
        self.keep_last, self._keep_every = keep_last, keep_every
        self._verified: dict[str, bool] = {}

    def trust(self, folder: str) -> None:
        """A checkpoint that this process committed: its hashes were taken from memory, its files synced."""
        self._verified[folder] = True

    def apply(self, storage: Storage, root: str) -> list[str]:
        """Deletes what may go and returns the folders. Call only after a commit, on one rank."""
        choices = find.candidates(storage, root)
        committed = [c for c in choices if c.committed]
        dropped = []
        for choice in self.to_drop(committed) if self.keep_last is not None else []:
            drop(choice)
            dropped.append(choice.folder)
        for choice in choices:
            if not choice.committed and committed and choice.step < committed[0].step:
                drop(choice)  # an interrupted save; newer ones may still be somebody's running save
                dropped.append(choice.folder)
        if committed:
            self._sweep(committed[0])
        return dropped

    def to_drop(self, committed: list[Candidate]) -> list[Candidate]:
        """Of committed checkpoints, newest first, those that no rule keeps."""
        good = [c for c in committed if self._opens(c)]
        kept = {c.folder for c in good[: self.keep_last]}
        kept |= {c.folder for c in good if self._keep_every and c.step % self._keep_every == 0}
        kept |= {c.folder for c in good if c.storage.exists(c.folder + PIN)}
        if len(kept) < len(good):
            safe = 0
            for choice in good:  # only now read data: as few as are needed to know two safe ones
                if safe == ALWAYS_KEPT:
                    break
                if self._verifies(choice):
                    safe += 1
                    kept.add(choice.folder)
            if safe < ALWAYS_KEPT:
                return []
        return [c for c in good if c.folder not in kept]

    def _opens(self, choice: Candidate) -> bool:
        try:
            find.open_checkpoint(choice.storage, choice.folder)
        except UserError as error:
            logger.warning("%s is damaged (%s); it is kept for repair", choice.folder, error.found)
            return False
        return True

    def _verifies(self, choice: Candidate) -> bool:
        if choice.folder not in self._verified:
            try:
                check(choice, data=True)
                self._verified[choice.folder] = True
            except UserError as error:
                logger.warning("%s is damaged (%s); it is kept for repair", choice.folder, error.found)
                self._verified[choice.folder] = False
        return self._verified[choice.folder]

    def _sweep(self, choice: Candidate) -> None:
        """Files that other attempts left in a committed folder."""
        try:
            body = find.open_checkpoint(choice.storage, choice.folder).body
        except UserError:
            return
        named = {fmt.COMMIT, body["index"]["file"], *(name for name, *_ in body["files"])}
        for name in choice.storage.list(choice.folder):
            if name not in named and not name.endswith("/"):
                choice.storage.delete(join(choice.folder, name))


def drop(choice: Candidate) -> None:
    """Deletes a checkpoint; killed at any point, what is left is no checkpoint or the whole one."""
    storage, folder = choice.storage, choice.folder
    if choice.committed:
        storage.delete(join(folder, fmt.COMMIT))
        storage.sync(folder)
    for name in storage.list(folder):
        if not name.endswith("/"):
            storage.delete(join(folder, name))
    try:
        storage.delete_folder(folder)
    except OSError as error:  # somebody put another file there
        logger.warning("%s: %s", folder, error)


def check(choice: Candidate, *, data: bool) -> Checkpoint:
    """Opens a candidate and verifies it: records and file sizes, and with ``data`` the hash of every piece.

    Raises:
        CheckpointError: naming the file, and the tensor where the damage lies in one.
    """
    found = find.open_checkpoint(choice.storage, choice.folder)
    found.index()
    if data:
        read.verify_data(found)
    return found
