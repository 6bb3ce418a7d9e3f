"""Explanations of config keys, from the schema's descriptions and the tables of other spellings and ignored keys."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evomesh.config.loader import LoadedConfig, known_keys
from evomesh.config.reading.ignored_keys import INERT, REFUSED
from evomesh.config.reading.spellings import QUEUE, SPELLINGS, TOP_LEVEL
from evomesh.config.schema import Config
from evomesh.errors import UserError

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe(key: str) -> str:
    """Return what ``key``, as written in a config, does, or why it does nothing.

    Raises:
        UserError: there is no such key; names the nearest.
    """
    if key in REFUSED:
        return f"Refused: {REFUSED[key][1]}."
    if key in INERT:
        return f"Has no effect: {INERT[key][1]}."
    if key in SPELLINGS:
        return SPELLINGS[key]
    field = field_of(key)
    if field is not None and field.description:
        return field.description
    if key not in known_keys():
        near = difflib.get_close_matches(key, known_keys(), n=1)
        raise UserError(
            f"unknown key {key!r}",
            where="--explain",
            fix=f"did you mean {near[0]}?" if near else "evomesh config show CONFIG lists the keys",
        )
    return "A section: dict(key=value, ...)."


def explain(loaded: LoadedConfig, key: str) -> list[tuple[str, str]]:
    """Return (label, text) rows: description, type, default, allowed values, value and origin in this config.

    Raises:
        UserError: there is no such key; names the nearest.
    """
    rows = [("key", key), ("description", describe(key))]
    field = field_of(key)
    if field is None or _section_of(field) is not None:
        return rows
    rows.append(("type", _type_name(field.annotation)))
    rows.append(("default", "required" if field.is_required() else str(field.default)))
    allowed = _allowed(field)
    if allowed:
        rows.append(("allowed", allowed))
    value: Any = loaded.config
    for name in _resolved(key).split("."):
        value = getattr(value, name, None)
    rows.append(("value", str(value)))
    rows.append(("from", loaded.origins.get(key, "default")))
    return rows


def field_of(key: str) -> FieldInfo | None:
    """Return the schema's field of a key as written; None for a key that only config files have."""
    model: type[BaseModel] | None = Config
    field = None
    for name in _resolved(key).split("."):
        if model is None or name not in model.model_fields:
            return None
        field = model.model_fields[name]
        model = _section_of(field)
    return field


def _resolved(key: str) -> str:
    return "run.tensorboard_queue" if key == QUEUE else TOP_LEVEL.get(key, key)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _type_name(annotation: Any) -> str:
    name = (
        annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    )
    return name.replace("typing.", "").replace("evomesh.config.step_values.", "").replace("NoneType", "None")


def _allowed(field: FieldInfo) -> str:
    bounds = []
    for constraint in field.metadata:
        for name, sign in SIGNS.items():
            if hasattr(constraint, name):
                bounds.append(f"{sign} {getattr(constraint, name)}")
    return ", ".join(bounds)
