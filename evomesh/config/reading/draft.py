"""``ConfigDraft``: a config between the values of its file and the resolved sections, with warnings and problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from evomesh.config.switches import OffKeys
from evomesh.errors import UserError


@dataclass
class ConfigDraft:
    """A config between reading and validation.

    Attributes:
        values: what the file and the overrides say: top-level name -> value, sections as plain dicts.
        location_of: dotted key, as written -> "FILE:LINE", "--set" or "".
        sections: the resolved form, to be validated.
        sources: resolved key -> the key as written, where they differ.
        families: resolved key -> the model family whose default it has.
        off: keys whose block is switched off: nothing about them is a problem.
    """

    values: dict[str, Any]
    location_of: Callable[[str], str]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)
    off: OffKeys = field(default_factory=OffKeys)

    def take_section(self, name: str) -> dict[str, Any]:
        """Move a section from ``values`` to ``sections`` the first time, and return it: a plain dict to edit in place.

        A value that is not a mapping is recorded as a problem, and the section is {}.
        """
        section = self.sections.setdefault(name, {})
        if section or name not in self.values:
            return section
        written = self.values.pop(name)
        if isinstance(written, Mapping):
            section.update(plain(written))
        elif written is not None:
            self.problem(
                name,
                f"found {shown(written)}",
                expected="dict(key=value, ...)",
                code="EVO-CONFIG-002",
            )
        return section

    def warn(self, key: str, words: str) -> None:
        text = f"{self._with_location(key)}: {words}"
        if text not in self.warnings:
            self.warnings.append(text)

    def problem(
        self,
        key: str,
        found: str,
        *,
        code: str,
        expected: str = "",
        fix: str = "",
    ) -> None:
        """Record a problem with a key, resolved or as written; none with a key that is switched off."""
        written = self.sources.get(key, key)
        is_off = key in self.off or written in self.off
        if is_off:
            return
        where = self.where(key)
        error = UserError(found, where=where, expected=expected, fix=fix, code=code)
        self.problems.append(error)

    def where(self, key: str) -> str:
        """Return the key as the user wrote it, with its file and line."""
        return self._with_location(self.sources.get(key, key))

    def _with_location(self, key: str) -> str:
        location = self.location_of(key)
        return f"{key} ({location})" if location else key


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in nested dicts that is not itself a non-empty dict."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, value


def plain(value: Any) -> Any:
    """Copy nested mappings into plain dicts."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def shown(value: Any) -> str:
    """Return a value and its type in plain words, shortened to a readable length."""
    kinds = {
        bool: "a bool",
        int: "an integer",
        float: "a float",
        str: "a string",
        dict: "a dict",
        list: "a list",
    }
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    if value is None:
        return text
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    return f"{text} ({kind})"
