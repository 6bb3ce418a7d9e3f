"""``load_config``: a Python file and overrides become a resolved config, or one error with every problem."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from evomesh.config.finding import ConfigFinding
from evomesh.config.lr_rules import resolve_decay
from evomesh.config.reading.draft import ConfigDraft, leaves, shown
from evomesh.config.reading.ignored_keys import INERT, REFUSED
from evomesh.config.reading.origins import origins
from evomesh.config.reading.overrides import Override, apply_overrides, parse_overrides
from evomesh.config.reading.source import ConfigSource, read_source
from evomesh.config.reading.source_lines import line_of
from evomesh.config.reading.spellings import (
    QUEUE,
    SECTIONS,
    SPELLINGS,
    TOP_LEVEL,
    resolve,
    written_key,
)
from evomesh.config.reading.xtuner.file import is_xtuner_file
from evomesh.config.reading.xtuner.translate import read_xtuner_source
from evomesh.config.redact import holds_secrets
from evomesh.config.rules import check
from evomesh.config.schema import Config
from evomesh.config.step_values import SettingError
from evomesh.errors import ConfigError

ERRORS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "True or False",
    "dict_type": "dict(key=value, ...)",
    "model_type": "dict(key=value, ...)",
    "tuple_type": "a list or tuple",
    "string_pattern_mismatch": "a URL such as https://HOST:PORT",  # one key has a pattern
}
REMOVE_KEY = "remove it"
PLACES_SHOWN = 3  # of a name that several sections have
# Names of other programs, which are nearer in letters to some other dtype.
DTYPE_NAMES = {
    "fp64": "float64",
    "double": "float64",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "single": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}


@dataclass(frozen=True)
class LoadedConfig:
    """A config that passed every rule, and where its values came from.

    Attributes:
        config: everything resolved.
        origins: key as written in a config file -> "default", "FILE:LINE", "--set", "legacy KEY FILE:LINE" ...
        warnings: each once, with its key, file and line.
        text: the config file as it is on disk.
        path: where it is.
        preparation: arguments of ``evomesh`` that make the token files the config trains on, if it names raw data.
    """

    config: Config
    origins: dict[str, str]
    warnings: tuple[str, ...]
    text: str
    path: str = ""
    preparation: tuple[tuple[str, ...], ...] = ()


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> LoadedConfig:
    """Read and check the config file at ``path``.

    Args:
        overrides: ``section.key=value`` each; they win over the file, also where the file computes with them.
    Raises:
        ConfigError: all problems, each with key, line, what was expected and a fix.
    """
    # 1. Execute the file. It applies the overrides of names that it has; the others create keys.
    path = os.fspath(path)
    sets = parse_overrides(overrides)
    if is_xtuner_file(path):
        source = read_xtuner_source(path, sets)
    else:
        source = read_source(path, sets)

    def location_of(key: str) -> str:
        return _location_of(key, source, sets)

    draft = ConfigDraft(dict(source.values), location_of)
    draft.warnings += source.warnings
    not_applied = [item for item in sets if not _was_applied_by_file(item, source)]
    apply_overrides(draft.values, not_applied, create=True)
    given = [key for key, _ in leaves(source.values | draft.values)]
    given += draft.values

    # 2. Resolve other spellings. Top-level names that are left over are unknown.
    resolve(draft)
    unknown = [name for name in draft.values if name not in SECTIONS]
    for name in unknown:
        _add_unknown_key(draft, name)
        del draft.values[name]

    # 3. Validate the sections one by one, then the rules between them.
    config, failed = _validate(draft)
    if config is not None:
        config = resolve_decay(config)
        _check_rules(draft, config, given, failed)
    if draft.problems:
        raise ConfigError(draft.problems, path=path)
    assert config is not None
    value_origins = origins(config, draft, source, sets)
    if config.lr_scheduler.decay_from is not None:
        value_origins["data.total_steps"] = "lr_scheduler.decay_from + decay_steps"
    warnings = tuple(draft.warnings)
    return LoadedConfig(
        config, value_origins, warnings, source.text, path, source.preparation
    )


def _check_rules(
    draft: ConfigDraft,
    config: Config,
    given: Sequence[str],
    failed: set[str],
) -> None:
    """Add the findings and warnings of the rules to the draft; ``given`` are the keys that the user set."""

    def is_given(key: str) -> bool:
        # A section is given if one of its keys is.
        prefix = f"{key}."
        return any(other == key or other.startswith(prefix) for other in given)

    findings, warnings = check(config, is_given)
    for finding in findings:
        # Such a key has a problem already.
        has_invalid_value = not failed.isdisjoint(finding.keys)
        if not has_invalid_value:
            _add_finding(draft, finding)
    for key, words in warnings:
        source_key = draft.sources.get(key, key)
        draft.warn(written_key(source_key), words)


def known_keys() -> list[str]:
    """Return every key a config file may have, dotted, as written there."""
    # A dict is a set that keeps the order: some spellings are keys of the schema too.
    known = dict.fromkeys([*TOP_LEVEL, QUEUE, *SPELLINGS, *INERT, *REFUSED])
    for name in SECTIONS:
        annotation = Config.model_fields[name].annotation
        for key in _keys_below(annotation, name):
            written = written_key(key)
            known[written] = None
    # Parameters of a custom model are written in the model section itself.
    del known["model.extra"]
    return list(known)


def _keys_below(annotation: Any, key: str) -> Iterator[str]:
    """Yield ``key`` and, if its value is a section, the keys in it."""
    yield key
    section = section_class(annotation)
    if section is None:
        return
    for name, field in section.model_fields.items():
        yield from _keys_below(field.annotation, f"{key}.{name}")


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a field's type, such as ``LoadConfig`` in ``LoadConfig | None``; None without one."""
    if get_origin(annotation) is tuple:  # the sections of a list have no dotted keys
        return None
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _was_applied_by_file(override: Override, source: ConfigSource) -> bool:
    """Return whether the override took part in the execution of the file, or of a base, which has its name."""
    return override.keys[0] in source.names or override.dotted in source.names


