"""Hear of the checkpoints that a run commits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from evomesh.checkpoint.native.format import CommitRecord


class CommitListener(Protocol):
    """Does something with a checkpoint once it is committed; called on rank 0 alone."""

    def committed(self, folder: str, record: CommitRecord) -> None:
        """Take note of a checkpoint in the save folder; must not raise, nor take long."""

    def in_use(self) -> Collection[str]:
        """Return the step folders that retention must not delete now."""


class NoListener:
    """Does nothing with checkpoints."""

    def committed(self, folder: str, record: CommitRecord) -> None:
        return

    def in_use(self) -> Collection[str]:
        return ()
