"""``load_config``: a Python file and overrides become a resolved config, or one error with every problem."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from evomesh.config.finding import ConfigFinding
from evomesh.config.reading.draft import ConfigDraft, leaves, shown
from evomesh.config.reading.ignored_keys import INERT, REFUSED
from evomesh.config.reading.origins import origins
from evomesh.config.reading.overrides import Override, apply_overrides, parse_overrides
from evomesh.config.reading.source import ConfigSource, read_source
from evomesh.config.reading.source_lines import line_of
from evomesh.config.reading.spellings import QUEUE, SECTIONS, SPELLINGS, TOP_LEVEL, resolve, written_key
from evomesh.config.rules import check
from evomesh.config.schema import Config
from evomesh.config.step_values import SettingError
from evomesh.errors import ConfigError, UserError

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


@dataclass(frozen=True)
class LoadedConfig:
    """A config that passed every rule, and where its values came from.

    Attributes:
        config: everything resolved.
        origins: key as written in a config file -> "default", "FILE:LINE", "--set", "legacy KEY FILE:LINE" ...
        warnings: each once, with its key, file and line.
        text: the config file as it is on disk.
        path: where it is.
    """

    config: Config
    origins: dict[str, str]
    warnings: tuple[str, ...]
    text: str
    path: str = ""


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read the config file at ``path``.

    Args:
        overrides: ``section.key=value`` each; they win over the file, also where the file computes with them.
    Raises:
        ConfigError: everything that is wrong, each with key, place, what was expected and a fix.
    """
    path = os.fspath(path)
    sets = parse_overrides(overrides)
    source = read_source(path, sets)
    draft = ConfigDraft(dict(source.values), lambda key: _place(key, source, sets))
    # The file has applied the overrides of its own names; what is left creates keys that it does not mention.
    apply_overrides(draft.values, [item for item in sets if not _consumed(item, source)], create=True)
    given = [key for key, _ in leaves(source.values | draft.values)] + list(draft.values)
    resolve(draft)
    for name in [name for name in draft.values if name not in SECTIONS]:
        _unknown(draft, name)
        del draft.values[name]
    config, failed = _validated(draft)
    if config is not None:
        _check_rules(draft, config, given, failed)
    if draft.problems:
        raise ConfigError(draft.problems, path=path)
    assert config is not None
    return LoadedConfig(
        config, origins(config, draft, source, sets), tuple(draft.warnings), source.text, path
    )


def _check_rules(draft: ConfigDraft, config: Config, given: Sequence[str], failed: set[str]) -> None:
    """Add what the rules find to the draft; ``given`` are the keys that the user set."""

    def is_given(key: str) -> bool:
        return any(other == key or other.startswith(key + ".") for other in given)

    findings, warnings = check(config, is_given)
    for finding in findings:
        _report(draft, finding, failed)
    for key, words in warnings:
        draft.warn(written_key(draft.sources.get(key, key)), words)


def known_keys() -> list[str]:
    """Return every key a config file may have, dotted, as written there."""
    keys = [*TOP_LEVEL, QUEUE, *SPELLINGS, *INERT, *REFUSED]
    for name in SECTIONS:
        keys += [written_key(key) for key in _fields(Config.model_fields[name].annotation, name)]
    return list(dict.fromkeys(key for key in keys if key != "model.extra"))


def _fields(annotation: Any, key: str) -> Iterator[str]:
    models = [
        a
        for a in (annotation, *getattr(annotation, "__args__", ()))
        if isinstance(a, type) and issubclass(a, BaseModel)
    ]
    yield key
    for model in models:
        for name, field in model.model_fields.items():
            yield from _fields(field.annotation, f"{key}.{name}")


def _consumed(override: Override, source: ConfigSource) -> bool:
    """Return whether the override took part in the execution of the file, or of a base, which has its name."""
    return override.keys[0] in source.names


def _place(key: str, source: ConfigSource, sets: Sequence[Override]) -> str:
    for item in sets:
        if key == item.dotted or key.startswith(item.dotted + ".") or item.dotted.startswith(key + "."):
            return "--set"
    return line_of(source.lines, key)


