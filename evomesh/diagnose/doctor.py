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
from evomesh.diagnose.results import CheckResult, RankPlace, Report
from evomesh.diagnose.session import Session, session
from evomesh.errors import UserError
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
    one_checkpoint = None if config is None else checkpoint_bytes(config)
    with session(config or Config(), launcher, port) as joined:
        rank = joined.process.rank
        report = Report(show if rank == 0 else _show_nothing)
        facts = _check_machines(joined, limits, report)
        places = [machine.place for machine in facts]
        _check_network(joined, places, report)
        if config is not None:
            _check_config(config, joined, report)
            _check_folders(config, joined, places, one_checkpoint, report)
            report.add(*parity_results(config, joined))
    return Examination(report, rank, joined.process.world_size)


def _show_nothing(_: CheckResult) -> None:
    return


def _check_machines(
    joined: Session, limits: Limits, report: Report
) -> list[MachineFacts]:
    """Add results on versions, devices, clocks and limits; return the facts of all ranks."""
    exchange = joined.exchange
    own = read_facts(joined.process.rank, joined.device, limits)
    messages = exchange.broadcast(exchange.gather(own.as_message()))
    facts = [MachineFacts.of_message(message) for message in messages]
    report.add(judge_versions(facts))
    report.add(judge_devices(facts, current_backend(joined.device)))
    seconds = product_seconds(joined.device)
    products = exchange.broadcast(exchange.gather(seconds))
    report.add(judge_products(facts, products))
    report.add(judge_clocks(facts, clock_offsets(exchange)))
    report.add(*judge_limits(facts))
    return facts


def _check_network(joined: Session, places: list[RankPlace], report: Report) -> None:
    exchange = joined.exchange
    problems = exchange.broadcast(exchange.gather(problem_of_address()))
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
            CheckResult("config", "ok", "the same on all ranks; the layout fits")
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
