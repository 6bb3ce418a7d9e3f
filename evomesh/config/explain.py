"""Explanations of config keys, from the schema's descriptions and the tables of other spellings and ignored keys."""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evomesh.config.loader import (
    REMOVE_KEY,
    LoadedConfig,
    known_keys,
    meant_key,
    section_class,
)
from evomesh.config.reading.ignored_keys import INERT, REFUSED
from evomesh.config.reading.spellings import QUEUE, SPELLINGS, TOP_LEVEL
from evomesh.config.schema import Config
from evomesh.config.step_values import BatchSizeRampup, StepRanges
from evomesh.errors import UserError

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe(key: str) -> str:
    """Return what ``key``, as written in a config, does, or why it does nothing.

    Raises:
        UserError: there is no such key; names the nearest.
    """
    if key in REFUSED:
        return f"Refused: {REFUSED[key].reason}."
    if key in INERT:
        return f"Has no effect: {INERT[key][1]}."
    if key in SPELLINGS:
        return SPELLINGS[key]
    field = field_of(key)
    if field is not None and field.description:
        return field.description
    fix = meant_key(key)
    similar = difflib.get_close_matches(key, known_keys(), n=1)
    if fix.startswith(REMOVE_KEY):
        fix = "evomesh config show CONFIG lists the keys"
        if similar:
            fix = f"did you mean {similar[0]}?"
    raise UserError(
        f"unknown key {key!r}",
        where="--explain",
        fix=fix,
        code="EVO-CONFIG-001",
    )


def in_chinese(description: str) -> str:
    """Return the Chinese text of a description; the English one where there is none."""
    file = files("evomesh.config").joinpath("descriptions.zh.json")
    texts: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return texts.get(description, description)


def explain(
    loaded: LoadedConfig, key: str, language: Literal["en", "zh"] = "en"
) -> list[tuple[str, str]]:
    """Return (label, text) rows: description, type, default, bounds, value and origin; of a section, its keys.

    Raises:
        UserError: there is no such key; names the nearest.
    """
    description = describe(key)
    if language == "zh":
        description = in_chinese(description)
    rows = [("key", key), ("description", description)]
    field = field_of(key)
    if field is None:
        return rows
    section = section_class(field.annotation)
    if section is None:
        rows += _schema_rows(field)
        rows += _config_rows(loaded, key)
    else:
        keys = ", ".join(section.model_fields)
        rows.append(("keys", keys))
    return rows


def _schema_rows(field: FieldInfo) -> list[tuple[str, str]]:
    """Return rows on the type, default and bounds of a field."""
    default = str(field.default)
    if field.is_required():
        default = "required"
    rows = [("type", type_name(field.annotation)), ("default", default)]
    bounds = bounds_of(field)
    if bounds:
        rows.append(("allowed", bounds))
    return rows


def _config_rows(loaded: LoadedConfig, key: str) -> list[tuple[str, str]]:
    """Return rows on a key's value in a config, and on which file, option or default made it so."""
    value = str(_value_of(loaded.config, key))
    origin = loaded.origins.get(key, "default")
    return [("value", value), ("from", origin)]


def _value_of(config: Config, key: str) -> Any:
    """Return the value of a key as written; None in a section that is None."""
    value: Any = config
    for name in _resolved_key(key).split("."):
        value = getattr(value, name, None)
    return value


def field_of(key: str) -> FieldInfo | None:
    """Return the schema's field of a key as written; None for a key that only config files have."""
    section: type[BaseModel] | None = Config
    field = None
    for name in _resolved_key(key).split("."):
        if section is None or name not in section.model_fields:
            return None
        field = section.model_fields[name]
        section = section_class(field.annotation)
    return field


def _resolved_key(key: str) -> str:
    return "run.tensorboard_queue" if key == QUEUE else TOP_LEVEL.get(key, key)


def type_name(annotation: Any) -> str:
    """Return a type as Python writes it in a config: a choice as its values, a section as a dictionary."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if section_class(annotation) is annotation:
        return "dict"
    if annotation in (StepRanges, BatchSizeRampup):
        return "str"
    if annotation is Ellipsis:
        return "..."
    if annotation is NoneType:
        return "None"
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    names = [type_name(argument) for argument in arguments]
    if origin in (Union, UnionType):
        return " | ".join(names)
    name: str = (origin or annotation).__name__
    if names:
        name += f"[{', '.join(names)}]"
    return name


def bounds_of(field: FieldInfo) -> str:
    """Return which numbers a field takes, such as ">= 0, < 1"."""
    bounds = []
    for constraint in field.metadata:
        for name, sign in SIGNS.items():
            if hasattr(constraint, name):
                bounds.append(f"{sign} {getattr(constraint, name)}")
    return ", ".join(bounds)
