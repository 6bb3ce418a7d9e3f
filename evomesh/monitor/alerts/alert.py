"""``Alert``: one event of a run, and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evomesh.quantities import counted

AlertKind = Literal[
    "started",
    "resumed",
    "done",
    "stopped",
    "crash",
    "hang",
    "loss spike",
    "not finite",
    "slow rank",
    "disk nearly full",
    "checkpoint failed",
]
# They happen once in a process: never suppressed. The last ones also report what was.
FIRST_KINDS = ("started", "resumed")
LAST_KINDS = ("done", "stopped", "crash")

# Variables with the number of the job, the first that is set; as InternEvo reads them.
_JOB_VARIABLES = ("SLURM_JOB_ID", "KUBERNETES_POD_NAME", "MLP_TASK_ID")


@dataclass(frozen=True)
class Alert:
    """One event, without secrets.

    Attributes:
        job: see ``job_title``.
        host: where it was raised.
        time: as ``2026-01-31T23:59:59+00:00``.
        suppressed: kind -> how many alerts were left out since the last one of that kind.
    """

    kind: str
    text: str
    job: str
    host: str
    time: str
    suppressed: Mapping[str, int]

    @property
    def title(self) -> str:
        """Return one line that names the job and the event."""
        return f"[{self.job}] {self.kind}"

    @property
    def body(self) -> str:
        """Return the text, what was left out, and where and when it happened."""
        lines = [self.text]
        for kind, count in self.suppressed.items():
            lines.append(f"({counted(count, 'more alert')} of kind {kind!r} not sent)")
        lines.append(f"{self.host}, {self.time}")
        return "\n".join(lines)


def job_title(job_name: str, environment: Mapping[str, str]) -> str:
    """Return ``NUMBER_NAME`` of a job that a scheduler has started, else its name."""
    for variable in _JOB_VARIABLES:
        number = environment.get(variable, "")
        if number:
            return f"{number}_{job_name}"
    return job_name
