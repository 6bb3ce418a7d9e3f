"""``data.stages``: parts of a run with their own data, lengths and batch sizes, and the steps that each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from evomesh.config.section import Section
from evomesh.config.step_values import SettingError
from evomesh.config.text_table import text_table
from evomesh.errors import UserError
from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.config.data import DataConfig

STAGES_FORM = "a list of dicts, such as [dict(until=1000, seq_len=2048), dict(dataset_weights={...})]"
# Keys of a data stage that replace the data section's.
STAGE_KEYS = ("train_folder", "dataset_weights", "seq_len", "micro_bsz", "micro_num")


class DataStageConfig(Section):
    """One item of ``data.stages``; a key that is None is the data section's."""

    until: int | None = Field(None, ge=1, description="First step after it.")
    until_tokens: int | None = Field(
        None,
        ge=1,
        description="It ends with the step that reaches this many tokens of the run.",
    )
    train_folder: str | None = Field(None, description="Folder of tokenized data.")
    dataset_weights: dict[str, float] | None = Field(
        None, description="Shares of the packs; {}: none."
    )
    seq_len: int | None = Field(None, ge=1, description="Longest attention segment.")
    micro_bsz: int | None = Field(None, ge=1, description="Packed length / seq_len.")
    micro_num: int | None = Field(None, ge=1, description="Micro-batches per step.")

    def section(self, data: DataConfig) -> DataConfig:
        """Return the data section that is in force during the data stage."""
        changes: dict[str, Any] = {"stages": ()}
        for key in STAGE_KEYS:
            value = getattr(self, key)
            if value is not None:
                changes[key] = value
        return data.model_copy(update=changes)


def _parse_stages(value: Any) -> Any:
    if isinstance(value, dict) or not isinstance(value, list | tuple):
        raise SettingError(f"found {value!r}", STAGES_FORM)
    known = DataStageConfig.model_fields
    for number, item in enumerate(value, 1):
        if isinstance(item, DataStageConfig):
            continue
        if not isinstance(item, dict):
            raise SettingError(f"item {number} is {item!r}", STAGES_FORM)
        unknown = [str(key) for key in item if key not in known]
        if unknown:
            raise SettingError(
                f"item {number} has an unknown key {unknown[0]!r}",
                f"any of {', '.join(known)}",
            )
    return tuple(value)


def _as_written(stages: tuple[DataStageConfig, ...]) -> list[dict[str, Any]]:
    return [stage.model_dump(exclude_none=True) for stage in stages]


# The field type of the schema: a stage is written with the keys that it has.
StagesSetting = Annotated[
    tuple[DataStageConfig, ...],
    BeforeValidator(_parse_stages),
    PlainSerializer(_as_written),
]


@dataclass(frozen=True)
class DataStage:
    """A data stage of a run with a known number of data-parallel ranks.

    Attributes:
        number: from 1.
        first_step, end_step: it has the steps ``[first_step, end_step)``.
        tokens_per_step: of all ranks.
        data: the section in force.
        end: the key that ends it: "until", "until_tokens", or "" at the end of the run.
    """

    number: int
    first_step: int
    end_step: int
    tokens_per_step: int
    data: DataConfig
    end: str

    @property
    def steps(self) -> int:
        return self.end_step - self.first_step

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


def resolve_data_stages(data: DataConfig, dp_size: int) -> list[DataStage]:
    """Return the data stages with their steps and tokens; none for a run without ``data.stages``.

    What does not fit is not refused here: see ``data_stage_problem``.
    """
    stages: list[DataStage] = []
    step = 0
    tokens = 0
    for number, item in enumerate(data.stages, 1):
        section = item.section(data)
        per_step = section.packed_length * section.micro_num * dp_size
        end_step = data.total_steps
        end = ""
        if item.until is not None:
            end_step = item.until
            end = "until"
        elif item.until_tokens is not None:
            # The step that reaches the number belongs to the stage.
            missing = item.until_tokens - tokens
            end_step = step + -(-missing // per_step)
            end = "until_tokens"
        stage = DataStage(number, step, end_step, per_step, section, end)
        stages.append(stage)
        tokens += stage.tokens
        step = end_step
    return stages


def data_stage_problem(stages: Sequence[DataStage], total_steps: int) -> str:
    """Return what is wrong with the order of the data stages, "" if they cover the run without gap and overlap."""
    for stage in stages:
        name = f"data stage {stage.number}"
        end = f"{name} ends at step {stage.end_step}"
        is_last = stage.number == len(stages)
        if not stage.end and not is_last:
            return f"{name} has no end, and data stage {stage.number + 1} follows"
        if stage.steps < 1:
            return f"{end}, and begins at step {stage.first_step}"
        if stage.end_step > total_steps:
            return f"{end}, after the last step of the run (data.total_steps={total_steps})"
        if stage.end_step == total_steps and not is_last:
            return f"{end}, which is the end of the run, and data stage {stage.number + 1} follows"
        if is_last and stage.end_step < total_steps:
            return f"{end}: no data stage has the steps from there to data.total_steps={total_steps}"
    return ""


def check_data_stages(data: DataConfig, dp_size: int) -> None:
    """Refuse data stages that do not fit the run on this many data-parallel ranks.

    Raises:
        UserError: they overlap, go back, leave a gap or end after the run.
    """
    problem = data_stage_problem(resolve_data_stages(data, dp_size), data.total_steps)
    if problem:
        raise UserError(
            f"{problem} (with {counted(dp_size, 'data-parallel rank')})",
            where="data.stages",
            expected="stages that follow each other from step 0 to data.total_steps; the last needs no end",
            code="EVO-CONFIG-012",
        )


def stage_at(stages: Sequence[DataStage], step: int) -> DataStage | None:
    """Return the data stage of a step; None for a run without."""
    for stage in stages:
        if step < stage.end_step:
            return stage
    return stages[-1] if stages else None


def stage_rows(stages: Sequence[DataStage]) -> list[tuple[str, ...]]:
    """Return a table of data stages as cells, its head first."""
    head = ("stage", "steps", "tokens", "per step", "seq_len", "packed", "micro_num")
    rows: list[tuple[str, ...]] = [(*head, "data")]
    for stage in stages:
        data = stage.data
        cells = (
            str(stage.number),
            f"{stage.first_step}..{stage.end_step - 1}",
            f"{stage.tokens:,}",
            f"{stage.tokens_per_step:,}",
            str(data.seq_len),
            str(data.packed_length),
            str(data.micro_num),
            _describe_data(data),
        )
        rows.append(cells)
    return rows


def stage_table(stages: Sequence[DataStage]) -> str:
    """Return the table of data stages as text."""
    return text_table(stage_rows(stages))


def _describe_data(data: DataConfig) -> str:
    folder = data.train_folder or "synthetic"
    weights = data.dataset_weights
    if not weights:
        return folder
    shares = " ".join(f"{key}={weight:g}" for key, weight in weights.items())
    return f"{folder} {shares}"
