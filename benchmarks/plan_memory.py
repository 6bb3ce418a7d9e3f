"""Compare the memory that ``evomesh plan`` predicts with that of real steps on gloo, and print a table.

    python benchmarks/plan_memory.py [--only NAME ...]

Every layout trains two steps of a small model in real ranks, whose tensors are followed operator by operator
(tests/support/live_tensors.py, which shares no code with the planner). The planner traces the same rank in a world of
torch's fake backend. Of a layout's ranks the row shows the one that is predicted worst. Bytes are those of tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from evomesh.config.layout import run_sizes
from evomesh.plan.step_memory import trace_step_memory
from evomesh.plan.trace import TracedDevice
from tests.support.memory_layouts import HELD, LAYOUTS, MemoryLayout, measure_step
from tests.support.pool import Pool

KIB = 1024
REST = "activations and buffers"


@dataclass(frozen=True)
class ComparedMemory:
    """Peaks of one rank by kind."""

    layout: MemoryLayout
    rank: int
    predicted: dict[str, int]
    measured: dict[str, int]

    @property
    def error(self) -> float:
        """What is predicted too much, as a share of what was measured."""
        return sum(self.predicted.values()) / sum(self.measured.values()) - 1

    def row(self) -> str:
        """The row of the table."""
        cells = [self.layout.name, f"{self.rank} of {self.layout.ranks}"]
        for nbytes in (self.predicted, self.measured):
            cells.append(f"{sum(nbytes.values()) / KIB:,.0f}")
        cells.append(f"{self.error:+.1%}")
        for kind in (*HELD, REST):
            pair = [peak.get(kind, 0) / KIB for peak in (self.predicted, self.measured)]
            cells.append(" / ".join(f"{kib:,.0f}" for kib in pair))
        return f"| {' | '.join(cells)} |"


def predict(layout: MemoryLayout, rank: int) -> dict[str, int]:
    """Return the predicted bytes at the peak, in the kinds that were measured."""
    timeline = trace_step_memory(layout.config, layout.ranks, rank, TracedDevice.CPU)
    at_peak = timeline.at_peak
    kinds = {kind: at_peak.pop(kind, 0) for kind in HELD}
    kinds[REST] = sum(at_peak.values())
    return kinds


def different_ranks(layout: MemoryLayout) -> Sequence[int]:
    """Return a rank of each pipeline stage; the others hold the same."""
    sizes = run_sizes(layout.config, layout.ranks)
    return range(0, layout.ranks, sizes.ranks_per_stage)


def compare(pool: Pool, layout: MemoryLayout) -> list[ComparedMemory]:
    """Measure and predict the ranks of a layout that differ."""
    measured = pool.run(measure_step, layout, ranks=layout.ranks, timeout=600)
    found = []
    for rank in different_ranks(layout):
        predicted = predict(layout, rank)
        found.append(ComparedMemory(layout, rank, predicted, measured[rank]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[one.name for one in LAYOUTS])
    options = parser.parse_args()
    kinds = [f"{kind}, KiB" for kind in (*HELD, REST)]
    heads = ["layout", "rank", "predicted, KiB", "measured, KiB", "error", *kinds]
    print(f"| {' | '.join(heads)} |")
    print("|---|--:" + "|--:" * (len(heads) - 2) + "|")
    errors = []
    with closing(Pool()) as pool:
        for layout in LAYOUTS:
            if layout.name not in options.only:
                continue
            compared = compare(pool, layout)
            worst = max(compared, key=lambda one: abs(one.error))
            errors.append(abs(worst.error))
            print(worst.row(), flush=True)
    within = sum(error <= 0.03 for error in errors)
    print(
        f"\n{within} of {len(errors)} layouts are within 3 %; the largest error is {max(errors):.1%}."
    )


if __name__ == "__main__":
    main()
