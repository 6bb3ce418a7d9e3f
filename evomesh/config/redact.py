"""Redact secrets in what a run writes: its config record, its log and TensorBoard."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

REDACTED = "<redacted>"
SECRET_KEYS = ("monitor.alert.feishu_alert_address", "monitor.alert.light_monitor_address")
SHORTEST_SECRET = 8  # shorter values of environment variables are words like "1" and "true"

_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_WEBHOOK_KEY = re.compile(r"(?<=/hook/)[\w-]+")
_SECRET_ARGUMENT = re.compile(
    r"((?:key|token|secret|password|signature|credential)[\w-]*=)[^&\s]+", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(
    r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|ACCESS_KEY_ID)(_|$)", re.IGNORECASE
)


def redact_setting(key: str, text: str) -> str:
    """Redact a whole secret config value; in any other value, credentials in URLs and their queries.

    Args:
        key: dotted key of the resolved config.
    """
    if key in SECRET_KEYS and text:
        return REDACTED
    # Not applied to a log, where "num_consumed_tokens=131072" looks like a secret in a query.
    return _SECRET_ARGUMENT.sub(rf"\1{REDACTED}", _URL_CREDENTIALS.sub(REDACTED, text))


def redact_log(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Redact the values of secret environment variables, credentials in URLs, and webhook keys."""
    for name, value in environment.items():
        if len(value) >= SHORTEST_SECRET and _SECRET_VARIABLE.search(name):
            text = text.replace(value, REDACTED)
    return _WEBHOOK_KEY.sub(REDACTED, _URL_CREDENTIALS.sub(REDACTED, text))
