"""Weights & Biases; its key is read from the environment or ~/.netrc by the package itself."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomesh.monitor.trackers.tracker import TrackedRun


class WandbTracker:
    """A run of Weights & Biases.

    Args:
        mode: "online", "offline" or "disabled"; None: WANDB_MODE, else online.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        mode: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "mode": mode,
        }
        self._options |= {"group": group, "tags": None if tags is None else list(tags)}
        self._run: Any = None

    def start(self, run: TrackedRun) -> str:
        import wandb

        run_id = run.run_id or uuid.uuid4().hex[:12]
        # Neither the command line nor the terminal: they may hold what is not redacted.
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, x_disable_meta=True
        )
        self._run = wandb.init(
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=settings,
            **self._options,
        )
        # A resumed run repeats steps, which wandb's own counter cannot.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, name: str, value: str) -> None:
        self._run.summary[name] = value

    def file(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def finish(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
