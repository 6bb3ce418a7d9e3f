"""The figures of a page of runs as one JSON value: columns for its charts, tables and facts.

The page has no other figures: ``assets/report.js`` draws what is here. Texts
that came from a run are redacted once more, because an old run folder may have been
written before a secret was known.
"""

from __future__ import annotations

import base64
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomesh.config.redact import REDACTED, redact_setting, redact_text, secret_values
from evomesh.monitor.metrics import TGS
from evomesh.monitor.overview import RunOverview, seconds_of
from evomesh.runs.read import Column, Row, RunFiles
from evomesh.runs.run_events import prediction_rows, sample_rows, spike_rows
from evomesh.runs.times import TimeAccount, account_for

MAX_POINTS = 200_000  # of a figure; beyond, pairs of lowest and highest are kept
MAX_ALERTS = 500  # the newest
# What the page shows of how a run was started.
START_FACTS = ("command", "folder", "host", "device", "world_size")
SOFTWARE_FACTS = ("evomesh", "revision", "dirty", "digest", "torch", "python")
MAX_TYPES = 40  # types of data, validation sets, of each figure
AT_START = "val_start/"
PREFIXES = ("loss/", "tokens/", "acc/", "val/", "eval/")
PLAIN_FIGURES = (
    "loss",
    "lr",
    "grad_norm",
    "loss_scale",
    "acc",
    "z_loss",
    TGS,
    "tflops",
    "fwd_bwd_time",
    "num_consumed_tokens",
    "num_samples_in_batch",
)


def payload_of(runs: Sequence[RunFiles], now: float, *, live: bool = False) -> Row:
    """Return what the page of these runs shows at a moment in Unix seconds."""
    secrets = secret_values(os.environ)
    entries = []
    for run in runs:
        entry = _run_entry(run, now)
        entry = _redacted(entry, secrets)
        # After redaction: megabytes of base64, in which no text is hidden.
        entry |= _columns(run)
        entries.append(entry)
    return {
        "written": now,
        "live": live,
        "runs": entries,
    }


def _columns(run: RunFiles) -> Row:
    columns = run.columns()
    _add_validation_at_start(columns)
    figures = _shown_figures(columns)
    figures |= _history_figures(run)
    speed = _speed(columns, run)
    if speed is not None:
        figures["speed"] = speed
    places: dict[str, int] = {}
    encoded = {}
    for name, figure in figures.items():
        steps, values = encode_column(figure)
        # Most figures are of all steps, whose numbers are stored once.
        place = places.setdefault(steps, len(places))
        shown_name = redact_text(name)
        encoded[shown_name] = {"x": place, "y": values}
    return {"steps": list(places), "columns": encoded}


def _add_validation_at_start(columns: dict[str, Column]) -> None:
    """Make the validation before the first step the first point of each validation figure."""
    for name in list(columns):
        if not name.startswith(AT_START):
            continue
        figure = name.removeprefix(AT_START)
        start = columns.pop(name)
        later_name = f"val/{figure}"
        later = columns.setdefault(later_name, Column())
        is_known = later.steps[:1] == start.steps[:1]
        if is_known:
            continue
        later.steps[:0] = start.steps
        later.values[:0] = start.values


def _run_entry(run: RunFiles, now: float) -> Row:
    columns = run.columns()
    account = account_for(run.starts)
    memory = _history_figures(run).get("memory")
    alerts = run.alerts[-MAX_ALERTS:]
    data = _mapping(run.facts.get("data"))
    return {
        "name": _name_of(run),
        "folder": str(run.folder.resolve()),
        "summary": _summary(run, columns, account, now),
        "times": _times(account),
        "saves": _saves(run),
        "skipped": _not_finite(run),
        "spikes": spike_rows(run),
        "samples": sample_rows(run),
        "predictions": prediction_rows(run, memory),
        "alerts": [_alert(row) for row in alerts],
        "data": _data_rows(run),
        "fingerprint": data.get("hash"),
        "facts": _facts(run),
        "config": _config_rows(run.facts),
        "unreadable": run.unreadable,
        "has_history": bool(run.starts),
    }


