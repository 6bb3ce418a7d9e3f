"""Feed several trackers without waiting for them: one that fails or is slow never stops the run, and is named once."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from evomesh.config.redact import redact_text
from evomesh.config.trackers import TRACKER_TYPES, TRACKERS, custom_trackers
from evomesh.errors import UserError
from evomesh.monitor.trackers.tracker import TrackedRun, Tracker
from evomesh.outside_errors import not_installed

logger = logging.getLogger(__name__)
IDS_FILE = "trackers.json"  # in the run folder: type -> id of the tracked run
QUEUE_LENGTH = 1000  # calls that a slow tracker may be behind
FINISH_SECONDS = 30.0
_CLASSES = {
    "jsonl": "evomesh.monitor.trackers.jsonl:JsonLinesTracker",
    "wandb": "evomesh.monitor.trackers.wandb_run:WandbTracker",
    "mlflow": "evomesh.monitor.trackers.mlflow_run:MlflowTracker",
    "swanlab": "evomesh.monitor.trackers.swanlab_run:SwanlabTracker",
    "tensorboard": "evomesh.monitor.trackers.tensorboard_run:TensorBoardTracker",
}


def build_tracker(setting: Mapping[str, Any]) -> Tracker:
    """Return the tracker of one item of ``monitor.trackers``.

    Raises:
        UserError: its package is not installed, or there is no such class, or it does not take these options.
    """
    options = dict(setting)
    kind = options.pop("type")
    known = TRACKER_TYPES.get(kind)
    package = known.package if known is not None else ""
    if package and importlib.util.find_spec(package) is None:
        where = f"{TRACKERS}, type {kind!r}"
        raise not_installed(f"the package {package}", "trackers", where=where)
    try:
        tracker_class = custom_trackers.get(kind) or _import_class(kind)
        tracker: Tracker = tracker_class(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"tracker {kind!r} cannot be used: {error}",
            where=TRACKERS,
            expected="MODULE:CLASS that can be imported and takes the other options",
            code="EVO-ALERT-002",
        ) from None
    return tracker


def _import_class(kind: str) -> Callable[..., Tracker]:
    """Import the class of a known type, or that of MODULE:CLASS."""
    module_name, _, name = _CLASSES.get(kind, kind).partition(":")
    module = importlib.import_module(module_name)
    tracker_class: Callable[..., Tracker] = getattr(module, name)
    return tracker_class


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put back the handlers by which signals stop a run, should a package replace them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class TrackerFeed:
    """One tracker with its queue and thread."""

    def __init__(self, key: str, tracker: Tracker) -> None:
        self.key = key
        self.tracker = tracker
        self.run_id: str | None = None
        self.has_failed = False
        self._calls: Queue[Callable[[], object]] = Queue(QUEUE_LENGTH)
        self._ends = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name=f"tracker {key}", daemon=True
        )

    def start(self, run: TrackedRun) -> None:
        """Start the tracker in this thread, as some packages ask for, and then its own."""
        try:
            with _own_signal_handlers():
                self.run_id = self.tracker.start(run)
        except Exception as error:  # whatever a package may raise
            self._fail(error)
            return
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        """Queue a call; one that is too far behind is given up."""
        if self.has_failed:
            return
        try:
            self._calls.put_nowait(call)
        except Full:
            self._fail(RuntimeError(f"it is {QUEUE_LENGTH} calls behind"))

    def finish(self, complete: bool) -> None:
        """Wait for what is queued, for some seconds."""
        if self.run_id is None:
            return
        in_main_thread = getattr(self.tracker, "finishes_in_main_thread", False)
        if not in_main_thread:
            self.put(lambda: self.tracker.finish(complete))
        self._ends.set()
        self._thread.join(FINISH_SECONDS)
        if self.has_failed:
            return
        if self._thread.is_alive():
            self._fail(RuntimeError(f"it did not finish within {FINISH_SECONDS:g} s"))
        elif in_main_thread:
            try:
                with _own_signal_handlers():
                    self.tracker.finish(complete)
            except Exception as error:
                self._fail(error)

    def _work(self) -> None:
        while not self.has_failed:
            try:
                call = self._calls.get(timeout=0.2)
            except Empty:
                if self._ends.is_set():
                    return
                continue
            try:
                call()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.has_failed = True
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning(
            "tracker %s gets nothing more, and training continues: %s: %s",
            self.key,
            type(error).__name__,
            redact_text(first_line),
        )


class TrackerGroup:
    """All trackers of a run.

    Args:
        settings: ``monitor.trackers``.
        redact: hides in a text what is secret in this run.

    Raises:
        UserError: one of them cannot be used.
    """

    def __init__(
        self, settings: Sequence[Mapping[str, Any]], redact: Callable[[str], str]
    ) -> None:
        self._redact = redact
        self._feeds: list[TrackerFeed] = []
        for setting in settings:
            key = self._key_for(setting["type"])
            tracker = build_tracker(setting)
            feed = TrackerFeed(key, tracker)
            self._feeds.append(feed)

    def _key_for(self, kind: str) -> str:
        """Return a key for one more tracker of a kind: ``wandb``, then ``wandb#2``."""
        same = [feed for feed in self._feeds if feed.key.startswith(kind)]
        if not same:
            return kind
        number = len(same) + 1
        return f"{kind}#{number}"

    def start(
        self, name: str, folder: Path, config: Mapping[str, Any], step: int
    ) -> None:
        """Start every tracker; a resumed run continues the tracked run whose id is in its folder."""
        if not self._feeds:
            return
        ids: dict[str, str] = {}
        if step > 0:
            ids = _read_ids(folder / IDS_FILE)
        text = json.dumps(dict(config), default=str)
        clean = json.loads(self._redact(text))
        for feed in self._feeds:
            run_id = ids.get(feed.key)
            run = TrackedRun(name, folder, clean, run_id, step)
            feed.start(run)
            if feed.run_id is not None:
                ids[feed.key] = feed.run_id
        _write_ids(folder / IDS_FILE, ids)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for feed in self._feeds:
            feed.put(_call(feed.tracker.scalars, step, dict(values)))

    def text(self, name: str, value: str) -> None:
        clean = self._redact(value)
        for feed in self._feeds:
            feed.put(_call(feed.tracker.text, name, clean))

    def file(self, path: Path) -> None:
        for feed in self._feeds:
            feed.put(_call(feed.tracker.file, path))

    def finish(self, complete: bool) -> None:
        for feed in self._feeds:
            feed.finish(complete)


def _call(method: Callable[..., object], *values: Any) -> Callable[[], object]:
    return lambda: method(*values)


def _read_ids(path: Path) -> dict[str, str]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


def _write_ids(path: Path, ids: Mapping[str, str]) -> None:
    content = json.dumps(ids) + "\n"
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        logger.warning("cannot write %s: %s", path.name, error.strerror)
