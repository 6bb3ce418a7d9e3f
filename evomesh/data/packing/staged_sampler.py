"""Decide which packs make up step s of a run with data stages.

A data stage draws from sources: all packs of its data, or those of each weight. A
source that an earlier stage drew from continues where that one stopped, so that no pack
comes twice before all have come once. Everything follows from the position, which
holds a cursor for each source of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.data_stages import DataStageConfig
from evomesh.config.start_anew import start_anew
from evomesh.data.packing.mixture import MixedSampler
from evomesh.data.packing.sampler import PackSampler, SamplerPosition
from evomesh.errors import UserError

WHERE = "data.stages"
POSITION_FIELDS = ("step", "epoch", "offset", "consumed", "stage", "tokens", "drawn")
CURSOR_FIELDS = ("packs", "epoch", "offset", "consumed")
STAGE_FIELDS = ("pack_tokens", "weights", "sources", "until", "until_tokens")


@dataclass(frozen=True)
class StagedPosition(SamplerPosition):
    """Position before a step; ``epoch`` and ``offset`` are of the stage's source.

    Attributes:
        stage: data stage of the step before, from 0.
        tokens: of all steps so far.
        drawn: packs that this stage has drawn.
        cursors: position in each source of the run; its step is not used.
    """

    stage: int = 0
    tokens: int = 0
    drawn: int = 0
    cursors: tuple[SamplerPosition, ...] = ()

    def to_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in POSITION_FIELDS}


@dataclass(frozen=True)
class StageSampler:
    """A data stage with the packs that it draws from.

    Attributes:
        setting: the item of ``data.stages``.
        sampler: of the stage's packs.
        sources: numbers of the cursors that it moves: one, or one of each weight.
        first_pack: number of its first pack among those of the run.
        global_batch: packs in a step.
        pack_tokens: tokens in a pack.
    """

    setting: DataStageConfig
    sampler: PackSampler | MixedSampler
    sources: tuple[int, ...]
    first_pack: int
    global_batch: int
    pack_tokens: int

    def has_ended(self, position: StagedPosition) -> bool:
        """Return whether the step at ``position`` comes after the stage."""
        setting = self.setting
        if setting.until is not None:
            return position.step >= setting.until
        if setting.until_tokens is not None:
            return position.tokens >= setting.until_tokens
        return False

    def steps_left(self, position: StagedPosition) -> int:
        """Return the steps from ``position`` to the end of the stage, which has one."""
        setting = self.setting
        if setting.until is not None:
            return setting.until - position.step
        assert setting.until_tokens is not None
        missing = setting.until_tokens - position.tokens
        return -(-missing // (self.global_batch * self.pack_tokens))

    def describe(self) -> dict[str, Any]:
        """Return what decides which packs the stage draws, as JSON; its end apart."""
        weights = None
        if isinstance(self.sampler, MixedSampler):
            shares = map(str, self.sampler.schedule.weights)
            weights = dict(zip(self.sampler.names, shares, strict=True))
        return {
            "pack_tokens": self.pack_tokens,
            "weights": weights,
            "sources": list(self.sources),
        }

    def ends(self) -> dict[str, int | None]:
        return {
            "until": self.setting.until,
            "until_tokens": self.setting.until_tokens,
        }


class StagedSampler:
    """Goes through the data stages of a run.

    Args:
        stages: in order; the last one has no end here.
        sources: name and number of packs of each source of the run.
        seed, order, unit: as those of the stages' samplers.
    """

    def __init__(
        self,
        stages: Sequence[StageSampler],
        sources: Sequence[tuple[str, int]],
        seed: int,
        order: str,
        unit: int,
    ) -> None:
        self.stages = list(stages)
        self.sources = list(sources)
        self.seed = seed
        self.order = order
        self.unit = unit

    def take(
        self, position: SamplerPosition
    ) -> tuple[NDArray[np.int64], SamplerPosition]:
        """Return the packs of all ranks for the step at ``position``, and the position after it."""
        assert isinstance(position, StagedPosition)
        entered = self._enter(position)
        stage = self.stages[entered.stage]
        sampler = stage.sampler
        cursors = list(entered.cursors)
        if isinstance(sampler, MixedSampler):
            size = stage.global_batch
            counts = [cursors[source].consumed for source in stage.sources]
            packs, after = sampler.draw(entered.drawn, counts, size)
            for source, count in zip(stage.sources, after, strict=True):
                cursors[source] = SamplerPosition(consumed=count)
        else:
            (source,) = stage.sources
            packs, cursor = sampler.take(cursors[source])
            cursors[source] = cursor
        numbered_over_all_stages = packs + stage.first_pack
        after_step = self._moved(entered, cursors)
        return numbered_over_all_stages, after_step

    def seek(self, step: int) -> SamplerPosition:
        """Return the position before step ``step`` of a run that began at step 0."""
        position = self.start()
        while position.step < step:
            position = self._advance(self._enter(position), step)
        return position

    def _advance(self, position: StagedPosition, step: int) -> StagedPosition:
        """Return the position before ``step``, or at the end of the stage if that comes first."""
        stage = self.stages[position.stage]
        sampler = stage.sampler
        steps = step - position.step
        last_stage = len(self.stages) - 1
        if position.stage < last_stage:
            left = stage.steps_left(position)
            steps = min(steps, left)
        cursors = list(position.cursors)
        if isinstance(sampler, MixedSampler):
            packs = steps * stage.global_batch
            drawn = _drawn_packs(sampler, position.drawn, packs)
            for source, count in zip(stage.sources, drawn, strict=True):
                consumed = cursors[source].consumed + count
                cursors[source] = SamplerPosition(consumed=consumed)
        else:
            (source,) = stage.sources
            cursor = cursors[source]
            for _ in range(steps):
                cursor = sampler.after(cursor)
            cursors[source] = cursor
        return self._moved(position, cursors, steps)

    def start(self) -> StagedPosition:
        """Return the position before the first step."""
        nothing = SamplerPosition()
        return StagedPosition(cursors=(nothing,) * len(self.sources))

    def _enter(self, position: StagedPosition) -> StagedPosition:
        """Return the position in the stage of the step: the next one, where this has ended."""
        last = len(self.stages) - 1
        while position.stage < last:
            stage = self.stages[position.stage]
            if not stage.has_ended(position):
                break
            position = replace(position, stage=position.stage + 1, drawn=0)
        return position

    def _moved(
        self,
        position: StagedPosition,
        cursors: Sequence[SamplerPosition],
        steps: int = 1,
    ) -> StagedPosition:
        """Return the position some steps further, in the same stage."""
        stage = self.stages[position.stage]
        passes = [
            self._cursor_passes(source, cursors[source], stage)
            for source in stage.sources
        ]
        is_mixed = isinstance(stage.sampler, MixedSampler)
        packs = steps * stage.global_batch
        return StagedPosition(
            step=position.step + steps,
            epoch=min(passes),
            offset=0 if is_mixed else cursors[stage.sources[0]].offset,
            consumed=position.consumed + packs,
            stage=position.stage,
            tokens=position.tokens + packs * stage.pack_tokens,
            drawn=position.drawn + packs,
            cursors=tuple(cursors),
        )

    def _cursor_passes(
        self, source: int, cursor: SamplerPosition, stage: StageSampler
    ) -> int:
        """Return the passes over a source that are finished."""
        if isinstance(stage.sampler, MixedSampler):
            return cursor.consumed // self.sources[source][1]
        return cursor.epoch

    def state(self, position: SamplerPosition) -> dict[str, Any]:
        """Return one small JSON object that ``resume`` takes."""
        assert isinstance(position, StagedPosition)
        cursors = {}
        for (name, packs), cursor in zip(self.sources, position.cursors, strict=True):
            cursors[name] = {
                "packs": packs,
                "epoch": cursor.epoch,
                "offset": cursor.offset,
                "consumed": cursor.consumed,
            }
        passed = self.stages[: position.stage + 1]
        return {
            "stages": [stage.describe() | stage.ends() for stage in passed],
            "position": position.to_json(),
            "cursors": cursors,
            "seed": self.seed,
            "order": self.order,
            "unit": self.unit,
        }

    def resume(self, state: dict[str, Any]) -> SamplerPosition:
        """Return the position of a saved state, after checking that it belongs to this data.

        Later stages than that of the position may have changed. A state of a run
        without stages counts for the stage of its step, which must have the same data.

        Raises:
            UserError: other data, seed, order or stages.
        """
        if "stages" not in state:
            return self._resume_unstaged(state)
        for key in ("seed", "order"):
            before = state[key]
            now = getattr(self, key)
            if before != now:
                raise _other_data(key, before, now)
        self._check_stages(state)
        self._set_unit(int(state["unit"]))
        stored_cursors = state["cursors"]
        cursors = []
        for name, packs in self.sources:
            stored = stored_cursors.get(name, {"packs": packs})
            if stored["packs"] != packs:
                raise _other_data(f"packs of {name}", stored["packs"], packs)
            cursor = _cursor_from_json(stored)
            cursors.append(cursor)
        return StagedPosition(**state["position"], cursors=tuple(cursors))

    def _check_stages(self, state: Mapping[str, Any]) -> None:
        """Refuse changed stages up to that of the position; its own end may move, not before the position."""
        position = state["position"]
        stored = state["stages"]
        for index, was in enumerate(stored):
            name = f"data stage {index + 1}"
            if index >= len(self.stages):
                raise _other_data(name, "some data", "no such stage")
            stage = self.stages[index]
            now = stage.describe()
            is_current = index == position["stage"]
            if not is_current:
                now |= stage.ends()
            for key, value in now.items():
                if was[key] != value:
                    raise _other_data(f"{name}: {key}", was[key], value)
        setting = self.stages[position["stage"]].setting
        if setting.until is not None and setting.until < position["step"]:
            raise _other_data(
                "steps", position["step"], f"a stage until {setting.until}"
            )

    def _set_unit(self, unit: int) -> None:
        # It counts packs of the global batch: that of the checkpoint keeps the steps in
        # another layout.
        self.unit = unit
        for stage in self.stages:
            if isinstance(stage.sampler, PackSampler):
                stage.sampler.unit = unit

    def _resume_unstaged(self, state: dict[str, Any]) -> StagedPosition:
        step = int(state["position"]["step"])
        consumed = int(state["position"]["consumed"])
        for index, stage in enumerate(self.stages):
            tokens = consumed * stage.pack_tokens
            position = StagedPosition(step=step, stage=index, tokens=tokens)
            # The step before belongs to the first stage that had not ended before it.
            step_before = replace(
                position,
                step=max(step - 1, 0),
                tokens=max(tokens - stage.global_batch * stage.pack_tokens, 0),
            )
            if not stage.has_ended(step_before):
                break
        resumed = stage.sampler.resume(state)
        cursors = list(self.start().cursors)
        if isinstance(stage.sampler, MixedSampler):
            counts = stage.sampler.schedule.counts(consumed)
            for source, count in zip(stage.sources, counts, strict=True):
                cursors[source] = SamplerPosition(consumed=count)
        else:
            self._set_unit(stage.sampler.unit)
            cursors[stage.sources[0]] = resumed
        return replace(
            position,
            epoch=resumed.epoch,
            offset=resumed.offset,
            consumed=consumed,
            drawn=consumed,
            cursors=tuple(cursors),
        )


def _cursor_from_json(stored: Mapping[str, int]) -> SamplerPosition:
    """Return a stored position in a source; of a source that nothing was drawn from, its start."""
    return SamplerPosition(
        epoch=stored.get("epoch", 0),
        offset=stored.get("offset", 0),
        consumed=stored.get("consumed", 0),
    )


def _drawn_packs(sampler: MixedSampler, start: int, packs: int) -> list[int]:
    """Return how many packs of each source are drawn as packs ``[start, start + packs)`` of a mixture."""
    before = sampler.schedule.counts(start)
    after = sampler.schedule.counts(start + packs)
    return [new - old for old, new in zip(before, after, strict=True)]


def _other_data(what: str, before: object, now: object) -> UserError:
    return UserError(
        f"{what}: {before} in the checkpoint, {now} in this run",
        where=f"resuming the data position ({WHERE})",
        expected="the data and the stages that the checkpoint was trained with; later stages may change",
        fix=f"restore them, or load only the weights: {start_anew()}",
        code="EVO-DATA-020",
    )
