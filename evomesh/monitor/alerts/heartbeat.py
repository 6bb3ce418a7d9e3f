"""Heartbeats: the figures of a step as JSON, in the form of InternEvo's light monitor."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from evomesh.monitor.alerts.channels import address_of
from evomesh.monitor.alerts.http import post_json
from evomesh.monitor.alerts.sender import BackgroundSender

EVERY_STEPS = 50  # as in InternEvo
# A heartbeat is for whoever waits for the next one: slow steps do not make it rare.
EVERY_S = 60.0
TIMEOUT_S = 3.0


class HeartbeatSender:
    """Sends the figures of a step every minute or fifty steps, the newest only.

    Args:
        key: of the config, for the one warning that nobody answers.
        address: URL, or ``env:NAME``.
        job: sent with each heartbeat.

    Raises:
        UserError: see ``address_of``.
    """

    def __init__(self, key: str, address: str, job: str) -> None:
        url = address_of(key, address, os.environ)
        self._facts = {
            "msg_type": "train_metrics",
            "cluster": os.environ.get("CLUSTER_NAME", ""),
            "job_name": job,
        }
        self._steps_since = 0
        self._last_sent = -math.inf
        # An old figure is worth nothing: neither a queue nor a second attempt.
        self._sender = BackgroundSender[dict[str, Any]](
            key,
            lambda facts: post_json(url, facts, TIMEOUT_S),
            capacity=1,
            pauses=(),
        )

    def after_step(self, values: Mapping[str, float]) -> None:
        """Send the figures of a step if it is time; returns at once."""
        now = time.monotonic()
        self._steps_since += 1
        is_time = now - self._last_sent >= EVERY_S
        if self._steps_since < EVERY_STEPS and not is_time:
            return
        self._steps_since = 0
        self._last_sent = now
        self._sender.put(self._facts | flattened(values))

    def close(self, deadline: float) -> None:
        """Send what waits, until a time of ``time.monotonic``."""
        self._sender.close(deadline)


def flattened(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return figures under names of letters, digits and underscores, null for what JSON cannot express.

    ``tgs (tokens/gpu/second)`` becomes ``tgs`` and ``loss/en`` becomes ``loss_en``.
    """
    flat: dict[str, float | None] = {}
    for name, value in values.items():
        first_word = name.partition(" ")[0]
        plain_name = re.sub(r"[^0-9A-Za-z]", "_", first_word)
        flat[plain_name] = value if math.isfinite(value) else None
    return flat
