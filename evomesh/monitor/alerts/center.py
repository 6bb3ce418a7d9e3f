"""``AlertCenter``: raise an alert from anywhere; it never blocks and never raises."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from evomesh.config.alert import AlertConfig
from evomesh.config.redact import redact_text
from evomesh.errors import UserError, printable
from evomesh.monitor.alerts.alert import (
    FIRST_KINDS,
    LAST_KINDS,
    Alert,
    AlertKind,
    job_title,
)
from evomesh.monitor.alerts.channels import (
    AlertChannel,
    build_channels,
    file_of_run,
)
from evomesh.monitor.alerts.sender import BackgroundSender

logger = logging.getLogger(__name__)

FLUSH_S = 5.0  # how long the end of a run waits for alerts that are not sent yet
LONGEST_TEXT = 8000  # characters


class AlertCenter:
    """Sends alerts to every channel, at most one of a kind per interval.

    Args:
        channels: name -> channel; see ``build_channels``.
        job: names the job in each alert; see ``job_title``.
        min_interval: seconds between two alerts of one kind; those in between are counted.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        channels: Mapping[str, AlertChannel],
        job: str,
        min_interval: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = printable(redact_text(job), keep="")
        self._min_interval = min_interval
        self._clock = clock
        self._lock = threading.Lock()
        self._last_sent: dict[str, float] = {}
        self._suppressed: Counter[str] = Counter()
        self._senders = [
            BackgroundSender[Alert](name, channel.send)
            for name, channel in channels.items()
        ]

    @classmethod
    def open(
        cls,
        config: AlertConfig,
        job_name: str,
        environment: Mapping[str, str] = os.environ,
    ) -> AlertCenter:
        """Return the center that a config describes.

        Raises:
            UserError: see ``build_channels``.
        """
        channels = build_channels(config, environment)
        return cls(channels, job_title(job_name, environment), config.min_interval)

    @classmethod
    def beside_run(
        cls,
        config: AlertConfig,
        job_name: str,
        run_folder: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> AlertCenter:
        """Return the center of a process that watches a run, such as a supervisor.

        The config may be a recorded one, whose secrets are hidden: a channel that cannot
        be made of it is logged once and left out.
        """

        def leave_out(error: UserError) -> None:
            logger.warning("alerts are not sent there from here: %s", error)

        channels = build_channels(config, environment, leave_out)
        job = job_title(job_name, environment)
        center = cls(channels, job, config.min_interval)
        if run_folder is not None:
            center.write_to(run_folder)
        return center

    def write_to(self, run_folder: Path) -> None:
        """Also add alerts to ``alerts.jsonl`` in a run folder from now on, once however often it is asked for."""
        name = str(run_folder)
        if any(sender.name == name for sender in self._senders):
            return
        channel = file_of_run(run_folder)
        self._senders.append(BackgroundSender(name, channel.send))

    def raise_alert(self, kind: AlertKind, text: str) -> None:
        """Send an alert in the background, unless one of its kind was sent a moment ago.

        May be called from any thread.

        Args:
            text: a sentence with the facts; secrets in it are hidden.
        """
        with self._lock:
            if not self._may_send(kind):
                self._suppressed[kind] += 1
                return
            counts = self._counts_for(kind)
        alert = Alert(
            kind=kind,
            text=printable(redact_text(text))[:LONGEST_TEXT],
            job=self.job,
            host=socket.gethostname(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            suppressed=counts,
        )
        for sender in self._senders:
            sender.put(alert)

    def _may_send(self, kind: str) -> bool:
        if kind in FIRST_KINDS or kind in LAST_KINDS:
            return True
        now = self._clock()
        last = self._last_sent.get(kind)
        if last is not None and now - last < self._min_interval:
            return False
        self._last_sent[kind] = now
        return True

    def _counts_for(self, kind: str) -> dict[str, int]:
        """Take the counts that an alert reports: those of its kind, of all kinds if it is the last one."""
        kinds = list(self._suppressed) if kind in LAST_KINDS else [kind]
        counts = {}
        for counted in kinds:
            count = self._suppressed.pop(counted, 0)
            if count:
                counts[counted] = count
        return counts

    def close(self, timeout: float = FLUSH_S) -> None:
        """Wait until all alerts are sent, at most some seconds."""
        deadline = time.monotonic() + timeout
        for sender in self._senders:
            sender.close(deadline)