def _location_of(key: str, source: ConfigSource, sets: Sequence[Override]) -> str:
    """Return "--set" if an override sets the key, a part of it or its section; else its line, as "FILE:LINE"."""
    for item in sets:
        sets_section = key.startswith(item.dotted + ".")
        sets_part = item.dotted.startswith(key + ".")
        if key == item.dotted or sets_section or sets_part:
            return "--set"
    return line_of(source.lines, key)


def _add_unknown_key(draft: ConfigDraft, key: str) -> None:
    """Record an unknown key, with what was meant by it."""
    _, _, name = key.rpartition(".")
    fix = meant_key(key)
    draft.problem(key, f"unknown key {name!r}", fix=fix, code="EVO-CONFIG-001")


def meant_key(key: str) -> str:
    """Say where the name of an unknown key belongs, which key of its section is similar, or that it must go."""
    section, _, name = key.rpartition(".")
    siblings = []
    elsewhere = []
    for known in known_keys():
        known_section, _, known_name = known.rpartition(".")
        if known_section == section:
            siblings.append(known_name)
        if known_name.lower() == name.lower() and known != key:
            elsewhere.append(known)
    words = []
    if elsewhere:
        elsewhere.sort(key=lambda known: not known.startswith(f"{section}."))
        words.append(_place_of(elsewhere))
    similar = difflib.get_close_matches(name, siblings, n=1)
    if similar:
        suggestion = f"{section}.{similar[0]}" if section else similar[0]
        words.append(f"did you mean {suggestion}?")
    if words:
        return "; or ".join(words)
    if section:
        return REMOVE_KEY
    return f"{REMOVE_KEY}; private names start with _ or are in capitals"


def _place_of(keys: list[str]) -> str:
    """Say in which sections the keys of one name are, or that it is in none."""
    for key in keys:
        if "." not in key:
            return f"{key} belongs at the top level of the config, in no section"
    shown = " or ".join(keys[:PLACES_SHOWN])
    more = " ..." if len(keys) > PLACES_SHOWN else ""
    return f"write it as {shown}{more}"


def _validate(draft: ConfigDraft) -> tuple[Config | None, set[str]]:
    """Return the config, with invalid keys at their defaults, and the invalid keys."""
    failed: set[str] = set()
    for _ in range(8):  # without its invalid keys, a section may have other errors
        try:
            return Config.model_validate(draft.sections), failed
        except ValidationError as error:
            for key, details in _errors_by_key(error):
                if key not in failed:
                    _add_validation_error(draft, key, details)
                failed.add(key)
                _remove_key(draft.sections, key)
    return None, failed


def _errors_by_key(error: ValidationError) -> Iterator[tuple[str, list[Any]]]:
    """Yield (dotted key, errors of its value)."""
    errors: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        is_unknown = item["type"] == "extra_forbidden"
        errors.setdefault(_key_of_error(item["loc"], is_unknown), []).append(item)
    yield from errors.items()


def _key_of_error(location: Sequence[int | str], is_unknown: bool) -> str:
    """Return the dotted key in pydantic's location, which also has union members and tuple positions."""
    # ("model", "compile", "bool") and ("model", "compile", "literal['auto']") are both
    # model.compile, and ("adam", "no_decay", 0) is adam.no_decay. So the
    # location is followed in the schema: parts that are not a field there are pydantic's.
    key: list[str] = []
    fields: dict[str, FieldInfo] = dict(Config.model_fields)
    for part in location:
        if not isinstance(part, str) or "[" in part:
            continue
        field = fields.get(part)
        # An unknown key is no field either, but it is what the error is about.
        if not key or is_unknown or field is not None:
            key.append(part)
        section = None
        if field is not None:
            section = section_class(field.annotation)
        fields = {}
        if section is not None:
            fields = dict(section.model_fields)
    return ".".join(key)


