"""What one data-parallel rank trains on in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # IGNORE is used by the command line's data verbs, which must start without torch
    from torch import Tensor

IGNORE = -100  # label of a position that is input but not target


@dataclass(frozen=True)
class Batch:
    """M micro-batches of T packed tokens.

    Attributes:
        input_ids: [M, T] int64, never negative.
        labels: [M, T] int64, the token to predict at each position, ``IGNORE`` where there is none.
        position_ids: [M, T] int64, position within the document piece, restarting at 0.
        type_ids: [M, T] int64, index into the dataset's ``types``.
        cu_seqlens: [M, K] int32, piece bounds 0 .. T of each micro-batch, padded on the right by repeating T.
        max_seqlen: longest piece over all micro-batches (a Python int: no device sync).
        host_bounds: ``cu_seqlens`` on the host, once the batch lies on a device.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    host_bounds: Tensor | None = None
