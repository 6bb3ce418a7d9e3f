"""``monitor.trackers``: where a run's figures are also sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from evomesh.config.finding import ConfigFinding

TRACKERS = "monitor.trackers"
TrackerClass = TypeVar("TrackerClass", bound=Callable[..., Any])


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
    "tensorboard": TrackerOptions(("folder",)),
}


class TrackerRegistry:
    """Classes of trackers that users have registered, by type."""

    def __init__(self) -> None:
        self._classes: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[TrackerClass], TrackerClass]:
        """Return a decorator that adds a class of trackers under the type ``name``.

        The class has the methods of ``evomesh.monitor.trackers.tracker.Tracker``. What
        an item of ``monitor.trackers`` has beside ``type`` are arguments of the class.

        Raises:
            ValueError: a type of evomesh has this name.
        """
        if name in TRACKER_TYPES:
            raise ValueError(f"{name} is a tracker of evomesh; register another name")

        def add(tracker: TrackerClass) -> TrackerClass:
            self._classes[name] = tracker
            return tracker

        return add

    def get(self, name: str) -> Callable[..., Any] | None:
        return self._classes.get(name)

    def names(self) -> list[str]:
        return sorted(self._classes)


custom_trackers = TrackerRegistry()
register_tracker = custom_trackers.register


def tracker_findings(trackers: Sequence[Mapping[str, Any]]) -> Iterator[ConfigFinding]:
    """Yield trackers without a known type, and options that their type does not have."""
    for number, tracker in enumerate(trackers, 1):
        kind = tracker.get("type")
        name = str(kind)
        is_custom = ":" in name or custom_trackers.get(name) is not None
        if is_custom:
            continue  # a class of the user, which checks its options itself
        known = TRACKER_TYPES.get(name)
        if known is None:
            names = ", ".join([*TRACKER_TYPES, *custom_trackers.names()])
            yield ConfigFinding(
                (TRACKERS,),
                f"tracker {number} has type {kind!r}",
                expected=f"{names}, MODULE:CLASS, or a type that evomesh.register_tracker has added before",
                code="EVO-ALERT-002",
            )
            continue
        for option in tracker:
            if option != "type" and option not in known.options:
                yield ConfigFinding(
                    (TRACKERS,),
                    f"{kind} has no option {option!r}",
                    expected=f"any of {', '.join(known.options)}; keys and tokens are read from the environment",
                    code="EVO-ALERT-002",
                )