def _add_validation_error(draft: ConfigDraft, key: str, details: list[Any]) -> None:
    first = details[0]
    kind = first["type"]
    setting_error = first.get("ctx", {}).get("error")
    # The message names what the author wrote, and where.
    if key not in draft.sources:
        key = written_key(key)
    if kind == "extra_forbidden":
        _add_unknown_key(draft, key)
        return
    if kind == "missing":
        section, _, name = key.rpartition(".")
        draft.problem(
            key, "is missing", fix=f"add {name}=... to {section}", code="EVO-CONFIG-003"
        )
        return
    if isinstance(setting_error, SettingError):
        draft.problem(
            key,
            setting_error.found,
            expected=setting_error.expected,
            code="EVO-CONFIG-002",
        )
        return
    # A wrong value; one that may be a secret is not repeated.
    expected = _accepted_values(details) or first["msg"]
    value = shown(first["input"])
    if holds_secrets(key):
        value = f"a value of type {type(first['input']).__name__}"
    draft.problem(
        key,
        f"found {value}",
        expected=expected,
        fix=_suggested_fix(key, first),
        code="EVO-CONFIG-002",
    )


def _accepted_values(details: list[Any]) -> str:
    """Return what the schema accepts: a bound, else the accepted types and values."""
    first = details[0]
    bound = _bound_of(first.get("ctx", {}))
    if bound is not None:
        return bound

    # The value fails every alternative of a union, and each one gives a detail:
    # "int | Literal['auto']" has two.
    accepted: dict[str, None] = {}  # a set that keeps the order
    for detail in details:
        context = detail.get("ctx", {})
        literals = context.get("expected", "")
        kind = detail["type"]
        words = ERRORS.get(kind, literals)
        accepted[words] = None
    return " or ".join(accepted)


def _bound_of(context: dict[str, Any]) -> str | None:
    """Return the bound that pydantic says a number broke; None where it broke none."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    for name, sign in signs.items():
        if name in context:
            bound = context[name]
            return f"a number {sign} {bound}"
    return None


def _suggested_fix(key: str, detail: Any) -> str:
    """Return the nearest allowed word for a misspelled one, or advice on quoted numbers."""
    value = detail["input"]
    kind = detail["type"]
    if not isinstance(value, str):
        return ""
    if kind in ("float_type", "int_type") and _is_number(value):
        return "remove the quotes"
    if kind != "literal_error":
        return ""
    # Pydantic lists the allowed words as "'a', 'b' or 'c'".
    listed = detail["ctx"]["expected"].replace(" or ", ", ")
    allowed = [word.strip("' ") for word in listed.split(",")]
    return _suggested_word(key, value, allowed)


def _suggested_word(key: str, value: str, allowed: list[str]) -> str:
    """Return advice with the allowed word that is meant, or the nearest in letters; "" if none is near."""
    meant = DTYPE_NAMES.get(value.lower().removeprefix("torch."))
    if meant in allowed:
        return f"did you mean {meant!r}?"
    words = list(allowed)
    if key == "model.dtype":
        words += [f"torch.{word}" for word in allowed]
    suggestions = difflib.get_close_matches(value, words, n=1)
    if not suggestions:
        start = value[:2]
        suggestions = [word for word in words if word.startswith(start)]
    if not suggestions:
        return ""
    return f"did you mean {suggestions[0]!r}?"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _remove_key(sections: dict[str, Any], key: str) -> None:
    """Remove a key from nested sections; if the sections do not have it, the nearest key above it."""
    *above, name = key.split(".")
    parent: Any = sections
    for part in above:
        if not isinstance(parent, dict):
            break
        parent = parent.get(part)
    if isinstance(parent, dict) and name in parent:
        del parent[name]
        return
    # An error in ``parallel.zero1.size`` where zero1 is a text: the text goes.
    if above:
        key_above = ".".join(above)
        _remove_key(sections, key_above)


def _add_finding(draft: ConfigDraft, finding: ConfigFinding) -> None:
    """Report a finding at the first of its keys that the user wrote."""
    written = [draft.sources.get(key, written_key(key)) for key in finding.keys]
    located = [key for key in written if draft.location_of(key)]
    key = (located or written)[0]
    draft.problem(
        key,
        finding.found,
        expected=finding.expected,
        fix=finding.fix,
        code=finding.code,
    )
