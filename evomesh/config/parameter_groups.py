"""``adam.groups``: parameters, by patterns over their names, with another learning rate or weight decay."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from evomesh.config.section import Section
from evomesh.config.step_values import SettingError

GROUPS_FORM = 'a list of dicts, such as [dict(pattern="*norm*", weight_decay=0.0)]'


class ParameterGroupConfig(Section):
    """One item of ``adam.groups``; a parameter belongs to the first whose pattern matches its name."""

    pattern: str = Field(
        min_length=1,
        description="Global names of parameters; * stands for any text, dots too.",
    )
    lr_scale: float = Field(
        1.0, ge=0, description="Factor of the learning rate; 0: no update."
    )
    weight_decay: float | None = Field(
        None, ge=0, description="None: adam.weight_decay and adam.no_decay."
    )

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)


def group_number(name: str, groups: Sequence[ParameterGroupConfig]) -> int | None:
    """Return the number, from 1, of the group that a parameter belongs to; None without one."""
    for number, group in enumerate(groups, 1):
        if group.matches(name):
            return number
    return None


def _parse_groups(value: Any) -> Any:
    if isinstance(value, dict) or not isinstance(value, list | tuple):
        raise SettingError(f"found {value!r}", GROUPS_FORM)
    for number, item in enumerate(value, 1):
        if isinstance(item, ParameterGroupConfig):
            continue
        if not isinstance(item, dict):
            raise SettingError(f"item {number} is {item!r}", GROUPS_FORM)
        _check_keys(number, item)
    return tuple(value)


def _check_keys(number: int, item: dict[str, Any]) -> None:
    known = ParameterGroupConfig.model_fields
    for key in item:
        if key in known:
            continue
        nearest = difflib.get_close_matches(str(key), known, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise SettingError(
            f"item {number} has an unknown key {str(key)!r}{hint}",
            f"any of {', '.join(known)}",
        )
    if "pattern" not in item:
        raise SettingError(f"item {number} has no pattern", GROUPS_FORM)
    if item.keys() == {"pattern"}:
        raise SettingError(
            f"item {number} changes nothing", "lr_scale, weight_decay or both"
        )


def _as_written(groups: tuple[ParameterGroupConfig, ...]) -> list[dict[str, Any]]:
    return [group.model_dump(exclude_none=True) for group in groups]


# The field type of the schema: a group is written with the keys that it has.
GroupsSetting = Annotated[
    tuple[ParameterGroupConfig, ...],
    BeforeValidator(_parse_groups),
    PlainSerializer(_as_written),
]
