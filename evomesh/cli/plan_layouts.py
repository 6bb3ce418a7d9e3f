"""Output of ``evomesh plan --search``: the fastest layouts, why each is slower, and what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomesh.quantities import readable

if TYPE_CHECKING:
    from rich.table import Table

    from evomesh.plan.search import LayoutPrediction, SearchCounts, SearchResult
    from evomesh.plan.step_time import StepTime

GIB = 2**30
BILLION = 1e9
SECONDS_PER_HOUR = 3600
# Parts of a step, as a reason names them.
MORE = {
    "matrix products": "more in matrix products",
    "attention": "more in attention",
    "elementwise": "more in elementwise operations",
    "waiting for collectives": "longer waiting for collectives",
    "waiting for other stages": "longer waiting for other stages",
    "reducing, updating, gathering": "longer for sums, update and gathers",
}


def describe_counts(counts: SearchCounts, traces: int, seconds: float) -> list[str]:
    """Return how many layouts were tried, and what became of them."""
    rows = {
        "break a rule": counts.refused,
        "cannot fit: weights and gradients alone are too large": counts.pruned,
        "do not fit": counts.too_large,
        "recompute more than they need to fit": counts.slower,
        "fit": counts.fitting,
    }
    lines = [f"{counts.total:,} layouts in {seconds:.1f} s, from {traces} traces"]
    for what, count in rows.items():
        if count:
            lines.append(f"{count:9,} {what}")
    return lines


def describe_order() -> str:
    """Return by which rule the layouts are in their order."""
    from evomesh.plan.search import AS_FAST

    return (
        f"up to {AS_FAST:.0%} slower than the fastest: the least memory first; then by speed; "
        "GiB are those of tensors and of what is estimated beside them"
    )


def layouts_table(result: SearchResult, price: float | None) -> Table:
    """Return the best layouts, each compared with the one above."""
    from rich.table import Table

    table = Table("layout", title="fastest layouts that fit")
    table.add_column("GiB", justify="right")
    table.add_column("tokens/s/GPU", justify="right")
    if price is not None:
        table.add_column("cost of 1e9 tokens", justify="right")
    table.add_column("compared with the one above")
    better: LayoutPrediction | None = None
    for prediction in result.fitting:
        time = prediction.time
        assert time is not None
        cells = [
            str(prediction.choice),
            f"{prediction.peak.needed / GIB:.1f}",
            f"{time.tokens_per_second:,.0f}",
        ]
        if price is not None:
            cells.append(f"{cost(time, price):,.2f}")
        cells.append(reason(better, prediction) if better else "")
        table.add_row(*cells)
        better = prediction
    return table


def reason(better: LayoutPrediction, found: LayoutPrediction) -> str:
    """Return why a layout is slower than a better one: the part of a step that grew most.

    Others come after it because they need more memory.
    """
    assert better.time is not None
    assert found.time is not None
    slower = found.time.seconds / better.time.seconds - 1
    if slower < 0.0005:
        return _as_fast(better, found)
    part, growth = _grown_most(better.time, found.time)
    text = f"{slower:.1%}: {growth:.3f} s {MORE[part]}"
    cause = _cause(part, better, found)
    return f"{text} ({cause})" if cause else text


def _as_fast(better: LayoutPrediction, found: LayoutPrediction) -> str:
    """Return what layouts differ in of which the later one is not slower, where that is memory."""
    assert better.time is not None
    assert found.time is not None
    faster = 1 - found.time.seconds / better.time.seconds
    speed = f"{faster:.1%} faster" if faster >= 0.0005 else "as fast"
    more = (found.peak.needed - better.peak.needed) / GIB
    return f"{speed}, with {more:.1f} GiB more" if more >= 0.05 else speed


def _grown_most(better: StepTime, found: StepTime) -> tuple[str, float]:
    """Return the part of a step that grew most, and by how many seconds."""
    before = better.parts()
    growths = {}
    for part, seconds in found.parts().items():
        growths[part] = seconds - before.get(part, 0.0)
    grown_most = max(growths, key=growths.__getitem__)
    return grown_most, growths[grown_most]


def _cause(part: str, better: LayoutPrediction, found: LayoutPrediction) -> str:
    """Return what in a layout makes a part of its step longer, where that is plain to see."""
    before = better.choice
    now = found.choice
    if part == "waiting for other stages":
        return f"{now.micro_num} micro-batches fill {now.pipeline} stages"
    if part == "waiting for collectives":
        if now.tensor > before.tensor:
            return f"{now.mode} over {now.tensor} ranks"
        if now.fsdp and not before.fsdp:
            return "weights are gathered for each micro-batch"
        return ""
    if part == "reducing, updating, gathering":
        if now.zero < before.zero:
            return f"state sharded over {now.zero} ranks, not {before.zero}"
        return ""
    if now.recompute > before.recompute:
        return "recomputing"
    if now.micro_bsz < before.micro_bsz:
        return "smaller micro-batches"
    return ""


def describe_near(result: SearchResult) -> list[str]:
    """Return the layouts that would be faster than the best if they fitted, and what makes them fit."""
    from evomesh.plan.layout_choice import difference

    if not result.near:
        return []
    lines = ["faster, but too large:"]
    for near in result.near:
        missing = near_gib(near.missing)
        text = f"  {near.choice}: {missing} too much"
        changes = [difference(near.choice, change) for change in near.changes]
        if changes:
            text += f"; fits with any of: {'; '.join(changes)}"
        lines.append(text)
    return lines


def describe_nearest(result: SearchResult, capacity: int) -> list[str]:
    """Return by how much the layouts nearest to fitting do not fit."""
    too_large = [found for found in result.predictions if found.time is None]
    lines = ["no layout fits; the nearest:"]
    for prediction in too_large[:3]:
        missing = prediction.peak.missing(capacity)
        lines.append(f"  {near_gib(missing)} too much: {prediction.choice}")
    if not too_large:
        lines = ["no layout can fit: weights and gradients alone are too large"]
    return lines


def near_gib(size: float, digits: int = 1) -> str:
    """Return bytes in GiB, as those of GPUs are; what is less than a tenth of one in a smaller unit."""
    return readable(size, digits, least=0.1)


def cost(time: StepTime, price: float) -> float:
    """Return what a billion tokens cost at ``price`` per GPU and hour."""
    gpu_seconds = BILLION / time.tokens_per_second
    return gpu_seconds / SECONDS_PER_HOUR * price
