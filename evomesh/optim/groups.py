"""The rules that decide which parameters weight decay applies to, and which are hidden matrices."""

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


# Modules whose matrix has a row for each token id.
VOCABULARY_MODULES = ("embedding", "embed_tokens", "head", "lm_head")


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter is a matrix inside a block, or a stack of them, which Muon updates.

    Args:
        name: its global name; blocks are numbered, as in ``layers.3.feed_forward.w1.weight``.
    """
    *modules, _ = name.split(".")
    in_block = any(module.isdigit() for module in modules)
    of_vocabulary = any(module in VOCABULARY_MODULES for module in modules)
    return len(shape) in (2, 3) and in_block and not of_vocabulary
