"""Which parameters weight decay acts on."""

from __future__ import annotations

from collections.abc import Sequence


def has_weight_decay(name: str, no_decay: Sequence[str]) -> bool:
    """Whether the parameter with this global name is decayed.

    The default, an empty ``no_decay``, decays everything, biases, norms and embedding included, as InternEvo does.

    Args:
        name: for example ``layers.3.attention_norm.weight``.
        no_decay: any of "bias", "norm", "embedding".
    """
    *modules, leaf = name.split(".")
    module = modules[-1] if modules else ""
    excluded = {"bias": leaf == "bias", "norm": module.endswith("norm"), "embedding": "embedding" in modules}
    return not any(excluded[kind] for kind in no_decay)
