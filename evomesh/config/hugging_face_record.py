"""Read single settings of a ``config.json``, and what differs between the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from evomesh.config.hugging_face_facts import HuggingFaceFacts
from evomesh.config.schema import LayerType
from evomesh.errors import UserError


@dataclass(frozen=True)
class ConfigRecord:
    """The content of a config.json.

    Attributes:
        where: its path, for messages.
        facts: of its ``model_type``.
    """

    record: dict[str, Any]
    where: str
    facts: HuggingFaceFacts

    def positive_integer(self, key: str) -> int:
        value = self.record.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"{key} is {value!r}",
                where=self.where,
                expected="a positive integer",
                code="EVO-HF-011",
            )
        return value

    def number(self, key: str, default: float) -> float:
        return self.as_number(key, self.record.get(key, default))

    def as_number(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(
                f"{key} is {value!r}",
                where=self.where,
                expected="a number",
                code="EVO-HF-011",
            )
        return float(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a value that is a JSON object, or {} where it is absent or null."""
        value = self.record.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise UserError(
                f"{key} is {value!r}",
                where=self.where,
                expected="a JSON object",
                code="EVO-HF-011",
            )
        return value


class LayerReader(ConfigRecord):
    """Reads the window and which layers have it, and which layers do not rotate."""

    def _sliding_window(self) -> int | None:
        """Return the window; where the file has none, what transformers takes for its type."""
        keys = self.facts.window
        if keys == "none":
            return None
        if keys == "switch" and not self.record.get("use_sliding_window", False):
            return None
        if "sliding_window" not in self.record:
            return self.facts.window_default
        if self.record["sliding_window"] is None:
            return None
        return self.positive_integer("sliding_window")

    def _nope_layers(self) -> tuple[int, ...]:
        """Return the layers without rotation: those with a 0 in ``no_rope_layers``, else every ``nope_interval``-th."""
        if self.facts.nope_interval is None:
            return ()
        layers = self.positive_integer("num_hidden_layers")
        rotates = self.record.get("no_rope_layers")
        if rotates is None:
            interval = self.record.get(
                "no_rope_layer_interval", self.facts.nope_interval
            )
            rotates = [(layer + 1) % interval for layer in range(layers)]
        # Longer lists are those of a larger model: transformers reads as many as there
        # are layers.
        if not isinstance(rotates, list) or len(rotates) < layers:
            raise UserError(
                f"no_rope_layers is {rotates!r}",
                where=self.where,
                expected=f"{layers} numbers: 0 for a layer without rotary positions, 1 for the others",
                code="EVO-HF-011",
            )
        return tuple(layer for layer in range(layers) if not rotates[layer])

    def _layer_types(self) -> tuple[LayerType, ...] | None:
        """Return which layers have the window; None: all of them, as in Mistral."""
        layers = self.positive_integer("num_hidden_layers")
        if self.facts.window != "switch" and self.facts.full_every is None:
            return None
        types = self.record.get("layer_types")
        if types is None:
            windowed = self._windowed_by_default(layers)
            return tuple(
                "sliding_attention" if layer in windowed else "full_attention"
                for layer in range(layers)
            )
        known = get_args(LayerType)
        if len(types) != layers or not set(types) <= set(known):
            raise UserError(
                f"layer_types has {len(types)} entries: {joined(types)}",
                where=self.where,
                expected=f"{layers} of {' or '.join(known)}",
                code="EVO-HF-011",
            )
        return tuple(types)

    def _windowed_by_default(self, layers: int) -> list[int]:
        """Return the layers with a window in a file without ``layer_types``.

        Qwen's older files have ``max_window_layers`` instead of a list: layers from
        that one on have the window, in transformers from layer 28 on without a number.
        In SmolLM3 it is those without rotation, in Gemma all but every second one, or
        in Gemma 3 but every ``sliding_window_pattern``-th.
        """
        if self.facts.nope_interval is not None:
            return list(self._nope_layers())
        period = self.facts.full_every
        if period is None:
            first = self.number("max_window_layers", 28)
            return [layer for layer in range(layers) if layer >= first]
        if self.record.get("sliding_window_pattern") is not None:
            period = self.positive_integer("sliding_window_pattern")
        windowed = []
        for layer in range(layers):
            is_full = (layer + 1) % period == 0
            if not is_full:
                windowed.append(layer)
        return windowed

    def settings(self) -> dict[str, Any]:
        """Return the window, ``layer_types`` and ``nope_layers``, each meaning written in one way."""
        window = self._sliding_window()
        types = self._layer_types() if window is not None else None
        if types is not None and "sliding_attention" not in types:
            window = None
        if window is None or types is None or "full_attention" not in types:
            types = None
        return {
            "sliding_window": window,
            "layer_types": types,
            "nope_layers": self._nope_layers(),
        }


def joined(value: object) -> str:
    """Return a value of JSON for a message, a list as its items."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
