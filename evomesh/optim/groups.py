"""The rule that decides which parameters weight decay applies to."""

from __future__ import annotations

from collections.abc import Sequence


def has_weight_decay(name: str, no_decay: Sequence[str]) -> bool:
    """Return whether weight decay applies to the parameter with this global name.

    By default ``no_decay`` is empty, and all parameters decay, including biases, norms
    and embedding, as in InternEvo.

    Args:
        name: for example ``layers.3.attention_norm.weight``.
        no_decay: any of "bias", "norm", "embedding".
    """
    *modules, leaf = name.split(".")
    module = modules[-1] if modules else ""
    excluded = {
        "bias": leaf == "bias",
        "norm": module.endswith("norm"),
        "embedding": "embedding" in modules,
    }
    return not any(excluded[kind] for kind in no_decay)
