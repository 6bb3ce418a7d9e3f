"""``evomesh compare``: where two runs part."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.runs.compare import RunComparison

PARTS = ("config", "data", "code", "versions", "layout")
MAX_LINES = 30  # of a part; --json has all


def compare(
    run_a: Annotated[str, typer.Argument(help="A run folder, or one above it.")],
    run_b: Annotated[str, typer.Argument(help="The run to compare it with.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.")
    ] = False,
) -> None:
    """Compare two runs: config, data, code, versions, layout, and the first step whose figures differ.

    Figures are compared to the bit, times and speeds are not. Exit codes: 0 equal; 1 something differs;
    2 they cannot be compared.
    """
    from evomesh.config.redact import redact_text
    from evomesh.runs.compare import compare_runs
    from evomesh.runs.read import find_runs, read_run

    folders = find_runs([run_a, run_b])
    runs = [read_run(folder) for folder in folders]
    found = compare_runs(*runs)
    if as_json:
        content = found.as_json()
        typer.echo(redact_text(json.dumps(content, allow_nan=False)))
    else:
        for folder in folders:
            typer.echo(folder)
        for line in lines_of(found):
            typer.echo(redact_text(line))
    if not found.is_equal:
        sys.exit(1)


def lines_of(found: RunComparison) -> list[str]:
    """Return the comparison as lines of text."""
    lines = []
    for part in PARTS:
        lines += _lines_of_part(found, part)
    ranges = " and ".join(f"{first} to {last}" for first, last in found.steps)
    lines.append(f"steps      {ranges}; {found.common:,} in common")
    if not found.first:
        lines.append("figures    equal to the bit in every common step")
        return lines
    lines.append(
        f"figures    differ in {counted(found.differing_steps, 'step')}, first in step {found.first[0].step}"
    )
    lines += [f"  {one.describe()}" for one in found.first[:MAX_LINES]]
    lines.append("largest differences")
    lines += [f"  {one.describe()}" for one in found.largest[:MAX_LINES]]
    return lines


def _lines_of_part(found: RunComparison, part: str) -> list[str]:
    if part in found.unknown:
        return [f"{part:<10} not recorded by both runs (no history.jsonl)"]
    differences = [one for one in found.facts if one.part == part]
    if not differences:
        return [f"{part:<10} equal"]
    counting = sum(one.counts for one in differences)
    head = f"{counting} differ"
    if counting < len(differences):
        head += f", and {len(differences) - counting} that do not count"
    lines = [f"{part:<10} {head}"]
    lines += [f"  {one.describe()}" for one in differences[:MAX_LINES]]
    left = len(differences) - MAX_LINES
    if left > 0:
        lines.append(f"  and {left} more (--json)")
    return lines
