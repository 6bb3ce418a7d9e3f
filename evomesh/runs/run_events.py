"""Rows of a page for what happened in a run: its spikes, its samples, and how it compares with its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomesh.monitor.spikes import NEW_RUN
from evomesh.runs.read import Column, Row, RunFiles, number_of

MAX_SPIKES = 500  # the newest
MAX_PROMPTS = 20
MAX_ANSWERS = 60  # of a prompt: evenly spaced, the first and the last among them
MAX_CHARACTERS = 2000  # of a text
COURT_MICRO_BATCHES = 5
COURT_LAYERS = 5
COURT_DOCUMENTS = 10
SPIKE_KEYS = ("step", "time", "what", "loss", "grad_norm", "median", "action")
MICRO_BATCH_KEYS = ("rank", "micro_batch", "suspicion", "loss", "grad_norm")
LAYER_KEYS = ("layer", "grad_norm_ratio", "activation_ratio", "not_finite")
DOCUMENT_KEYS = ("file", "row", "start", "stop", "text")


def spike_rows(run: RunFiles) -> list[Row]:
    """Return the spikes of a run, each with what was found about it and where the run went back to."""
    rows: list[Row] = []
    for line in run.spikes:
        event = line.get("event")
        if event == NEW_RUN:
            rows.clear()
        elif event == "spike":
            rows.append(_spike(line))
        elif event == "court":
            _add_to_spike(rows, line, {"court": _court(line)})
        elif event == "rollback":
            _add_to_spike(rows, line, {"to": line.get("to")})
    return rows[-MAX_SPIKES:]


def _spike(line: Row) -> Row:
    row = _chosen(line, SPIKE_KEYS)
    left_out = line.get("left_out")
    row["left_out"] = left_out if isinstance(left_out, list) else []
    return row


def _add_to_spike(rows: Sequence[Row], line: Row, facts: Row) -> None:
    """Add facts to the newest spike of the line's step."""
    for row in reversed(rows):
        if row["step"] == line.get("step"):
            row.update(facts)
            return


def _court(line: Row) -> Row:
    micro_batches = _objects_of(line, "micro_batches")[:COURT_MICRO_BATCHES]
    layers = _objects_of(line, "layers")[:COURT_LAYERS]
    return {
        "micro_batches": [_micro_batch(found) for found in micro_batches],
        "layers": [_chosen(found, LAYER_KEYS) for found in layers],
    }


def _micro_batch(found: Row) -> Row:
    row = _chosen(found, MICRO_BATCH_KEYS)
    documents = _objects_of(found, "documents")[:COURT_DOCUMENTS]
    row["documents"] = [_document(document) for document in documents]
    return row


def _document(document: Row) -> Row:
    row = _chosen(document, DOCUMENT_KEYS)
    row["text"] = str(row["text"] or "")[:MAX_CHARACTERS]
    return row


def _chosen(row: Row, keys: Sequence[str]) -> Row:
    return {key: row.get(key) for key in keys}


def _objects_of(row: Mapping[str, Any], key: str) -> list[Row]:
    """Return the objects of a list; none where an older version wrote something else."""
    items = row.get(key)
    if not isinstance(items, list):
        return []
    return [item for item in items if isinstance(item, dict)]


def sample_rows(run: RunFiles) -> list[Row]:
    """Return the answers of the model by prompt, in the order of their steps."""
    by_prompt: dict[str, list[Row]] = {}
    for line in run.samples:
        prompt = line.get("prompt")
        text = line.get("text")
        if not isinstance(prompt, str) or not isinstance(text, str):
            continue
        answer = {
            "step": line.get("step"),
            "tokens": line.get("tokens"),
            "text": text[:MAX_CHARACTERS],
        }
        by_prompt.setdefault(prompt, []).append(answer)
    rows = []
    for prompt, answers in list(by_prompt.items())[:MAX_PROMPTS]:
        row = {"prompt": prompt[:MAX_CHARACTERS], "answers": _spaced(answers)}
        rows.append(row)
    return rows


def _spaced(answers: Sequence[Row]) -> list[Row]:
    count = min(MAX_ANSWERS, len(answers))
    places = np.linspace(0, len(answers) - 1, count)
    rounded = np.round(places).astype(int)
    return [answers[place] for place in rounded.tolist()]


def prediction_rows(run: RunFiles, memory: Column | None) -> list[Row]:
    """Return what the plan of a run (``evomesh plan --json``) predicts beside what was measured; none without one.

    Args:
        memory: bytes of the main rank, by step.
    """
    plan = run.plan
    peak = plan.get("peak")
    total = None
    if isinstance(peak, dict):
        total = peak.get("total")
    largest = None
    if memory is not None:
        largest = max(memory.values)
    rows = [
        _prediction("plan_ranks", plan.get("gpus"), run.world_size),
        _prediction("plan_tokens", plan.get("tokens_per_step"), _tokens_per_step(run)),
        _prediction("plan_memory", total, largest),
    ]
    return [row for row in rows if row]


def _prediction(name: str, predicted: Any, measured: float | None) -> Row:
    """Return one row; {} where either side is not known."""
    if number_of(predicted) is None or measured is None:
        return {}
    return {"name": name, "predicted": predicted, "measured": measured}


def _tokens_per_step(run: RunFiles) -> float | None:
    """Return the usual growth of the consumed tokens from one step to the next."""
    column = run.columns().get("num_consumed_tokens")
    if column is None or len(column.steps) < 2:
        return None
    steps = np.diff(column.steps)
    tokens = np.diff(column.values)
    return float(np.median(tokens / steps))
