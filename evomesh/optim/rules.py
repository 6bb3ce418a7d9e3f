"""The update rules by ``optimizer.type``: which rule updates which of a rank's masters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.schema import AdamConfig
from evomesh.errors import UserError
from evomesh.optim.adamw import AdamW
from evomesh.optim.groups import UpdateSettings, is_hidden_matrix
from evomesh.optim.lion import Lion
from evomesh.optim.muon import Muon
from evomesh.optim.rule import UpdateRule
from evomesh.optim.schedule_free import ScheduleFree
from evomesh.optim.slot import ParameterSlot
from evomesh.parallel.grid import Grid

SettingsOf: TypeAlias = Mapping[Tensor, UpdateSettings]  # by master
RuleBuilder = Callable[
    [Sequence[ParameterSlot], SettingsOf, AdamConfig, OptimizerConfig, Grid],
    list[UpdateRule],
]


def make_rules(
    slots: Sequence[ParameterSlot],
    settings: SettingsOf,
    adam: AdamConfig,
    config: OptimizerConfig,
    grid: Grid,
) -> list[UpdateRule]:
    """Return the rules that together update every slot once.

    Args:
        settings: of every slot's master.

    Raises:
        UserError: Muon for a model without matrices that it could update.
    """
    return RULES[config.type](slots, settings, adam, config, grid)


def _of(
    slots: Sequence[ParameterSlot], settings: SettingsOf
) -> dict[Tensor, UpdateSettings]:
    """Return what holds for the masters of these slots."""
    return {slot.master: settings[slot.master] for slot in slots}


def _adamw(
    slots: Sequence[ParameterSlot],
    settings: SettingsOf,
    adam: AdamConfig,
    config: OptimizerConfig,
    grid: Grid,
) -> list[UpdateRule]:
    return [AdamW(_of(slots, settings), adam.adam_beta1, adam.adam_eps)]


def _muon(
    slots: Sequence[ParameterSlot],
    settings: SettingsOf,
    adam: AdamConfig,
    config: OptimizerConfig,
    grid: Grid,
) -> list[UpdateRule]:
    matrices: list[ParameterSlot] = []
    others: list[ParameterSlot] = []
    for slot in slots:
        is_matrix = is_hidden_matrix(slot.name, slot.spec.shape)
        group = matrices if is_matrix else others
        group.append(slot)
    # A stage of a pipeline may have no block.
    if not matrices and grid.pp.size == 1:
        raise _no_matrix(slots)
    rules: list[UpdateRule] = []
    if matrices:
        rules.append(Muon(matrices, settings, config, grid))
    if others:
        rules += _adamw(others, settings, adam, config, grid)
    return rules


def _no_matrix(slots: Sequence[ParameterSlot]) -> UserError:
    names = [slot.name for slot in slots]
    shown = ", ".join(names[:4])
    return UserError(
        f"optimizer.type is 'muon', and none of the model's {len(names)} trained parameters is a matrix that it "
        f"updates: {shown}{', ...' if len(names) > 4 else ''}",
        where="optimizer.type",
        expected="weights with two dims in numbered blocks, such as layers.0.feed_forward.w1.weight",
        fix="optimizer.type='adamw', or unfreeze the blocks",
        code="EVO-MODEL-007",
    )


def _lion(
    slots: Sequence[ParameterSlot],
    settings: SettingsOf,
    adam: AdamConfig,
    config: OptimizerConfig,
    grid: Grid,
) -> list[UpdateRule]:
    return [Lion(_of(slots, settings), adam.adam_beta1)]


def _schedule_free(
    slots: Sequence[ParameterSlot],
    settings: SettingsOf,
    adam: AdamConfig,
    config: OptimizerConfig,
    grid: Grid,
) -> list[UpdateRule]:
    return [ScheduleFree(_of(slots, settings), adam.adam_beta1, adam.adam_eps)]


RULES: dict[str, RuleBuilder] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "schedule_free": _schedule_free,
}
