"""Make one job the only writer of a save folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from functools import partial

from evomesh.checkpoint.native.agreement import run_on_all_ranks
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.store_errors import as_checkpoint_error
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange
from evomesh.storage.base import LockHeldElsewhere, Storage, StorageLock, join


class FolderClaim:
    """The claim of a job on its save folder: one lock, which rank 0 holds for all ranks."""

    def __init__(self, root: str, exchange: Exchange) -> None:
        self._root = root
        self._exchange = exchange
        self._lock: StorageLock | None = None

    def take(self, storage: Storage) -> None:
        """Claim the folder until ``release`` or the end of the job; again is fine.

        Args:
            storage: that of the folder.

        Raises:
            UserError: another running job holds the folder, it cannot be written, or not
                all ranks see it.
        """
        if self._lock is not None:
            return
        # A folder on each node's own disk takes every write and every lock without an
        # error, and the save of such a run has the pieces of one node only. The file that
        # rank 0 writes and the others look for finds it out before the first step.
        name = self._exchange.broadcast(f".probe-{secrets.token_hex(4)}")
        probe = join(self._root, name)
        lock_folder = partial(self._lock_folder, storage, probe)
        run_on_all_ranks(self._exchange, lock_folder)
        check = partial(self._check_shared_folder, storage, probe)
        run_on_all_ranks(self._exchange, check)
        if self._exchange.rank == 0:
            with contextlib.suppress(OSError):  # an empty file that stays does no harm
                storage.delete(probe)

    def _lock_folder(self, storage: Storage, probe: str) -> None:
        """Take the lock and write the probe file; rank 0 only."""
        if self._exchange.rank:
            return
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            self._lock = storage.lock(join(self._root, ".writer"), holder)
            storage.create(probe).finish()
        except OSError as error:
            self.release()
            raise as_checkpoint_error(error, self._root) from None
        except UserError:
            self.release()
            raise

    def _check_shared_folder(self, storage: Storage, probe: str) -> None:
        """Refuse a folder in which this rank does not see the probe file of rank 0."""
        if not storage.exists(probe):
            rank = self._exchange.rank
            raise CheckpointError(
                f"rank {rank} on {socket.gethostname()} does not see what rank 0 writes",
                where=self._root,
                expected="one folder shared by all nodes",
                fix="use a shared file system or an object store as save_ckpt_folder",
                code="EVO-CKPT-013",
            )
        self._lock = self._lock or LockHeldElsewhere()

    def check(self) -> None:
        """Refuse a commit where another job took the folder over while this one hung.

        Raises:
            StorageError: it did, or the store is down.
        """
        if self._lock is not None:
            self._lock.check()

    def release(self) -> None:
        """Let the next job in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