def _name_of(run: RunFiles) -> str:
    folder = run.folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def _shown_figures(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Return the figures that have a chart, without those of single layers."""
    shown = {name: columns[name] for name in PLAIN_FIGURES if name in columns}
    for prefix in PREFIXES:
        names = [name for name in columns if name.startswith(prefix)]
        for name in names[: 3 * MAX_TYPES]:
            shown[name] = columns[name]
    return shown


def _speed(columns: Mapping[str, Column], run: RunFiles) -> Column | None:
    """Return the tokens per second of all devices together."""
    one_device = columns.get(TGS)
    if one_device is None:
        return None
    sizes = run.world_sizes(one_device.steps)
    values = [
        value * size for value, size in zip(one_device.values, sizes, strict=True)
    ]
    return Column(one_device.steps, values)


def _history_figures(run: RunFiles) -> dict[str, Column]:
    """Return time and memory of each step, from the start that did it last."""
    last: dict[int, Row] = {}
    for start in run.starts:
        for row in start.steps:
            last[row["step"]] = row
    figures: dict[str, Column] = {}
    for step in sorted(last):
        row = last[step]
        known = _step_figures(row)
        for name, value in known.items():
            column = figures.setdefault(name, Column())
            column.steps.append(step)
            column.values.append(value)
    return figures


def _step_figures(row: Row) -> dict[str, float]:
    """Return what a line of the history says of a step's time and memory."""
    phases = _mapping(row.get("phases"))
    named = {
        "seconds": row.get("seconds"),
        "memory": row.get("memory"),
        "wait": phases.get("data wait"),
    }
    figures: dict[str, float] = {}
    for name, value in named.items():
        if isinstance(value, int | float):
            figures[name] = float(value)
    return figures


def encode_column(column: Column) -> tuple[str, str]:
    """Return steps and values of a figure as base64 of 32-bit numbers; what cannot be drawn is NaN."""
    steps = np.asarray(column.steps, dtype=np.float64)
    values = np.asarray(column.values, dtype=np.float64)
    if len(steps) > MAX_POINTS:
        steps, values = reduce_points(steps, values, MAX_POINTS)
    return as_text(steps), as_text(_drawable(values))


def _drawable(values: np.ndarray) -> np.ndarray:
    """Return the values with NaN for all beyond 32 bits, infinity included."""
    largest = np.finfo(np.float32).max
    is_drawable = np.abs(values) <= largest  # False for NaN
    return np.where(is_drawable, values, np.nan)


def as_text(numbers: np.ndarray) -> str:
    """Return 32-bit numbers as base64."""
    content = numbers.astype("<f4").tobytes()
    return base64.b64encode(content).decode()


def reduce_points(
    steps: np.ndarray,
    values: np.ndarray,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return at most ``count`` points: of each stretch of steps its lowest and its highest value."""
    stretches = count // 2
    bounds = np.linspace(0, len(steps), stretches + 1)
    whole_bounds = bounds.astype(int)
    kept: list[int] = []
    for begin, stop in itertools.pairwise(whole_bounds):
        part = values[begin:stop]
        for position in _extremes(part):
            kept.append(begin + position)
    kept_steps = steps[kept]
    kept_values = values[kept]
    return kept_steps, kept_values


def _extremes(values: np.ndarray) -> list[int]:
    """Return the positions of the lowest and the highest value in order; the first one where all are NaN."""
    if np.isnan(values).all():
        return [0]
    lowest = int(np.nanargmin(values))
    highest = int(np.nanargmax(values))
    return sorted({lowest, highest})


def _summary(
    run: RunFiles,
    columns: Mapping[str, Column],
    account: TimeAccount | None,
    now: float,
) -> Row:
    overview = RunOverview(run.folder, now, run.ranks)
    last: Row = {}
    if run.rows:
        last = run.rows[max(run.rows)]
    summary: Row = {
        "state": overview.state,
        "steps": len(run.rows),
        "next_step": _steps_done(run, last),
        "total": _total_steps(run),
        "tokens": last.get("num_consumed_tokens"),
        "skipped": last.get("inf_nan_skip_batches"),
        "world_size": run.world_size,
        "device": run.facts.get("device"),
        "layout": run.facts.get("layout"),
    }
    summary |= _summary_of_figures(columns, run)
    if account is not None:
        summary["wall"] = account.wall
        summary["goodput"] = account.goodput
        rollbacks = sum(start.is_rollback for start in account.starts)
        summary["restarts"] = len(account.starts) - 1 - rollbacks
        summary["rollbacks"] = rollbacks
        summary["restart_cost"] = sum(start.cost for start in account.starts)
    return summary


def _steps_done(run: RunFiles, last_row: Row) -> int:
    """Return how many steps are done: the last ones may have no row, if none of their batches was used."""
    by_rows = int(last_row.get("step", -1)) + 1
    by_ranks = max((rank.step for rank in run.ranks), default=0)
    return max(by_rows, by_ranks)


def _total_steps(run: RunFiles) -> int:
    """Return how many steps the run has in all; 0 if that is not known."""
    of_ranks = max((rank.total for rank in run.ranks), default=0)
    if of_ranks:
        return of_ranks
    config = _mapping(run.facts.get("config"))
    return int(_mapping(config.get("data")).get("total_steps") or 0)


def _summary_of_figures(columns: Mapping[str, Column], run: RunFiles) -> Row:
    """Return last and lowest loss and the usual speed, as far as they are known."""
    summary: Row = {}
    losses = columns.get("loss", Column())
    finite = list(filter(math.isfinite, losses.values))
    if finite:
        summary["loss"] = finite[-1]
        summary["lowest_loss"] = min(finite)
    speeds = _speed(columns, run)
    if speeds is not None:
        median = np.median(speeds.values)
        speed = float(median)
        summary["speed"] = speed
    return summary


def _times(account: TimeAccount | None) -> Row | None:
    if account is None:
        return None
    starts = []
    for start in account.starts:
        row = dict(vars(start))
        row["cost"] = start.cost
        starts.append(row)
    return {"wall": account.wall, "causes": account.causes, "starts": starts}


def _saves(run: RunFiles) -> list[Row]:
    """Return each save: after which step, when, and for how long training waited for it."""
    saves: list[Row] = []
    for start in run.starts:
        # A start without a step has nothing to save, though its end looks for it.
        lines = (*start.steps, start.end) if start.steps else ()
        saved: dict[Any, Row] = {}
        for row in lines:
            seconds = _mapping(row.get("phases")).get("save")
            if seconds is None:
                continue
            is_step = "event" not in row
            step = row["step"] + 1 if is_step else row.get("step")
            if step in saved:
                # The end waited for the save after the last step, and made no second one.
                saved[step]["seconds"] += seconds
                continue
            saved[step] = {
                "step": step,
                "time": row.get("time"),
                "seconds": seconds,
                "final": not is_step,
            }
        saves += saved.values()
    return saves


def _not_finite(run: RunFiles) -> list[Row]:
    """Return the steps whose loss or gradient norm is NaN or infinite."""
    found = []
    for row in run.sorted_rows():
        loss, norm = row.get("loss"), row.get("grad_norm")
        if isinstance(loss, str) or isinstance(norm, str):
            found.append({"step": row["step"], "loss": loss, "grad_norm": norm})
    return found[-MAX_ALERTS:]


def _alert(row: Row) -> Row:
    return {
        "time": seconds_of(row.get("time")),
        "kind": row.get("kind"),
        "text": row.get("text"),
    }


def _data_rows(run: RunFiles) -> list[Row]:
    report = run.facts.get("data_report")
    if not isinstance(report, list):
        return []
    return [row for row in report if isinstance(row, dict)]


def _facts(run: RunFiles) -> Row:
    facts = run.facts
    shown = _known(facts, START_FACTS)
    layout = _mapping(facts.get("layout"))
    if layout:
        sizes = [f"{axis}={size}" for axis, size in layout.items()]
        shown["layout"] = " ".join(sizes)
    software = _mapping(facts.get("software"))
    shown |= _known(software, SOFTWARE_FACTS)
    return shown


def _known(facts: Mapping[str, Any], names: Sequence[str]) -> Row:
    """Return those of the named facts that are recorded and not empty."""
    known: Row = {}
    for name in names:
        value = facts.get(name)
        if value not in (None, ""):
            known[name] = value
    return known


def _config_rows(facts: Row) -> list[list[str]]:
    """Return key, value and origin of every value of the config."""
    config = _mapping(facts.get("config"))
    origins = _mapping(facts.get("origins"))
    secrets = secret_values(os.environ)
    rows = []
    for key, value in flat(config).items():
        text = value
        if not isinstance(value, str):
            text = repr(value)
        shown = redact_setting(key, text, secrets)
        origin = origin_of(key, origins)
        rows.append([key, shown, origin])
    return rows


def origin_of(key: str, origins: Mapping[str, Any]) -> str:
    """Return where a resolved key's value was set; keys of ``run`` are written without their section."""
    from evomesh.config.reading.spellings import written_key

    return str(origins.get(written_key(key), "default"))


def flat(value: Any, key: str = "") -> Row:
    """Return the leaves of nested objects by their dotted keys; infinities as their words."""
    if isinstance(value, dict) and "$float" in value:
        return {key: value["$float"]}
    if not isinstance(value, dict) or not value:
        return {key: value} if key else {}
    leaves: Row = {}
    for name, item in value.items():
        inner = name
        if key:
            inner = f"{key}.{name}"
        leaves |= flat(item, inner)
    return leaves


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    """Return JSON without secrets and with NaN and infinity, which it does not have, as None."""
    match value:
        case dict():
            redacted = {}
            for key, item in value.items():
                redacted[str(key)] = _redacted(item, secrets)
            return redacted
        case list() | tuple():
            return [_redacted(item, secrets) for item in value]
        case float() if not math.isfinite(value):
            return None
        case str():
            return _redacted_text(value, secrets)
        case _:
            return value


def _redacted_text(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return redact_text(text, {})
