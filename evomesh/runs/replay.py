"""Compute steps of a run again, from the checkpoint before them, and compare with what the run logged.

Weights, optimizer, data position and counters come from the checkpoint, config and number of
ranks from ``history.jsonl``. In the same layout every figure must be equal to the bit
(invariant 8). In another one loss and gradient norm of the first step, which both computed
from the same weights, must be within the bound of the numerics contract; what later steps
are apart is reported, because AdamW amplifies the order of sums. The replay writes into a
temporary folder and saves no checkpoint: the files of the run stay as they are.
"""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomesh.checkpoint.native.find import candidates
from evomesh.config.json_codec import decode_json
from evomesh.config.layout import axis_sizes, layout_findings, smallest_world
from evomesh.config.loader import LoadedConfig
from evomesh.config.record import config_from_dict
from evomesh.config.schema import Config, LoadConfig
from evomesh.config.step_values import StepRanges
from evomesh.diagnose.layouts import AS_WRITTEN, layout_overrides
from evomesh.diagnose.parity.compare import BOUNDS
from evomesh.errors import UserError
from evomesh.monitor.history import HISTORY_FILE
from evomesh.monitor.spikes import left_out_steps, read_spikes
from evomesh.runs.compare import FigureDifference, figure_differences
from evomesh.runs.read import Row, RunFiles, StartRecord, read_run
from evomesh.storage.urls import open_storage
from evomesh.train.court_text import describe_court


def ranks_of_replay(run: RunFiles, step: int, layout: str) -> int:
    """Return the number of ranks that a replay needs.

    Raises:
        UserError: as ``plan_replay``.
    """
    facts = _start_of(run, step).facts
    original, config = _configs(facts, layout)
    dp = axis_sizes(original.parallel, int(facts["world_size"])).dp
    return _ranks_with(config, dp)


@dataclass(frozen=True)
class ReplayPlan:
    """The way to compute a step again.

    Attributes:
        config: of the run, without saves, alerts and validation, writing into ``folder``.
        ranks: number of processes.
        first_step: the first step that is computed; ``step`` is the last.
        checkpoint: what it starts from; "" for the start of the run.
        bound: largest relative distance that passes; 0 in the same layout. In another one it is that of the first step.
    """

    run: RunFiles
    step: int
    config: Config
    ranks: int
    first_step: int
    checkpoint: str
    bound: float
    folder: Path

    def loaded(self) -> LoadedConfig:
        """Return the config as a run takes it."""
        history = str(self.run.folder / HISTORY_FILE)
        return LoadedConfig(self.config, {}, (), "", history)


@dataclass
class ReplayResult:
    """The computed steps beside the logged ones.

    Attributes:
        steps: those that were compared.
        differing: figures beyond the bound, those of the first such step.
        largest: the largest relative distance of all figures.
    """

    steps: list[int] = field(default_factory=list)
    differing: list[FigureDifference] = field(default_factory=list)
    largest: float = 0.0


def plan_replay(run: RunFiles, step: int, layout: str, scratch: Path) -> ReplayPlan:
    """Decide what a step is computed again from, with which config and how many ranks.

    Changes to the folder that the run was started in, in which its paths begin.

    Args:
        layout: such as ``tensor=2,mode=msp``, or ``config`` for that of the run.
        scratch: a folder to write into, the same on all ranks.

    Raises:
        UserError: the step is not logged, nothing is recorded of its start, or there is no way to it.
    """
    facts = _start_of(run, step).facts
    original, config = _configs(facts, layout)
    dp = axis_sizes(original.parallel, int(facts["world_size"])).dp
    _enter(str(facts.get("folder", "")))
    first_step, checkpoint = _checkpoint_before(original, step)
    # The same layout repeats to the bit.
    bound = 0.0
    if config.parallel != original.parallel:
        bound = BOUNDS[config.model.dtype]
    quiet = _quiet(config, scratch, checkpoint)
    return ReplayPlan(
        run=run,
        step=step,
        config=_without_spikes(quiet, run.folder, step),
        ranks=_ranks_with(config, dp),
        first_step=first_step,
        checkpoint=checkpoint,
        bound=bound,
        folder=scratch,
    )


def _configs(facts: Row, layout: str) -> tuple[Config, Config]:
    """Return the config of the run, and that in the layout of the replay.

    Raises:
        UserError: the model or the data cannot be divided so.
    """
    record = decode_json(facts["config"])
    original = config_from_dict(record)
    _set_layout(record, layout)
    config = config_from_dict(record)
    for finding in layout_findings(config):
        raise UserError(
            f"{finding.keys[0]}: {finding.found}",
            where=f"--layout {layout}",
            expected=finding.expected,
            fix=finding.fix,
            code=finding.code,
        )
    return original, config


def _start_of(run: RunFiles, step: int) -> StartRecord:
    """Return the start that did the step last, or left it out because of a spike.

    Raises:
        UserError: the step is not logged, or nothing is recorded of its start.
    """
    is_left_out = step in left_out_steps(read_spikes(run.folder))
    if step not in run.rows and not is_left_out:
        logged = f"{min(run.rows)} to {max(run.rows)}" if run.rows else "none"
        raise UserError(
            f"the run has not logged step {step}",
            where="--step",
            expected=f"a logged step: {logged}",
            code="EVO-RUN-002",
        )
    for start in reversed(run.starts):
        if start.first_step <= step and start.facts.get("config"):
            return start
    raise UserError(
        "how the run was started is not recorded",
        where=str(run.folder / HISTORY_FILE),
        expected="a run of this version, which writes its config there",
        code="EVO-RUN-003",
    )


