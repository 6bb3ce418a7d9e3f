"""Forward passes over texts, by the model as it is in the run: any layout, no key/value cache.

texts -> packs -> the schedule that also validates -> losses, or the logits of what follows

Shapes: M packs, T tokens of each, K segment bounds, R chosen rows, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, Config
from evomesh.data.batch import Batch
from evomesh.layers.compiler import compiles_blocks
from evomesh.parallel.collectives import (
    all_gather_no_grad,
    all_reduce_no_grad,
    broadcast_from,
)
from evomesh.rounding import next_power_of_two
from evomesh.train.launch import RunContext
from evomesh.train.stages import ModelStages
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place


@dataclass
class TextPack:
    """Texts laid end to end, as lists of numbers.

    Attributes:
        texts: index of each text.
        ends: row of the last token of each text.
        bounds: 0, and the row after each segment.
    """

    texts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])

    def add(self, ids: Sequence[int]) -> None:
        """Append one segment."""
        self.tokens += ids
        self.positions += range(len(ids))
        self.bounds.append(len(self.tokens))

    def add_text(self, number: int, ids: Sequence[int]) -> None:
        self.add(ids)
        self.texts.append(number)
        self.ends.append(len(self.tokens) - 1)

    def pad(self, length: int, segment: int) -> None:
        """Append segments of at most ``segment`` tokens that nobody reads, up to ``length``."""
        while len(self.tokens) < length:
            missing = length - len(self.tokens)
            self.add([0] * min(segment, missing))


class TextPasses:
    """Runs texts through the model. All ranks call each method with the same texts, in the same order.

    The ranks of a data-parallel axis compute the same: weights may be sharded over them,
    so that none of them can be left out.
    """

    def __init__(
        self, config: Config, stages: ModelStages, context: RunContext
    ) -> None:
        data = config.data
        self.stages = stages
        self.grid = context.grid
        self.device = context.device
        self.is_split = context.mode.sequence_parallel
        self.segment = data.seq_len
        self.longest_pack = data.packed_length
        # Compiled blocks know packs of this length only, and are not to be compiled
        # again for each length of an answer.
        is_compiled = compiles_blocks(config.model.compile, context.device)
        self.multiple = data.packed_length if is_compiled else self.grid.tp.size

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Tensor | None:
        """Return the logits [R, V] of what follows each text, on the ranks with the last stage; None on others."""
        packs = self.pack(texts)
        batch = self.batch(packs)
        logits: list[Tensor] = []

        def read(
            index: int,
            model: Any,
            hidden: Tensor,
        ) -> None:
            ends = packs[index].ends
            found = self._logits_of_rows(model, hidden, ends)
            logits.append(found)

        # Each batch counts as progress of this rank.
        with this_process().phase(Place.FORWARD_BACKWARD):
            self.stages.schedule.read(batch, read)
        return torch.cat(logits) if logits else None

    def agree(self, numbers: Sequence[int] | None, count: int) -> list[int]:
        """Return on every rank the numbers that the first rank with the last stage has chosen.

        Two devices may round differently, and must not take different ways from there.

        Args:
            numbers: None on ranks without the last stage.
        """
        grid = self.grid
        chosen = torch.zeros(
            count,
            dtype=torch.int64,
            device=self.device,
        )
        if numbers is not None:
            own = torch.tensor(numbers)
            chosen.copy_(own)
        # Ranks without the last stage add nothing.
        chosen = all_reduce_no_grad(chosen, grid.pp)
        broadcast_from(chosen, grid.tp)
        broadcast_from(chosen, grid.dp)
        agreed: list[int] = chosen.tolist()
        return agreed

    def pack(self, texts: Sequence[Sequence[int]]) -> list[TextPack]:
        """Return packs of the texts in order, all of one length: that of training, unless a text is longer."""
        last = TextPack()
        packs = [last]
        for number, ids in enumerate(texts):
            together = len(last.tokens) + len(ids)
            if last.texts and together > self.longest_pack:
                last = TextPack()
                packs.append(last)
            last.add_text(number, ids)
        longest = max(len(pack.tokens) for pack in packs)
        missing = -longest % self.multiple
        length = longest + missing
        for pack in packs:
            pack.pad(length, self.segment)
        return packs

    def batch(
        self, packs: Sequence[TextPack], labels: Sequence[Sequence[int]] = ()
    ) -> Batch:
        """Return the packs as a batch on the device.

        Args:
            labels: of each token of each pack; by default none is a target.
        """
        tokens = torch.tensor([pack.tokens for pack in packs])
        positions = torch.tensor([pack.positions for pack in packs])
        bounds = _bounds(packs, length=tokens.shape[1])
        longest = bounds.diff(dim=1).max()
        targets = torch.full_like(tokens, IGNORE)
        if labels:
            targets = torch.tensor(labels)
        batch = Batch(
            tokens=tokens,
            labels=targets,
            position_ids=positions,
            type_ids=torch.zeros_like(tokens),
            cu_seqlens=bounds,
            max_seqlen=int(longest),
        )
        return batch.to(self.device)

    def _logits_of_rows(
        self,
        model: Any,
        hidden: Tensor,
        rows: list[int],
    ) -> Tensor:
        """Return the logits [R, V] of some rows of a pack's hidden states [T, D], or of this rank's part of them."""
        axis = self.grid.tp
        if not self.is_split or axis.size == 1:
            logits: Tensor = model.logits(hidden[rows])
            return logits
        # The head gathers the rows of all tensor ranks, of which each gives as many.
        whole = all_gather_no_grad(hidden, axis)
        count = len(rows)
        missing = -count % axis.size
        repeated = rows[-1:] * missing
        chosen = whole[rows + repeated]
        own_rows = axis.shard(range(len(chosen)))
        own = chosen[own_rows.start : own_rows.stop]
        gathered: Tensor = model.logits(own)
        return gathered[:count]


def _bounds(packs: Sequence[TextPack], length: int) -> Tensor:
    """Return the bounds of the packs' segments, [M, K] int32; as many as a loader gives (see ``Batch``)."""
    most_bounds = max(len(pack.bounds) for pack in packs)
    most_segments = most_bounds - 1
    segments = next_power_of_two(most_segments)
    count = segments + 1
    rows: list[list[int]] = []
    for pack in packs:
        missing = count - len(pack.bounds)
        empty_segments = [length] * missing
        row = list(pack.bounds)
        row += empty_segments
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32)
