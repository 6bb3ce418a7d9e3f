"""The check of alerts and trackers: can the start of a run use them?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from evomesh.config.schema import Config
from evomesh.diagnose.results import CheckResult, RankPlace
from evomesh.errors import UserError
from evomesh.monitor.alerts.channels import build_channels
from evomesh.monitor.trackers.group import build_tracker
from evomesh.parallel.exchange import Exchange, gather_on_all_ranks

Problem = tuple[str, str]  # what was found, and what to do


def output_results(
    config: Config,
    exchange: Exchange,
    places: Sequence[RankPlace],
    environment: Mapping[str, str] = os.environ,
) -> list[CheckResult]:
    """Return a result on the alerts and one on the trackers that a config has; every rank calls it.

    Nothing is sent, and no tracker is started.
    """
    results = []
    if config.monitor.alert.sends:
        # Each rank makes the channels: any may be the one that has to tell of a crash.
        problems = gather_on_all_ranks(exchange, alert_problems(config, environment))
        results.append(
            _judge("alerts", "each channel has its address", problems, places)
        )
    if config.monitor.trackers:
        problems = gather_on_all_ranks(exchange, tracker_problems(config))
        # The main rank alone feeds them.
        results.append(_judge("trackers", "all can be loaded", problems[:1], places))
    return results


def alert_problems(config: Config, environment: Mapping[str, str]) -> list[Problem]:
    """Return why channels of ``monitor.alert`` cannot be made in this process."""
    errors: list[UserError] = []
    build_channels(config.monitor.alert, environment, errors.append)
    return [_problem(error) for error in errors]


def tracker_problems(config: Config) -> list[Problem]:
    """Return why trackers of ``monitor.trackers`` cannot be made in this process."""
    problems = []
    for setting in config.monitor.trackers:
        try:
            build_tracker(setting)
        except UserError as error:
            problems.append(_problem(error))
    return problems


def _problem(error: UserError) -> Problem:
    found = f"{error.where}: {error.found}" if error.where else error.found
    expected = f"expected: {error.expected}" if error.expected else ""
    return found, error.fix or expected


def _judge(
    check: str,
    well: str,
    problems: Sequence[Sequence[Problem]],
    places: Sequence[RankPlace],
) -> CheckResult:
    """Return the result of the first rank that has a problem, with its first one."""
    for place, of_rank in zip(places, problems, strict=False):
        if of_rank:
            found, fix = of_rank[0]
            return CheckResult(check, "fail", f"{found} ({place})", fix)
    return CheckResult(check, "ok", well)
