"""``Translation``: our values on their way from an XTuner config, each with its origin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from evomesh.config.reading.xtuner.settings import MISSING, XTunerSettings


@dataclass
class Translation:
    """Our values, made of those of an XTuner config.

    Attributes:
        settings: the config it is read from.
        work_dir: folder of checkpoints and logs.
        values: top-level name of our config -> value.
        lines: dotted key of our config -> where its value comes from.
        warnings: what could not be carried over, with the reason.
        preparation: ``evomesh`` command lines that make the token files of raw data.
    """

    settings: XTunerSettings
    work_dir: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    preparation: list[tuple[str, ...]] = field(default_factory=list)

    def put(self, key: str, value: Any, source: str, remark: str = "") -> None:
        """Set a key of ours.

        Args:
            key: dotted, at most two levels deep, except in ``ckpt.load_ckpt_info``.
            source: XTuner's key that it comes from, "" for one that follows from XTuner's behavior.
            remark: what was computed, or why.
        """
        *above, name = key.split(".")
        node = self.values
        for part in above:
            node = node.setdefault(part, {})
        node[name] = value
        origin = ""
        if source:
            is_set = self.settings.peek(source, MISSING) is not MISSING
            origin = (
                self.settings.origin(source)
                if is_set
                else f"XTuner's default of {source}"
            )
        words = [origin, remark and f"({remark})"]
        self.lines[key] = " ".join(word for word in words if word)

    def warn(self, key: str, words: str) -> None:
        """Report a setting that has no effect here, or another one."""
        origin = self.settings.origin(key)
        self.warnings.append(
            f"{key} ({origin}): {words}" if origin else f"{key}: {words}"
        )
