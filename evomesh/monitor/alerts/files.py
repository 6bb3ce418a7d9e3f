"""Alerts in files: ``alerts.jsonl`` of the run folder, and the text file of ``alert_file_path``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from evomesh.monitor.alerts.alert import Alert

ALERTS_FILE = "alerts.jsonl"


class JsonLinesChannel:
    """A file with one JSON object per alert."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, alert: Alert) -> None:
        append_line(self._path, json.dumps(asdict(alert)))


class TextFileChannel:
    """A file for people, one paragraph per alert."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, alert: Alert) -> None:
        append_line(self._path, f"{alert.title}\n{alert.body}\n")


def append_line(path: Path, text: str) -> None:
    """Add a text with a line break to a file in one write, so that texts of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{text}\n".encode("utf-8", "replace")
    # The system moves to the end and writes in one step, which buffered files do not.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
