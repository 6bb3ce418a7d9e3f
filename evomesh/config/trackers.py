"""``monitor.trackers``: where a run's figures are also sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomesh.config.finding import ConfigFinding

TRACKERS = "monitor.trackers"


@dataclass(frozen=True)
class TrackerOptions:
    """The options of one type of tracker, beside ``type``, and the package that it needs."""

    options: tuple[str, ...]
    package: str = ""


TRACKER_TYPES = {
    "jsonl": TrackerOptions(("path",)),
    "wandb": TrackerOptions(("project", "entity", "mode", "group", "tags"), "wandb"),
    "mlflow": TrackerOptions(("tracking_uri", "experiment"), "mlflow"),
    "swanlab": TrackerOptions(("project", "workspace", "mode"), "swanlab"),
}


def tracker_findings(trackers: Sequence[Mapping[str, Any]]) -> Iterator[ConfigFinding]:
    """Yield trackers without a known type, and options that their type does not have."""
    for number, tracker in enumerate(trackers, 1):
        kind = tracker.get("type")
        if isinstance(kind, str) and ":" in kind:
            continue  # a class of the user, which checks its options itself
        known = TRACKER_TYPES.get(str(kind))
        if known is None:
            yield ConfigFinding(
                (TRACKERS,),
                f"tracker {number} has type {kind!r}",
                expected=f"{', '.join(TRACKER_TYPES)}, or MODULE:CLASS of a custom one",
            )
            continue
        for option in tracker:
            if option != "type" and option not in known.options:
                yield ConfigFinding(
                    (TRACKERS,),
                    f"{kind} has no option {option!r}",
                    expected=f"any of {', '.join(known.options)}; keys and tokens are read from the environment",
                )
