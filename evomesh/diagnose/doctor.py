"""All checks in order: of the machines, of the network, of the folders, and of the config's layout.

Every rank takes part in each check, and all have the same results afterwards: what one
of them finds is gathered first. Rank 0 shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evomesh.config.schema import Config
from evomesh.diagnose.facts import Limits, MachineFacts, read_facts, read_limits
from evomesh.diagnose.folders import (
    SaveFolderCheck,
    checkpoint_bytes,
    read_only_results,
)
from evomesh.diagnose.layouts import parity_results
from evomesh.diagnose.machine import (
    clock_offsets,
    judge_clocks,
    judge_devices,
    judge_limits,
    judge_products,
    judge_versions,
)
from evomesh.diagnose.network import judge_ports, problem_of_address, time_groups
from evomesh.diagnose.outputs import output_results
from evomesh.diagnose.results import CheckResult, RankPlace, Report, report_on_rank_0
from evomesh.diagnose.session import Session, session
from evomesh.errors import UserError
from evomesh.parallel.exchange import gather_on_all_ranks
from evomesh.parallel.process_group import current_backend
from evomesh.train.agreement import config_facts, require_agreement
from evomesh.train.probes import product_seconds


@dataclass(frozen=True)
class Examination:
    """The outcome on this rank: the report, the same on all ranks, and which rank this is."""

    report: Report
    rank: int
    world_size: int


def examine(
    config: Config | None,
    *,
    launcher: str = "auto",
    port: int = 8888,
    show: Callable[[CheckResult], None] = lambda result: None,
) -> Examination:
    """Make all checks; those of a config only where there is one.

    Args:
        show: called on rank 0 with each result as soon as it is known.

    Raises:
        UserError: the layout does not fit the number of processes, the ranks cannot
            meet, or one of them was lost.
    """
    limits = read_limits()
    one_checkpoint = None
    if config is not None:
        one_checkpoint = checkpoint_bytes(config)
    with session(config or Config(), launcher, port) as joined:
        process = joined.process
        report = report_on_rank_0(process.rank, show)
        facts = _check_machines(joined, limits, report)
        places = [machine.place for machine in facts]
        _check_network(joined, places, report)
        if config is not None:
            _check_config(config, joined, report)
            report.add(*output_results(config, joined.exchange, places))
            _check_folders(config, joined, places, one_checkpoint, report)
            results = parity_results(config, joined)
            report.add(*results)
    return Examination(report, process.rank, process.world_size)


def _check_machines(
    joined: Session, limits: Limits, report: Report
) -> list[MachineFacts]:
    """Add results on versions, devices, clocks and limits; return the facts of all ranks."""
    # 1. What each rank knows of its machine.
    exchange = joined.exchange
    own = read_facts(joined.process.rank, joined.device, limits)
    messages = gather_on_all_ranks(exchange, own.as_message())
    facts = [MachineFacts.of_message(message) for message in messages]
    report.add(judge_versions(facts))
    backend = current_backend(joined.device)
    report.add(judge_devices(facts, backend))

    # 2. What has to be measured.
    seconds = product_seconds(joined.device)
    products = gather_on_all_ranks(exchange, seconds)
    report.add(judge_products(facts, products))
    offsets = clock_offsets(exchange)
    report.add(judge_clocks(facts, offsets))
    report.add(*judge_limits(facts))
    return facts


def _check_network(joined: Session, places: list[RankPlace], report: Report) -> None:
    exchange = joined.exchange
    problems = gather_on_all_ranks(exchange, problem_of_address())
    report.add(judge_ports(problems, places, joined.met_at))
    for result in time_groups(joined.grid, joined.device, exchange, places):
        report.add(result)


def _check_config(config: Config, joined: Session, report: Report) -> None:
    """Add the result on whether all ranks read the same config and code."""
    try:
        require_agreement(joined.exchange, config_facts(config))
    except UserError as error:
        report.add(CheckResult("config", "fail", error.found, error.fix))
        return
    for warning in joined.warnings:
        report.add(CheckResult("config", "warn", warning))
    if not joined.warnings:
        report.add(
            CheckResult(
                "config", "ok", "the same on all ranks; the layout fits their number"
            )
        )


def _check_folders(
    config: Config,
    joined: Session,
    places: list[RankPlace],
    one_checkpoint: int | None,
    report: Report,
) -> None:
    saves = SaveFolderCheck(config, joined.exchange, places)
    report.add(*saves.results(one_checkpoint))
    report.add(*read_only_results(config, joined.exchange, places))