def _enter(folder: str) -> None:
    if not Path(folder).is_dir():
        raise UserError(
            f"the folder that the run was started in is gone: {folder}",
            expected="its config's paths begin there",
            code="EVO-RUN-003",
        )
    os.chdir(folder)


def _set_layout(record: dict[str, Any], layout: str) -> None:
    """Write the sizes of a layout into the record of a config."""
    if layout == AS_WRITTEN:
        return
    for setting in layout_overrides(layout):
        key, _, text = setting.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a name, such as msp
        *sections, name = key.split(".")
        section = record
        for part in sections:
            section = section[part]
        section[name] = value


def _ranks_with(config: Config, dp: int) -> int:
    """Return the number of ranks with as many data-parallel ones as the run had, which have the same batches."""
    unit = smallest_world(config.parallel)
    for ranks in range(unit, unit * dp + 1, unit):
        if axis_sizes(config.parallel, ranks).dp == dp:
            return ranks
    raise UserError(
        f"the layout has no number of ranks with {dp} data-parallel ones, as the run had",
        where="--layout",
        fix="choose smaller sizes",
        code="EVO-PARALLEL-001",
    )


def _checkpoint_before(config: Config, step: int) -> tuple[int, str]:
    """Return the first step to compute and the checkpoint that it starts from, "" for the start of the run."""
    url = config.ckpt.save_ckpt_folder
    if url is not None and config.ckpt.enable_save_ckpt:
        found = candidates(*open_storage(url))
        usable = [one for one in found if one.committed and one.step <= step]
        if usable:
            newest = max(usable, key=lambda one: one.step)
            name = newest.folder.rstrip("/").rpartition("/")[2]
            return newest.step, f"{url.rstrip('/')}/{name}"
    if config.ckpt.load_ckpt_info is None:
        return 0, ""
    raise UserError(
        f"there is no checkpoint of step {step} or before, and the run did not start from scratch",
        where=f"ckpt.save_ckpt_folder ({url})",
        fix="choose a later step",
        code="EVO-RUN-004",
    )


def _quiet(config: Config, scratch: Path, checkpoint: str) -> Config:
    """Return the config with its own run folder, and without saves, exports, validation and alerts."""
    defaults = Config(generation=None)
    start = None
    if checkpoint:
        start = LoadConfig(path=checkpoint, content=("all",))
    changes = {
        "run": {"run_dir": str(scratch), "enable_tb": False, "resume_tb_folder": None},
        "data": {
            "valid_every": 0,
            "valid_at_start": False,
            "stop_when": None,
            "sample_every": 0,
            "samples": None,
            "eval_every": 0,
            "evaluation": None,
        },
        "ckpt": {
            "enable_save_ckpt": False,
            "auto_resume": False,
            "load_ckpt_info": start,
            "enable_internevo2hf_ckpt": False,
            "export_hf": defaults.ckpt.export_hf,
        },
    }
    sections: dict[str, Any] = {"monitor": defaults.monitor}
    for name, update in changes.items():
        section = getattr(config, name)
        sections[name] = section.model_copy(update=update)
    return config.model_copy(update=sections)


def _without_spikes(config: Config, folder: Path, step: int) -> Config:
    """Return the config with the steps left out that spikes made the run leave out, up to the last one.

    That one is computed as it was, and a run that then stopped or went back does neither.
    """
    listed = config.data.skip_batches
    ranges = list(listed.ranges)
    rows = read_spikes(folder)
    for left_out in left_out_steps(rows):
        is_earlier = left_out < step
        if is_earlier and left_out not in listed:
            one_step = (left_out, left_out)
            ranges.append(one_step)
    ranges.sort()
    skipped = StepRanges(tuple(ranges))
    data = config.data.model_copy(update={"skip_batches": skipped})
    spike = config.spike
    if spike.holds_back:
        spike = spike.model_copy(update={"policy": "skip"})
    sections = {"data": data, "spike": spike}
    return config.model_copy(update=sections)


def court_lines(plan: ReplayPlan) -> list[str]:
    """Return what the replay found out about its last step, as lines of text."""
    lines: list[str] = []
    for row in read_spikes(plan.folder):
        if row["event"] == "court" and row["step"] == plan.step:
            lines = describe_court(row)
    return lines


def compare_replay(plan: ReplayPlan) -> ReplayResult:
    """Compare what the replay logged into its folder with what the run logged."""
    again = read_run(plan.folder).rows
    result = ReplayResult()
    logged = plan.run.rows
    for step in range(plan.first_step, plan.step + 1):
        if step not in again or step not in logged:
            continue
        result.steps.append(step)
        beyond = []
        for difference in figure_differences(step, logged[step], again[step]):
            result.largest = max(result.largest, difference.relative)
            if _is_beyond(difference, plan):
                beyond.append(difference)
        # Later steps follow from the first that differs.
        if not result.differing:
            result.differing = beyond
    return result


def _is_beyond(difference: FigureDifference, plan: ReplayPlan) -> bool:
    """Return whether a figure differs by more than it may."""
    if plan.bound == 0:
        return True
    name = difference.name
    # An accuracy changes by a whole token where two tokens are nearly equally likely.
    is_judged = name in ("loss", "grad_norm") or name.startswith("loss/")
    is_first = difference.step == plan.first_step
    return is_judged and is_first and difference.relative > plan.bound
