"""Learning rate and beta2 as pure functions of the number of updates already made.

There is no scheduler object and no state to save: a resumed run computes the same
values as an uninterrupted one.
"""

from __future__ import annotations

import math

from evomesh.config.schema import AdamConfig, Beta2Config, LrConfig


def learning_rate(
    step: int, config: LrConfig, adam: AdamConfig, total_steps: int
) -> float:
    """Return the learning rate: 0 for ``init_steps``, linear up to ``adam.lr``, then half a cosine down to ``eta_min``.

    With ``warmup_start``, the line of the warm-up starts at that fraction of
    ``adam.lr``, as mmengine's LinearLR does.

    Args:
        step: successful updates before this one, from 0; the first update of the warm-up uses ``lr / warmup``.
        total_steps: length of the run, unless ``config.total_steps`` is set; after it the rate stays at ``eta_min``.
    """
    total = config.total_steps or total_steps
    warmup = int(total * config.warmup_ratio)
    step -= config.init_steps
    if step < 0:
        return 0.0
    if step < warmup:
        return adam.lr * _warmup_factor(step, warmup, config.warmup_start)
    decay_steps = total - config.init_steps - warmup
    progress = 1.0
    if decay_steps > 0:
        progress = min((step - warmup) / decay_steps, 1.0)
    cosine = 1 + math.cos(math.pi * progress)  # from 2 down to 0
    return config.eta_min + (adam.lr - config.eta_min) * cosine / 2


def _warmup_factor(step: int, warmup: int, start: float | None) -> float:
    """Return the fraction of the peak rate in a step of the warm-up; the last one has 1."""
    if start is None:
        return (step + 1) / warmup
    return start + (1 - start) * step / (warmup - 1) if warmup > 1 else 1.0


def beta2(step: int, config: Beta2Config, adam: AdamConfig) -> float:
    """Return max(initial, 1 - n^-c), n = ``step`` + 1 (Shazeer and Stern, arXiv 1804.04235); the initial for c <= 0."""
    initial = adam.adam_beta2 if config.init_beta2 is None else config.init_beta2
    c = adam.adam_beta2_c if config.c is None else config.c
    return initial if c <= 0 else max(initial, 1 - (step + 1) ** -c)
