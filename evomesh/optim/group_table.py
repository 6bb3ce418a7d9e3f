"""The groups of a run's parameters (``adam.groups``): whether each pattern matches one, and what the log shows."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest

from evomesh.config.model import ModelConfig
from evomesh.config.optimizer import OptimizerType
from evomesh.config.parameter_groups import ParameterGroupConfig, group_number
from evomesh.config.text_table import text_table
from evomesh.errors import UserError
from evomesh.optim.groups import UpdateSettings, hidden_lr_scale
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.collectives import all_gather_objects

SHOWN = 4  # names in a message


@dataclass(frozen=True)
class GroupedParameter:
    """One trained parameter of the whole model, and what holds for its updates."""

    elements: int
    settings: UpdateSettings


@dataclass(frozen=True)
class GroupRow:
    """A row of the table: parameters of one group that are updated alike; their group's number begins at 1."""

    number: int
    settings: UpdateSettings


def grouped_parameters(optimizer: ZeroOptimizer) -> dict[str, GroupedParameter]:
    """Return the trained parameters of the whole model by global name, those of other stages too."""
    own: dict[str, GroupedParameter] = {}
    for slot in optimizer.slots:
        elements = math.prod(slot.spec.stored_shape)
        settings = optimizer.settings[slot.master]
        own[slot.name] = GroupedParameter(elements, settings)
    found: dict[str, GroupedParameter] = {}
    stages = optimizer.grid.pp
    of_stages = all_gather_objects(own, stages)
    # A tied embedding is in two stages under one name.
    for parameters in of_stages:
        found |= parameters
    return found


def check_groups(groups: Sequence[ParameterGroupConfig], names: Iterable[str]) -> None:
    """Refuse a group without a parameter.

    Args:
        names: global names of all trained parameters, of every stage of a pipeline.

    Raises:
        UserError: with the names nearest to the pattern, or the group that has what it matches.
    """
    known = list(names)
    members = {group_number(name, groups) for name in known}
    for number, group in enumerate(groups, 1):
        if number in members:
            continue
        where = f"adam.groups, item {number}"
        matched = [name for name in known if group.matches(name)]
        if not matched:
            nearest = ", ".join(_nearest(group.pattern, known))
            raise UserError(
                f"{group.pattern!r} matches none of the model's {len(known)} trained parameters",
                where=where,
                expected=f"a pattern of global names, of which the nearest are {nearest}",
                fix="correct the pattern, or leave the item out",
                code="EVO-MODEL-005",
            )
        earlier = group_number(matched[0], groups)
        raise UserError(
            f"all {len(matched)} parameters that {group.pattern!r} matches belong to earlier items, "
            f"{matched[0]} to item {earlier}",
            where=where,
            expected="a parameter that no earlier pattern matches: the first one that does holds",
            fix="put the narrower pattern first, or leave the item out",
            code="EVO-MODEL-005",
        )


def mup_line(model: ModelConfig, rule: OptimizerType) -> str:
    """Return what muP scales in a run."""
    multiplier = model.width_multiplier
    scale = hidden_lr_scale(rule, multiplier)
    return (
        f"muP: hidden_size is {multiplier:g} times {model.mup.base_hidden_size}; factors: {scale:g} of the learning "
        f"rate of hidden matrices, {multiplier**-0.5:g} of their initial weights, {1 / multiplier:g} of the logits, "
        f"{model.query_multiplier:g} of attention scores"
    )


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names most like a pattern, one of each kind: blocks have the same."""
    # layers.0.ffn_norm.weight and layers.1.ffn_norm.weight are one kind.
    first_names: dict[str, str] = {}
    for name in names:
        kind = re.sub(r"\d+", "*", name)
        first_names.setdefault(kind, name)
    nearest = nlargest(
        SHOWN,
        first_names,
        key=partial(_likeness, pattern),
    )
    return [first_names[kind] for kind in nearest]


def _likeness(pattern: str, kind: str) -> tuple[int, float]:
    """Return the number of words in common, and how alike the two are by characters."""
    words = re.findall("[a-z0-9]+", pattern.lower())
    in_common = [word for word in words if word in kind]
    comparison = difflib.SequenceMatcher(None, pattern, kind)
    return len(in_common), comparison.ratio()


def group_table(
    groups: Sequence[ParameterGroupConfig], parameters: Mapping[str, GroupedParameter]
) -> str:
    """Return the groups with their number of parameters, as a table; parameters without a group come last."""
    # A group has two rows if its parameters differ otherwise, such as by adam.no_decay.
    elements: Counter[GroupRow] = Counter()
    for name, parameter in parameters.items():
        number = group_number(name, groups) or len(groups) + 1
        row = GroupRow(number, parameter.settings)
        elements[row] += parameter.elements
    columns = ("group", "pattern", "parameters", "lr_scale", "weight_decay")
    table = [columns]
    largest_first = [row for row, _ in elements.most_common()]
    for row in sorted(largest_first, key=lambda row: row.number):
        label, pattern = _names_of_row(row, groups)
        settings = row.settings
        scale = f"{settings.lr_scale:g}"
        decay = f"{settings.weight_decay:g}"
        count = f"{elements[row]:,}"
        cells = (label, pattern, count, scale, decay)
        table.append(cells)
    return text_table(table)


def _names_of_row(
    row: GroupRow, groups: Sequence[ParameterGroupConfig]
) -> tuple[str, str]:
    """Return number and pattern of a row's group, as they are shown."""
    if row.number <= len(groups):
        group = groups[row.number - 1]
        return str(row.number), group.pattern
    if groups:
        return "-", "all others"
    return "-", "all"
