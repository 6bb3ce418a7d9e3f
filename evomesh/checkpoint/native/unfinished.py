"""Saves that are not committed: their mark, and their removal after a failure.

The mark is an empty file ``ATTEMPT-unfinished`` in a folder that is being written or deleted:

    mark   data files   index   commit.json   (unmark)      a save
    mark   - commit.json   - index   - data files           a deletion, read from the left

Killed anywhere, either leaves a checkpoint or a marked folder. A folder with neither is
a checkpoint that lost its record: nobody but its owner knows what it is worth.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.format import CommitRecord
from evomesh.errors import UserError
from evomesh.storage.base import Storage, join

logger = logging.getLogger(__name__)
MARK_NAME = re.compile(r"[0-9a-f]{8}-unfinished\Z")


def mark_name(attempt: str) -> str:
    """Return the name of an attempt's mark."""
    return f"{attempt}-unfinished"


def is_marked(names: Iterable[str]) -> bool:
    """Return whether a mark is among the names in a step folder."""
    return any(MARK_NAME.match(name) for name in names)


def mark(storage: Storage, folder: str, attempt: str) -> None:
    """Mark a folder."""
    writer = storage.create(join(folder, mark_name(attempt)))
    try:
        writer.finish()
    finally:
        writer.abort()


def mark_for_deletion(storage: Storage, folder: str, attempt: str) -> None:
    """Mark a folder if the store lets anything be written: a full one does not, and deleting makes room."""
    with contextlib.suppress(OSError, UserError):
        mark(storage, folder, attempt)


def unmark(storage: Storage, folder: str, attempt: str) -> None:
    """Delete the mark of a save that is committed."""
    try:
        storage.delete(join(folder, mark_name(attempt)))
    except (OSError, UserError) as error:
        # The commit record decides, and the next retention deletes the mark.
        logger.info("%s: the mark of the save stays: %s", folder, error)


def discard(storage: Storage, folder: str, attempt: str, files: int = 1) -> None:
    """Delete everything that an attempt has written, its commit record first."""
    # The reverse of a commit: killed in between, it leaves no record that names files
    # which are gone.
    path = join(folder, fmt.COMMIT)
    try:
        if storage.exists(path):
            record = CommitRecord.from_bytes(storage.read(path))
            if record.attempt != attempt:
                return  # another job committed here
        storage.delete(path)
    except (OSError, UserError) as error:
        logger.warning("%s: cleaning up a failed save: %s", folder, error)
        return
    names = [fmt.index_name(attempt)]
    for number in range(files):
        names.append(fmt.file_name(attempt, number))
    names.append(mark_name(attempt))
    delete_files(storage, folder, names)


def delete_files(storage: Storage, folder: str, names: list[str]) -> None:
    """Delete files, and the folder if it is empty then.

    What cannot be deleted now is left to the next retention.
    """
    try:
        for name in names:
            path = join(folder, name)
            storage.delete(path)
        if not storage.list(folder):
            storage.delete_folder(folder)
    except (OSError, UserError) as error:
        logger.warning("%s: cleaning up a failed save: %s", folder, error)
