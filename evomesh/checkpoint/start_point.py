"""Starting points of a run: a checkpoint or a foreign folder, and which parts of it."""

from __future__ import annotations

from dataclasses import dataclass

from evomesh.checkpoint.native.find import Checkpoint

CONTENTS = ("model", "optimizer", "scheduler", "sampler")
EVERYTHING = frozenset(CONTENTS)
# What is read of XTuner's run: all but the optimizer's state.
COUNTED = EVERYTHING - {"optimizer"}


@dataclass(frozen=True)
class StartPoint:
    """The source that a run starts from.

    Attributes:
        reason: one line for the log.
        checkpoint: in the native format; None for another source or for none.
        path: the foreign folder to read with the loader ``ckpt_type``, "" for none.
        ckpt_type: name of that loader.
        content: what to load, a subset of ``CONTENTS``; all of them together continue the run that wrote it.
        is_branch: what it continues is another run, whose folders stay as they are.
    """

    reason: str
    checkpoint: Checkpoint | None = None
    path: str = ""
    ckpt_type: str = ""
    content: frozenset[str] = frozenset()
    is_branch: bool = False

    @property
    def resumes(self) -> bool:
        """True if it continues a run: counters, data position, schedules and random streams too."""
        return self.content == EVERYTHING

    @property
    def resumed_step(self) -> int | None:
        """The finished steps of the run that it continues, if it continues one."""
        if self.checkpoint is None or not self.resumes:
            return None
        return self.checkpoint.step

    @property
    def keeps_counters(self) -> bool:
        """True if the steps are counted on: of a run that it continues, or of one of XTuner without its optimizer."""
        return self.resumes or (self.ckpt_type == "xtuner" and self.content == COUNTED)

    def wants(self, part: str) -> bool:
        return part in self.content
