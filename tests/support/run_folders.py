"""Run folders as a run leaves them, without a run: figures of steps, and a history with a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_lines(path: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    """Write a file of JSON lines; ``torn`` is the half line of a run that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + torn)


def step_row(step: int, **figures: Any) -> dict[str, Any]:
    row = {
        "step": step, "loss": 5.0 - step, "lr": 1e-3, "grad_norm": 1.5, "tgs (tokens/gpu/second)": 100.0,
        "num_consumed_tokens": 64 * (step + 1), "inf_nan_skip_batches": 0, "loss/en": 5.0 - step, "tokens/en": 60,
    }  # fmt: skip
    return row | figures


def history_of_two_starts() -> list[dict[str, Any]]:
    """Steps 0 to 3 from second 100 on; killed; 20 s later from the checkpoint of step 2 again, to step 4."""
    first = {"event": "start", "time": 102.0, "began": 100.0, "step": 0}
    first |= {"world_size": 2, "reason": "scratch"}
    second = first | {"time": 141.0, "began": 140.0, "step": 2, "reason": "resumed"}
    phases = {"data wait": 1.0, "save": 2.0}
    return [
        first,
        {"step": 0, "time": 107.0, "seconds": 4.0, "phases": {"data wait": 0.5}},
        {"step": 1, "time": 112.0, "seconds": 5.0, "phases": phases},
        {"step": 2, "time": 116.0, "seconds": 4.0, "phases": {}},
        {"step": 3, "time": 120.0, "seconds": 4.0, "phases": {"validation": 1.0}},
        second,
        {"step": 2, "time": 146.0, "seconds": 4.0, "phases": {}, "memory": 1000},
        {"step": 3, "time": 150.0, "seconds": 4.0, "phases": {"validation": 1.5}},
        {"step": 4, "time": 154.0, "seconds": 4.0, "phases": {}},
        {"event": "end", "time": 156.0, "step": 5, "outcome": "done", "phases": {"save": 1.5}},
    ]  # fmt: skip


def write_run_folder(folder: Path, /, **start_facts: Any) -> Path:
    """A whole run of five steps with one restart."""
    write_lines(folder / "metrics.jsonl", [step_row(step) for step in range(5)])
    history = history_of_two_starts()
    for row in history:
        if row.get("event") == "start":
            row.update(start_facts)
    write_lines(folder / "history.jsonl", history)
    return folder
