"""Layouts of a config in small, each against one process: the parity check, and ``evomesh parity``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from evomesh.config.layout import check_world, run_parallel, smallest_world
from evomesh.config.loader import load_config
from evomesh.config.schema import Config
from evomesh.diagnose.parity.run import (
    Parity,
    compare_dtypes,
    compare_with,
    train_alone,
)
from evomesh.diagnose.parity.shrink import shrink, with_dtype
from evomesh.diagnose.results import CheckResult, Report, report_on_rank_0
from evomesh.diagnose.session import Session, session
from evomesh.errors import UserError
from evomesh.parallel.build import build_grid
from evomesh.parallel.exchange import gather_on_all_ranks

# Short names of what a layout is made of, and the keys of a config that they set.
KEYS = {
    "tensor": "parallel.tensor.size",
    "mode": "parallel.tensor.mode",
    "pipeline": "parallel.pipeline.size",
    "schedule": "parallel.pipeline.schedule",
    "chunks": "model.num_chunks",
    "weight": "parallel.weight.size",
    "zero1": "parallel.zero1.size",
    "fsdp": "parallel.zero1.fsdp",
}
AS_WRITTEN = "config"


@dataclass(frozen=True)
class NamedLayout:
    """A layout as the user wrote it, and the config with it."""

    name: str
    config: Config


def read_layouts(
    path: str, names: Sequence[str], overrides: Sequence[str] = ()
) -> list[NamedLayout]:
    """Return the config of ``path`` in each of the layouts.

    Args:
        names: such as ``tensor=2,mode=msp``, or ``config`` for the layout of the file.

    Raises:
        UserError: a layout that cannot be read, or that the config does not allow.
    """
    layouts = []
    for name in names:
        settings = [*overrides, *layout_overrides(name)]
        loaded = load_config(path, settings)
        layouts.append(NamedLayout(name, loaded.config))
    return layouts


def layout_overrides(name: str) -> list[str]:
    """Return the overrides that a layout means: ``tensor=2,fsdp=True`` -> two settings.

    What is not named has the size of one rank, so that a layout says all of it.

    Raises:
        UserError: a part that is not KEY=VALUE, or an unknown key.
    """
    if name == AS_WRITTEN:
        return []
    values = {"tensor": "1", "pipeline": "1", "weight": "1", "chunks": "1"}
    values |= {"zero1": "-1", "fsdp": "False", "mode": "mtp", "schedule": "None"}
    for part in name.split(","):
        key, equals, value = part.strip().partition("=")
        if key not in KEYS or not equals or not value:
            raise UserError(
                f"{part!r} in the layout {name!r}",
                where="--layouts",
                expected=f"KEY=VALUE with one of {', '.join(KEYS)}, separated by commas; or {AS_WRITTEN}",
                fix="for example: --layouts tensor=2,mode=msp pipeline=2",
                code="EVO-CLI-002",
            )
        values[key] = value
    return [f"{KEYS[key]}={value}" for key, value in values.items()]


def ranks_for(layouts: Sequence[NamedLayout]) -> int:
    """Return the fewest processes in which every layout fits."""
    worlds = [smallest_world(layout.config.parallel) for layout in layouts]
    return math.lcm(*worlds)


@dataclass(frozen=True)
class LayoutsOutcome:
    """The outcome on this rank: the report, the same on all ranks, and which rank this is."""

    report: Report
    rank: int
    world_size: int


def compare_layouts(
    layouts: Sequence[NamedLayout],
    *,
    launcher: str = "auto",
    port: int = 8888,
    show: Callable[[CheckResult], None] = lambda result: None,
) -> LayoutsOutcome:
    """Compare each layout with one process, on all ranks of the job.

    Args:
        show: called on rank 0 with each result as soon as it is known.

    Raises:
        UserError: a layout does not fit the number of processes, or the ranks cannot meet.
    """
    with session(Config(), launcher, port) as joined:
        rank = joined.process.rank
        world_size = joined.process.world_size
        report = report_on_rank_0(rank, show)
        for layout in layouts:
            check_world(layout.config, world_size)
            parallel = run_parallel(layout.config, world_size)
            grid = build_grid(parallel, world_size, rank)
            in_layout = replace(joined, grid=grid)
            for result in parity_results(layout.config, in_layout):
                named = replace(result, check=layout.name)
                report.add(named)
    return LayoutsOutcome(report, rank, world_size)


def parity_results(config: Config, joined: Session) -> list[CheckResult]:
    """Train the config in small, in its layout and in one process; return a result for each dtype."""
    try:
        small = shrink(config, joined.process.world_size)
    except ValueError as error:  # sizes of a custom model that are not free
        reason = str(error).partition("\n")[0]
        return [_not_compared(reason)]
    results = []
    for dtype in compare_dtypes(config):
        result = _parity_result(with_dtype(small, dtype), joined)
        results.append(result)
        if result.status != "ok":  # another dtype would only show it again
            break
    return results


def _parity_result(small: Config, joined: Session) -> CheckResult:
    # In one process first, where no other rank waits: a custom model may not take sizes
    # that it was not written for.
    exchange = joined.exchange
    reason = ""
    whole = None
    try:
        whole = train_alone(small, joined.grid, joined.device)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    reasons = gather_on_all_ranks(exchange, reason)
    for text in reasons:
        if text:
            return _not_compared(text)
    assert whole is not None
    try:
        parity = compare_with(whole, small, joined.grid, joined.device, exchange)
    except UserError as error:
        return CheckResult("parity", "fail", error.found, error.fix)
    return judge_parity(parity)


def judge_parity(parity: Parity) -> CheckResult:
    """Refuse a layout that does not compute what one process does."""
    if parity.is_equal:
        return CheckResult("parity", "ok", f"two steps in small, {parity.describe()}")
    return CheckResult(
        "parity",
        "fail",
        f"two steps in small, {parity.describe()}",
        "look at that module's communication (a custom model's builder, a patched layer); a wrong sum on one host only "
        "points to its device, driver or network: NCCL_DEBUG=INFO, and the same without that host",
    )


def _not_compared(reason: str) -> CheckResult:
    return CheckResult(
        "parity",
        "warn",
        f"the model could not be trained in small: {reason}",
        "let the model's builder take every size from its config",
    )
