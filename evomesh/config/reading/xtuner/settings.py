"""``XTunerSettings``: the values of an XTuner config by dotted key, and which of them were used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomesh.config.reading.draft import leaves, shown
from evomesh.config.reading.overrides import Override
from evomesh.config.reading.source_lines import line_of
from evomesh.config.reading.xtuner.file import XTunerFile
from evomesh.errors import UserError

MISSING = object()
MAX_VARIABLES = 16  # names that stand for names: longer chains are cycles


class XTunerSettings:
    """Values by dotted key, such as "optim_wrapper.optimizer.lr".

    Attributes:
        file: the executed config.
        problems: values of a wrong type, and whatever the translation cannot use.
    """

    def __init__(self, file: XTunerFile, overrides: Sequence[Override]) -> None:
        self.file = file
        self.problems: list[UserError] = []
        self._overridden = {override.dotted for override in overrides}
        self._used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, ``default`` if it is not set; the key counts as used."""
        self._used.add(key)
        return self.peek(key, default)

    def peek(self, key: str, default: Any = None) -> Any:
        """Return a value without counting the keys below it as used."""
        node: Any = self.file.values
        for name in key.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return default
            node = node[name]
        return node

    def has(self, key: str) -> bool:
        return self.get(key, MISSING) is not MISSING

    def number(self, key: str, default: float) -> float:
        """Return a number; anything else is a problem, and ``default``."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problem(
                key, f"found {shown(value)}", expected="a number", code="EVO-CONFIG-002"
            )
            return default
        return value

    def whole(self, key: str, default: int) -> int:
        """Return a whole number, which may be written as 2.0; anything else is a problem, and ``default``."""
        value = self.number(key, default)
        if value != int(value):
            self.problem(
                key,
                f"found {value}",
                expected=f"a whole number, such as {int(value)}",
                code="EVO-CONFIG-002",
            )
            return default
        return int(value)

    def problem(
        self, key: str, found: str, *, code: str, expected: str = "", fix: str = ""
    ) -> None:
        where = f"{key} ({place})" if (place := self.origin(key)) else key
        self.problems.append(
            UserError(found, where=where, expected=expected, fix=fix, code=code)
        )

    def origin(self, key: str) -> str:
        """Return "FILE:LINE NAME" of the assignment that decides a key: of ``lr = 4e-5`` for an ``lr=lr`` in it."""
        # An override may name the variable, --set lr=1e-5, or the key that it ends in,
        # --set optim_wrapper.optimizer.lr=1e-5.
        name = self._decisive_name(key)
        for overridden in self._overridden:
            if _covers(overridden, name) or _covers(overridden, key):
                return f"--set {name}"
        line = line_of(self.file.lines, name)
        return f"{line} {name}" if line else ""

    def _decisive_name(self, key: str) -> str:
        """Follow variables: train_dataloader.dataset.folder -> train_dataset.folder -> dataset_folder."""
        for _ in range(MAX_VARIABLES):
            # The longest prefix that is written as a variable decides: "a.b.c", else
            # "a.b", else "a".
            known = key
            while known and not self._is_variable(known):
                known = known.rpartition(".")[0]
            if not known:
                break
            rest = key[len(known) :]
            key = self.file.variables[known] + rest
        return key

    def _is_variable(self, key: str) -> bool:
        """Return whether a key's value is written as a name that the file assigns, rather than imports."""
        return self.file.variables.get(key) in self.file.lines

    def unused(self, top_names: Sequence[str]) -> list[tuple[str, Any]]:
        """Return the keys below ``top_names`` that nothing has asked for, with their values."""
        rows = []
        for top in top_names:
            rows += [
                item
                for item in leaves(self.file.values.get(top), top)
                if not self._is_used(item[0])
            ]
        return rows

    def used_below(self, section: str) -> list[str]:
        """Return the names below a section that were asked for, and so are known."""
        prefix = f"{section}." if section else ""
        names = {
            key.removeprefix(prefix) for key in self._used if key.startswith(prefix)
        }
        return sorted(name for name in names if "." not in name)

    def _is_used(self, key: str) -> bool:
        return any(key == used or key.startswith(used + ".") for used in self._used)


def _covers(overridden: str, key: str) -> bool:
    return key == overridden or key.startswith(overridden + ".")
