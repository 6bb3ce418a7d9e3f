"""Two runs beside each other: what was set, fed and run differently, and the first step whose figures differ.

Figures are compared exactly: ``metrics.jsonl`` has them in full precision, and two runs
with the same config, data, code and layout are equal to the bit. Times and speeds are no
part of it, and neither are the places where a run keeps its files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evomesh.config.record import PLACES
from evomesh.errors import UserError
from evomesh.monitor.metrics import TGS
from evomesh.runs.payload import flat
from evomesh.runs.read import Row, RunFiles, number_of

# Beside those in which nodes may differ: names and folders of a run.
NAMES_OF_RUN = (
    "run.job_name",
    "ckpt.save_ckpt_folder",
    "ckpt.stop_file_path",
    "ckpt.load_ckpt_info",
    "monitor",
)
# Times, and what a batch of one rank has: a layout may divide equal steps in another way.
NOT_COMPARED = (
    TGS,
    "tflops",
    "fwd_bwd_time",
    "micro_num",
    "num_samples_in_batch",
    "largest_length",
    "largest_batch",
    "smallest_batch",
)
FIRST_FIGURES = ("loss", "grad_norm", "lr")  # named first where several differ
CODE = ("evomesh", "revision", "dirty", "digest")
VERSIONS = ("torch", "python")


@dataclass(frozen=True)
class FactDifference:
    """A setting, a file or a version that is not the same in both runs.

    Attributes:
        counts: it can change what is computed.
    """

    part: str
    name: str
    first: Any
    second: Any
    counts: bool = True

    def describe(self) -> str:
        """Return one line."""
        note = "" if self.counts else " (a place or a name: does not count)"
        return f"{self.name}: {_shown(self.first)} | {_shown(self.second)}{note}"


@dataclass(frozen=True)
class FigureDifference:
    """A figure of one step in both runs.

    Attributes:
        relative: |a - b| / |a|; infinite where a number is not finite in one of them only.
    """

    step: int
    name: str
    first: float
    second: float
    relative: float

    def describe(self) -> str:
        """Return one line."""
        distance = self.second - self.first
        return (
            f"step {self.step}: {self.name} {self.first!r} | {self.second!r} "
            f"({distance:+.3g}, relative {self.relative:.2g})"
        )


@dataclass
class RunComparison:
    """The result of comparing two runs.

    Attributes:
        facts: differences of config, data, code, versions and layout.
        unknown: parts that one of the runs has not recorded.
        common: number of steps that both have.
        steps: first and last step of each run.
        first: figures of the first step that differs.
        largest: of each figure that differs, the step with the largest relative distance.
        differing_steps: number of steps of which a figure differs.
    """

    facts: list[FactDifference] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    common: int = 0
    steps: list[list[int]] = field(default_factory=list)
    first: list[FigureDifference] = field(default_factory=list)
    largest: list[FigureDifference] = field(default_factory=list)
    differing_steps: int = 0

    @property
    def is_equal(self) -> bool:
        """Return whether nothing differs that counts."""
        return not self.first and not any(one.counts for one in self.facts)

    def as_json(self) -> Row:
        """Return strict JSON: numbers that it does not have are texts."""
        content = asdict(self) | {"equal": self.is_equal}
        strict = _strict(content)
        assert isinstance(strict, dict)
        return strict


def compare_runs(first: RunFiles, second: RunFiles) -> RunComparison:
    """Compare what both runs recorded.

    Raises:
        UserError: they have no step in common, so no figure can be compared.
    """
    common = sorted(first.rows.keys() & second.rows.keys())
    if not common:
        raise UserError(
            f"the runs have no step in common: {_range(first)} and {_range(second)}",
            where=f"{first.folder} and {second.folder}",
            expected="two runs that did some of the same steps",
            code="EVO-RUN-005",
        )
    comparison = RunComparison(common=len(common))
    comparison.steps = [[min(run.rows), max(run.rows)] for run in (first, second)]
    _compare_facts(comparison, first.facts, second.facts)
    largest: dict[str, FigureDifference] = {}
    for step in common:
        differences = list(
            figure_differences(step, first.rows[step], second.rows[step])
        )
        if not differences:
            continue
        comparison.differing_steps += 1
        if not comparison.first:
            comparison.first = differences
        for one in differences:
            known = largest.get(one.name)
            if known is None or one.relative > known.relative:
                largest[one.name] = one
    comparison.largest = sorted(largest.values(), key=_order)
    return comparison


def _range(run: RunFiles) -> str:
    if not run.rows:
        return "none"
    return f"{min(run.rows)} to {max(run.rows)}"


def _compare_facts(comparison: RunComparison, first: Row, second: Row) -> None:
    """Add what differs between the starts of two runs, or that it is not recorded."""
    if not first or not second:
        comparison.unknown = ["config", "data", "code", "versions", "layout"]
        return
    facts_of_part = {
        "config": _config_facts,
        "data": _data_facts,
        "code": _code_facts,
        "versions": _version_facts,
        "layout": _layout_facts,
    }
    for part, of_start in facts_of_part.items():
        ours = of_start(first)
        theirs = of_start(second)
        _add_differences(comparison, part, ours, theirs)


def _config_facts(facts: Row) -> Row:
    """Return the values of the config by their dotted keys."""
    return flat(facts.get("config") or {})


def _code_facts(facts: Row) -> Row:
    return _software_facts(facts, CODE)


def _version_facts(facts: Row) -> Row:
    return _software_facts(facts, VERSIONS)


def _software_facts(facts: Row, names: Sequence[str]) -> Row:
    """Return what a start recorded of its software under these names."""
    software = facts.get("software") or {}
    return {name: software.get(name) for name in names}


def _data_facts(facts: Row) -> Row:
    """Return the fingerprint of the data and of each of its files."""
    data = facts.get("data") or {}
    values: Row = {"fingerprint": data.get("hash")}
    for file in data.get("files") or []:
        known = [f"{key} {file[key]}" for key in ("tokens", "hash") if key in file]
        values[str(file.get("file"))] = ", ".join(known)
    return values


def _layout_facts(facts: Row) -> Row:
    layout = facts.get("layout") or {}
    return {**layout, "ranks": facts.get("world_size"), "device": facts.get("device")}


def _add_differences(
    comparison: RunComparison,
    part: str,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> None:
    for name in dict.fromkeys([*first, *second]):
        values = first.get(name), second.get(name)
        if values[0] == values[1]:
            continue
        is_place = part == "config" and _is_place(name)
        difference = FactDifference(part, name, *values, counts=not is_place)
        comparison.facts.append(difference)


def _is_place(key: str) -> bool:
    names = (*PLACES, *NAMES_OF_RUN)
    return any(key == name or key.startswith(f"{name}.") for name in names)


def figure_differences(
    step: int, first: Row, second: Row
) -> Iterator[FigureDifference]:
    """Yield each figure that both rows have and that is not the same, the loss before all others."""
    found = []
    for name in first.keys() & second.keys():
        value = number_of(first[name])
        other = number_of(second[name])
        if name in NOT_COMPARED or value is None or other is None:
            continue
        distance = relative_distance(value, other)
        if distance:
            difference = FigureDifference(step, name, value, other, distance)
            found.append(difference)
    yield from sorted(found, key=_order)


def _order(difference: FigureDifference) -> tuple[int, str]:
    name = difference.name
    is_first = name in FIRST_FIGURES
    position = FIRST_FIGURES.index(name) if is_first else len(FIRST_FIGURES)
    return position, name


def relative_distance(first: float, second: float) -> float:
    """Return |a - b| / |a|; 0 for equal numbers and for two NaN, infinite where only one is finite or a is 0."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    distance = abs(first - second)
    if not math.isfinite(distance) or first == 0:
        return math.inf
    return distance / abs(first)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _strict(value: Any) -> Any:
    match value:
        case dict():
            return {key: _strict(item) for key, item in value.items()}
        case list():
            return [_strict(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value
