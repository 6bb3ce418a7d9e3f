"""MLflow; credentials are read from the environment by the package itself."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomesh.monitor.trackers.tracker import TrackedRun

LONGEST_PARAM = 500  # characters


class MlflowTracker:
    """A run of MLflow.

    Args:
        tracking_uri: of the server or folder; None: MLFLOW_TRACKING_URI.
        experiment: created if it does not exist.
    """

    def __init__(
        self, tracking_uri: str | None = None, experiment: str = "evomesh"
    ) -> None:
        self._uri = tracking_uri
        self._experiment = experiment
        self._client: Any = None
        self._run_id = ""

    def start(self, run: TrackedRun) -> str:
        # By default a server that is away costs minutes for each call.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(self._uri)
        if run.run_id is not None:
            self._client.update_run(run.run_id, status="RUNNING")
            self._run_id = run.run_id
            return self._run_id
        known = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            self._client.create_experiment(self._experiment)
            if known is None
            else known.experiment_id
        )
        created = self._client.create_run(experiment, run_name=run.name)
        self._run_id = created.info.run_id
        params = [
            Param(key, str(value)[:LONGEST_PARAM]) for key, value in run.config.items()
        ]
        for first in range(0, len(params), 100):  # the most that one call may have
            self._client.log_batch(self._run_id, params=params[first : first + 100])
        return self._run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        milliseconds = int(time.time() * 1000)
        metrics = []
        for name, value in values.items():
            metric = Metric(
                key=_metric_name(name),
                value=float(value),
                timestamp=milliseconds,
                step=step,
            )
            metrics.append(metric)
        self._client.log_batch(self._run_id, metrics=metrics)

    def text(self, name: str, value: str) -> None:
        self._client.log_text(self._run_id, value, f"{name}.txt")

    def file(self, path: Path) -> None:
        self._client.log_artifact(self._run_id, str(path))

    def finish(self, complete: bool) -> None:
        status = "FINISHED" if complete else "KILLED"
        self._client.set_terminated(self._run_id, status=status)


def _metric_name(name: str) -> str:
    """Return a name of the characters that MLflow allows: "tgs (tokens/gpu/second)" has others."""
    return "".join(char if char.isalnum() or char in "_-. /" else "_" for char in name)
