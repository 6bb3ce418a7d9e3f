"""Lanes of streaming data: each turns its own documents into one pack of every step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from evomesh.data.packing.packs import Pack, PackRule, assemble
from evomesh.data.packing.rows import assemble_rows
from evomesh.data.token_files.lines import TokenArray


@dataclass
class StreamingLane:
    """A sequence of documents that fills one pack of every step.

    Attributes:
        n: row of the next document.
        used: tokens of it that are already in packs.
        waiting: documents that were read and not used up: row and tokens, rows in ascending order.
    """

    n: int
    used: int = 0
    waiting: deque[tuple[int, TokenArray]] = field(default_factory=deque)

    def next_pack(self, rule: PackRule, num_lanes: int) -> Pack | None:
        """Return the next pack, or None when more documents are needed."""
        if rule.rows:
            return self._next_rows(rule, num_lanes)
        # 1. Collect documents until they fill the pack; the first may be partly used.
        documents: list[TokenArray] = []
        ends: list[int] = []
        filled = -self.used
        for _, tokens in self.waiting:
            filled += len(tokens)
            documents.append(tokens)
            ends.append(filled)
            if filled >= rule.packed_length:
                break
        if filled < rule.packed_length:
            return None

        # 2. Assemble it.
        stored = np.concatenate(documents)
        types = np.zeros(len(ends), np.int64)
        pack = assemble(stored[self.used :], np.array(ends), types, rule)

        # 3. Drop the consumed documents; the rest of the last one starts the next pack.
        rest = filled - rule.packed_length
        num_consumed = len(documents)
        self.used = 0
        if rest:
            num_consumed -= 1
            self.used = len(documents[-1]) - rest
        for _ in range(num_consumed):
            row, _ = self.waiting.popleft()
            self.n = row + num_lanes
        return pack

    def _next_rows(self, rule: PackRule, num_lanes: int) -> Pack | None:
        """Return the next pack with a document in each row, or None when more documents are needed."""
        if len(self.waiting) < rule.rows:
            return None
        documents = []
        for _ in range(rule.rows):
            row, tokens = self.waiting.popleft()
            documents.append(tokens)
            self.n = row + num_lanes
        self.used = 0
        return assemble_rows(documents, [0] * rule.rows, rule)
