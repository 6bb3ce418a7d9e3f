"""What ``evomesh doctor`` says of alerts and trackers: the same as the start of a run."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.config.schema import Config
from evomesh.diagnose.outputs import output_results
from evomesh.diagnose.results import CheckResult, RankPlace
from evomesh.errors import UserError
from evomesh.monitor.alerts.channels import build_channels
from evomesh.parallel.exchange import SingleProcessExchange

SLACK = {"type": "slack", "url": "env:SLACK_WEBHOOK_URL"}
ADDRESS = {"SLACK_WEBHOOK_URL": "https://hooks.slack.com/services/x"}


def results_of(environment: dict[str, str], **monitor: Any) -> list[CheckResult]:
    config = Config.model_validate({"monitor": monitor})
    places = [RankPlace(0, "n0")]
    return output_results(config, SingleProcessExchange(), places, environment)


def test_without_alerts_and_trackers_there_is_nothing_to_say() -> None:
    assert results_of({}) == []


def test_a_channel_without_its_address_fails_as_the_start_of_a_run_does() -> None:
    alert = {"channels": (SLACK,)}
    (result,) = results_of({}, alert=alert)
    config = Config.model_validate({"monitor": {"alert": alert}})
    with pytest.raises(UserError) as refused:
        build_channels(config.monitor.alert, {})
    assert (result.check, result.status) == ("alerts", "fail")
    assert refused.value.found in result.found
    assert result.found.endswith("(rank 0 on n0)")
    assert result.fix == refused.value.fix
    (result,) = results_of(ADDRESS, alert=alert)
    assert result.status == "ok"


def test_a_tracker_that_cannot_be_loaded_fails() -> None:
    (result,) = results_of({}, trackers=({"type": "no_such_module:Tracker"},))
    assert (result.check, result.status) == ("trackers", "fail")
    assert "no_such_module" in result.found
    assert result.fix.startswith("expected: MODULE:CLASS")
    (result,) = results_of({}, trackers=({"type": "jsonl"},))
    assert result.status == "ok"
