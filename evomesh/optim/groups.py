"""The rules that decide learning rate and weight decay of each parameter, and which are hidden matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomesh.config.optimizer import OptimizerType
from evomesh.config.parameter_groups import group_number
from evomesh.config.schema import AdamConfig


@dataclass(frozen=True)
class UpdateSettings:
    """Learning rate and weight decay in the updates of some parameters.

    Attributes:
        lr_scale: factor of the step's learning rate.
        weight_decay: times that learning rate, the share of a weight that a step takes away.
    """

    lr_scale: float = 1.0
    weight_decay: float = 0.0


def update_settings(name: str, adam: AdamConfig) -> UpdateSettings:
    """Return what holds for the parameter with this global name: its group's values, else those of all."""
    decay = adam.weight_decay
    if not has_weight_decay(name, adam.no_decay):
        decay = 0.0
    number = group_number(name, adam.groups)
    if number is None:
        return UpdateSettings(weight_decay=decay)
    group = adam.groups[number - 1]
    if group.weight_decay is not None:
        decay = group.weight_decay
    return UpdateSettings(group.lr_scale, decay)


def hidden_lr_scale(rule: OptimizerType, width_multiplier: float) -> float:
    """Return the factor that muP gives the learning rate of hidden matrices.

    Elements of an update of AdamW have a size, and their sum over the width grows with it.
    The update of Muon has singular values sqrt(width) times that size: it grows with the root.
    """
    exponent = -0.5 if rule == "muon" else -1.0
    return float(width_multiplier**exponent)


def scaled_settings(settings: UpdateSettings, factor: float) -> UpdateSettings:
    """Return settings with another learning rate; what decay takes away stays the same."""
    return UpdateSettings(settings.lr_scale * factor, settings.weight_decay / factor)


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