def _unknown(draft: ConfigDraft, key: str) -> None:
    known = known_keys()
    section, _, name = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(name, siblings, n=1)
    elsewhere = [k for k in known if k.rpartition(".")[2] == name and k != key]
    fix = "remove it; private names start with _ or are in capitals" if not section else "remove it"
    if elsewhere and not near:
        fix = f"did you mean {elsewhere[0]}?"
    if near:
        fix = f"did you mean {f'{section}.{near[0]}' if section else near[0]}?"
    draft.problem(key, f"unknown key {name!r}", fix=fix)


def _validated(draft: ConfigDraft) -> tuple[Config | None, set[str]]:
    """Return the config, with invalid keys at their defaults, and those keys."""
    failed: set[str] = set()
    for _ in range(8):  # a section that loses its wrong keys may show others
        try:
            return Config.model_validate(draft.sections), failed
        except ValidationError as error:
            for key, details in _by_key(error):
                if key not in failed:
                    _explain(draft, key, details)
                failed.add(key)
                _remove(draft.sections, key)
    return None, failed


def _by_key(error: ValidationError) -> Iterator[tuple[str, list[Any]]]:
    found: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        parts = [part for part in item["loc"] if isinstance(part, str) and "[" not in part]
        node: Any = Config
        key: list[str] = []
        for part in parts:  # union members and tuple positions follow the real key
            if not key or _is_field(node, part) or item["type"] == "extra_forbidden":
                key.append(part)
            node = _child(node, part)
        found.setdefault(".".join(key), []).append(item)
    yield from found.items()


def _child(node: Any, name: str) -> Any:
    if not (isinstance(node, type) and issubclass(node, BaseModel)) or name not in node.model_fields:
        return None
    annotation = node.model_fields[name].annotation
    inner = [
        a
        for a in (annotation, *getattr(annotation, "__args__", ()))
        if isinstance(a, type) and issubclass(a, BaseModel)
    ]
    return inner[0] if inner else None


def _is_field(node: Any, name: str) -> bool:
    return isinstance(node, type) and issubclass(node, BaseModel) and name in node.model_fields


def _explain(draft: ConfigDraft, key: str, details: list[Any]) -> None:
    first = details[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    key = written_key(key) if key not in draft.sources else key
    if kind == "extra_forbidden":
        _unknown(draft, key)
        return
    if kind == "missing":
        draft.problem(key, "is missing", fix=f"add {key.rpartition('.')[2]}=... to {key.rpartition('.')[0]}")
        return
    if isinstance(context.get("error"), SettingError):
        draft.problem(key, context["error"].found, expected=context["error"].expected)
        return
    draft.problem(
        key, f"found {shown(value)}", expected=_expected(details) or first["msg"], fix=_fix(key, first)
    )


def _expected(details: list[Any]) -> str:
    """Return what the validation wanted: a bound, else the accepted types and values."""
    context = details[0].get("ctx", {})
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if name in context:
            return f"a number {sign} {context[name]}"
    wanted = [ERRORS.get(detail["type"], detail.get("ctx", {}).get("expected", "")) for detail in details]
    return " or ".join(dict.fromkeys(wanted))


def _fix(key: str, detail: Any) -> str:
    """Return the nearest allowed word for a misspelled one, or advice on quoted numbers."""
    value = detail["input"]
    if not isinstance(value, str):
        return ""
    if detail["type"] in ("float_type", "int_type"):
        return "remove the quotes" if _is_number(value) else ""
    if detail["type"] != "literal_error":
        return ""
    allowed = [word.strip("' ") for word in detail["ctx"]["expected"].replace(" or ", ", ").split(",")]
    if key == "model.dtype":
        allowed += [f"torch.{word}" for word in allowed]
    near = difflib.get_close_matches(value, allowed, n=1)
    near = near or [word for word in allowed if word.startswith(value[:2])]
    return f"did you mean {near[0]!r}?" if near else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _remove(sections: dict[str, Any], key: str) -> None:
    *above, name = key.split(".")
    node: Any = sections
    for part in above:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict) and name in node:
        del node[name]
    elif above:
        _remove(sections, ".".join(above))


def _report(draft: ConfigDraft, finding: ConfigFinding, failed: set[str]) -> None:
    if failed & set(finding.keys):
        return
    key = next(
        (k for k in finding.keys if draft.place(draft.sources.get(k, written_key(k)))), finding.keys[0]
    )
    draft.problems.append(
        UserError(
            finding.found,
            where=draft.where(key if key in draft.sources else written_key(key)),
            expected=finding.expected,
            fix=finding.fix,
        )
    )
