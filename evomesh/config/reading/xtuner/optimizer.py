"""XTuner's optimizer, learning rate and steps: mmengine counts micro-iterations, evomesh optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomesh.config.reading.draft import shown
from evomesh.config.reading.xtuner.foreign_names import last_name
from evomesh.config.reading.xtuner.settings import XTunerSettings
from evomesh.config.reading.xtuner.translation import Translation

ACCUMULATION = "optim_wrapper.accumulative_counts"
OPTIMIZER = "optim_wrapper.optimizer"
# mmengine's defaults of schedulers.
START_FACTOR = 1 / 3
BOTH_KINDS = "LinearLR from the start, then CosineAnnealingLR to the end; or one of them; or none"


@dataclass(frozen=True)
class Length:
    """The length of training, in passes or in micro-iterations."""

    value: float
    by_epoch: bool


def translate_optimizer(out: Translation) -> None:
    """Translate ``optim_wrapper``, ``param_scheduler`` and ``train_cfg``."""
    settings = out.settings
    kind = last_name(settings.get(f"{OPTIMIZER}.type"))
    if kind != "AdamW":
        settings.problem(
            f"{OPTIMIZER}.type",
            f"{kind or 'no optimizer'} is not part of evomesh",
            expected="torch.optim.AdamW",
            code="EVO-CONFIG-009",
        )
    lr = settings.number(f"{OPTIMIZER}.lr", 1e-3)
    out.put("adam.lr", lr, f"{OPTIMIZER}.lr")
    out.put(
        "adam.adam_eps", settings.number(f"{OPTIMIZER}.eps", 1e-8), f"{OPTIMIZER}.eps"
    )
    decay = settings.number(f"{OPTIMIZER}.weight_decay", 0.01)
    out.put("adam.weight_decay", decay, f"{OPTIMIZER}.weight_decay")
    _put_betas(out)
    _put_clipping(out)
    length = _put_length(out)
    if length is not None:
        _put_schedule(out, length, lr)


def accumulation(settings: XTunerSettings) -> int:
    """Return the micro-iterations of one optimizer step, as mmengine receives them."""
    counts = settings.number(ACCUMULATION, 1)
    if counts >= 1 and counts == int(counts):
        return int(counts)
    if not any(error.where.startswith(ACCUMULATION) for error in settings.problems):
        lower = max(1, math.floor(counts))
        upper = max(1, math.ceil(counts))
        nearest = sorted({lower, upper})
        settings.problem(
            ACCUMULATION,
            f"found {counts:g} micro-iterations in one step",
            expected=f"a whole number, such as {' or '.join(map(str, nearest))}",
            fix="evomesh batch shows the tokens of a step, and the settings that give the same",
            code="EVO-CONFIG-014",
        )
    return 1


def _put_betas(out: Translation) -> None:
    key = f"{OPTIMIZER}.betas"
    betas = out.settings.get(key, (0.9, 0.999))
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        out.settings.problem(
            key,
            f"found {shown(betas)}",
            expected="two numbers, such as (0.9, 0.95)",
            code="EVO-CONFIG-014",
        )
        return
    out.put("adam.adam_beta1", betas[0], key)
    out.put("adam.adam_beta2", betas[1], key)


def _put_clipping(out: Translation) -> None:
    settings = out.settings
    key = "optim_wrapper.clip_grad"
    norm = settings.get(f"{key}.max_norm")
    kind = settings.get(f"{key}.norm_type", 2)
    if kind != 2:
        settings.problem(
            f"{key}.norm_type",
            f"found {kind!r}",
            expected="2, the Euclidean norm",
            code="EVO-CONFIG-014",
        )
    if norm is None:
        out.put("hybrid_zero_optimizer.clip_grad_norm", 0.0, key, "no clipping")
    else:
        out.put("hybrid_zero_optimizer.clip_grad_norm", norm, f"{key}.max_norm")


def _put_length(out: Translation) -> Length | None:
    """Translate ``max_epochs`` or ``max_iters``; exactly one of them is set."""
    settings = out.settings
    epochs = settings.get("train_cfg.max_epochs")
    iterations = settings.get("train_cfg.max_iters")
    if (epochs is None) == (iterations is None):
        settings.problem(
            "train_cfg",
            f"found max_epochs={epochs!r} and max_iters={iterations!r}",
            expected="exactly one of them",
            code="EVO-CONFIG-014",
        )
        return None
    if epochs is not None:
        value = settings.number("train_cfg.max_epochs", 1)
        out.put("data.epochs", value, "train_cfg.max_epochs")
        return Length(value, by_epoch=True)
    # mmengine calls each forward and backward an iteration: 1000 of them with
    # accumulative_counts 4 are 250 optimizer steps.
    count = settings.whole("train_cfg.max_iters", 1)
    per_step = accumulation(settings)
    remark = f"{count} micro-iterations, {per_step} per step"
    out.put(
        "data.total_steps", max(count // per_step, 1), "train_cfg.max_iters", remark
    )
    if count % per_step:
        out.warn(
            "train_cfg.max_iters",
            f"{count} micro-iterations are {count / per_step:g} steps of {per_step}: the last {count % per_step} "
            "would end no step",
        )
    return Length(count, by_epoch=False)


def _put_schedule(out: Translation, length: Length, lr: float) -> None:
    """Translate ``param_scheduler``: a linear warm-up, then half a cosine or a constant rate."""
    settings = out.settings
    key = "param_scheduler"
    entries = settings.get(key) or []
    entries = [entries] if isinstance(entries, Mapping) else list(entries)
    kinds = [
        last_name(entry.get("type")) for entry in entries if isinstance(entry, Mapping)
    ]
    if kinds not in (
        [],
        ["LinearLR"],
        ["CosineAnnealingLR"],
        ["LinearLR", "CosineAnnealingLR"],
    ):
        settings.problem(
            key,
            f"found {', '.join(kinds) or shown(entries)}",
            expected=BOTH_KINDS,
            code="EVO-CONFIG-014",
        )
        return
    # mmengine compares the bounds of a schedule with its own counter: in other units
    # than the length, the warm-up would end somewhere else than the author meant.
    if any(entry.get("by_epoch", True) != length.by_epoch for entry in entries):
        theirs = "passes"
        ours = "micro-iterations"
        if length.by_epoch:
            theirs, ours = ours, theirs
        settings.problem(
            key,
            f"the schedule counts {theirs}, train_cfg counts {ours}",
            expected="both in the same unit",
            fix=f"by_epoch={length.by_epoch} in param_scheduler, with begin and end in {ours}",
            code="EVO-CONFIG-014",
        )
        return
    if kinds[:1] == ["LinearLR"]:
        _put_warmup(out, entries[0], length)
    if "CosineAnnealingLR" in kinds:
        _put_cosine(out, entries[-1], length, lr)
    else:
        out.put("lr_scheduler.eta_min", lr, key, "constant after the warm-up")


def _put_warmup(out: Translation, entry: Mapping[str, Any], length: Length) -> None:
    key = "param_scheduler"
    end = entry.get("end", math.inf)
    is_usual = entry.get("begin", 0) == 0 and entry.get("end_factor", 1.0) == 1.0
    if not is_usual or not 0 <= end <= length.value:
        out.settings.problem(
            key,
            f"LinearLR from {entry.get('begin', 0)} to {end:g} of {length.value:g}, "
            f"to {entry.get('end_factor', 1.0)} of the rate",
            expected="a warm-up from 0 to within the training, to 1.0 of the rate",
            code="EVO-CONFIG-014",
        )
        return
    out.put("lr_scheduler.warmup_ratio", end / length.value, key, "LinearLR end")
    start = entry.get("start_factor", START_FACTOR)
    out.put("lr_scheduler.warmup_start", start, key, "LinearLR start_factor")


def _put_cosine(
    out: Translation, entry: Mapping[str, Any], length: Length, lr: float
) -> None:
    key = "param_scheduler"
    begin = entry.get("begin", 0)
    end = entry.get("end", math.inf)
    period = entry.get("T_max") or end - begin
    # Templates give T_max=max_epochs although the cosine starts after the warm-up: its
    # last part is never reached.
    reaches_end = min(begin + period, end) >= length.value and period <= length.value
    if not reaches_end:
        out.settings.problem(
            key,
            f"a cosine of {period:g} from {begin:g}, in a training of {length.value:g}",
            expected="one that ends where the training ends",
            fix=f"end={length.value:g} instead of T_max",
            code="EVO-CONFIG-014",
        )
        return
    ratio = entry.get("eta_min_ratio")
    eta_min = lr * ratio if ratio is not None else entry.get("eta_min", 0.0)
    out.put("lr_scheduler.eta_min", eta_min, key, "CosineAnnealingLR eta_min")
