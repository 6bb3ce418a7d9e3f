"""Parts of a rank whose weights FSDP2 shards over any number of ranks, from traces with two and with four.

What FSDP2 copies, sums and keeps is a constant and a share of one over the number of
ranks, so that two traces give every other number:

    value(n) = constant + share / n
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from evomesh.plan.memory import Peak
from evomesh.plan.part_time import (
    INSIDE,
    KernelSpan,
    PartItem,
    TimedPart,
    TimedTransfer,
    has_same_items,
)
from evomesh.plan.part_trace import PartBytes, SlotShape
from evomesh.plan.timeline import COMPUTE

# The numbers of ranks that are traced.
TWO = 2
FOUR = 4


def slots_at(
    two: list[SlotShape], four: list[SlotShape], shards: int
) -> list[SlotShape] | None:
    """Return the parameters of a rank, sharded over ``shards``; None where these do not divide as 2 and 4 do."""
    found = []
    for slot, other in zip(two, four, strict=True):
        if slot.is_split != other.is_split:
            return None
        if not slot.is_split:
            found.append(slot)
            continue
        rows = slot.rows * TWO
        if rows % shards:
            return None
        sharded = replace(
            slot,
            rows=rows // shards,
            elements=slot.elements * TWO // shards,
            moments=slot.moments * TWO // shards,
        )
        found.append(sharded)
    return found


def parts_at(
    two: dict[str, TimedPart], four: dict[str, TimedPart], shards: int
) -> dict[str, TimedPart] | None:
    """Return the parts with weights sharded over ``shards`` ranks; None where the traces differ in more than times."""
    if two.keys() != four.keys():
        return None
    found = {}
    for name, part in two.items():
        other = four[name]
        if not has_same_items(part, other):
            return None
        found[name] = _part_at(part, other, shards)
    return found


def _part_at(two: TimedPart, four: TimedPart, shards: int) -> TimedPart:
    items: list[PartItem] = []
    for item, other in zip(two.items, four.items, strict=True):
        items.append(_item_at(item, other, shards))
    return TimedPart(tuple(items), _busy_at(two.busy, four.busy, shards))


def _busy_at(
    two: Mapping[str, float], four: Mapping[str, float], shards: int
) -> dict[str, float]:
    busy = {}
    for kind, seconds in two.items():
        busy[kind] = value_at(seconds, four.get(kind, 0.0), shards)
    return busy


def _item_at(two: PartItem, four: PartItem, shards: int) -> PartItem:
    if isinstance(two, KernelSpan) and isinstance(four, KernelSpan):
        seconds = value_at(two.seconds, four.seconds, shards)
        return KernelSpan(two.stream, seconds)
    return two


def bytes_at(
    two: Mapping[str, PartBytes], four: Mapping[str, PartBytes], shards: int
) -> dict[str, PartBytes]:
    """Return the bytes of the parts with weights sharded over ``shards`` ranks."""
    found = {}
    for name, part in two.items():
        found[name] = _part_bytes_at(part, four[name], shards)
    return found


def _part_bytes_at(two: PartBytes, four: PartBytes, shards: int) -> PartBytes:
    kept = value_at(two.kept, four.kept, shards)
    most = _peak_at(two.most, four.most, shards)
    return PartBytes(round(kept), most)


def _peak_at(two: Peak, four: Peak, shards: int) -> Peak:
    nbytes = value_at(two.nbytes, four.nbytes, shards)
    gathered = value_at(two.gathered, four.gathered, shards)
    return Peak(round(nbytes), round(gathered))


def value_at(two: float, four: float, shards: int) -> float:
    """Return the value for ``shards`` ranks of what is known for two and for four."""
    share = (two - four) / (1 / TWO - 1 / FOUR)
    constant = two - share / TWO
    return constant + share / shards


def moved_part(sharded: TimedPart, before: TimedPart, after: TimedPart) -> TimedPart:
    """Return a part with sharded weights that computes something else.

    Args:
        before: what it computes, with whole weights.
        after: what it is to compute: more tokens, or a layer with recomputing.
    """
    old = before.seconds_of(COMPUTE)
    new = after.seconds_of(COMPUTE)
    own = sharded.seconds_of(COMPUTE)
    # FSDP2's copies on this stream stay what they are; the rest is spread evenly.
    longer = 1.0
    if own:
        longer = (own + new - old) / own
    larger = 1.0
    if before.sent(INSIDE):
        larger = after.sent(INSIDE) / before.sent(INSIDE)
    items = []
    for item in sharded.items:
        like = _scaled(item, longer, larger)
        items.append(like)
    busy = dict(sharded.busy)
    for kind in after.busy:
        present = busy.get(kind, 0.0)
        old = before.busy.get(kind, 0.0)
        growth = after.busy[kind] - old
        busy[kind] = present + growth
    return TimedPart(tuple(items), busy)


def _scaled(item: PartItem, longer: float, larger: float) -> PartItem:
    """Return a kernel of the compute stream, or a transfer of activations, times a factor."""
    if isinstance(item, KernelSpan) and item.stream == COMPUTE:
        return KernelSpan(COMPUTE, item.seconds * longer)
    if isinstance(item, TimedTransfer) and item.axis == INSIDE:
        nbytes = round(item.nbytes * larger)
        return item._replace(nbytes=nbytes)
    return item


def moved_bytes(sharded: PartBytes, before: PartBytes, after: PartBytes) -> PartBytes:
    """Return the bytes of a part with sharded weights that computes something else; see ``moved_part``."""
    kept = sharded.kept + after.kept - before.kept
    growth = after.most.nbytes - before.most.nbytes
    return PartBytes(kept, sharded.most.with_bytes(growth))
