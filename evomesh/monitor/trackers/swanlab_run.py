"""SwanLab; its key is read from the environment or its login file by the package itself."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomesh.monitor.trackers.tracker import TrackedRun


class SwanlabTracker:
    """A run of SwanLab.

    Args:
        mode: "online", "local", "offline" or "disabled"; None: SWANLAB_MODE, else online.
    """

    # It sets signal handlers again, which only this thread may.
    finishes_in_main_thread = True

    def __init__(
        self,
        project: str | None = None,
        workspace: str | None = None,
        mode: str | None = None,
    ) -> None:
        self._options = {"project": project, "workspace": workspace, "mode": mode}
        self._swanlab: Any = None

    def start(self, run: TrackedRun) -> str:
        import swanlab

        self._swanlab = swanlab
        run_id = run.run_id or uuid.uuid4().hex[:12]
        # Neither the environment nor the terminal: they may hold what is not redacted.
        probe = {"git": False, "requirements": False, "runtime": False}
        swanlab.init(
            name=run.name,
            id=run_id,
            resume="allow",
            log_dir=str(run.folder / "swanlab"),
            config=dict(run.config),
            settings=swanlab.Settings(probe=probe, terminal={"proxy_type": "none"}),
            **self._options,
        )
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._swanlab.log(dict(values), step=step)

    def text(self, name: str, value: str) -> None:
        self._swanlab.log({name: self._swanlab.Text(value)})

    def file(self, path: Path) -> None:
        self._swanlab.log({path.name: self._swanlab.Text(str(path))})

    def finish(self, complete: bool) -> None:
        self._swanlab.finish(state="success" if complete else "aborted")
