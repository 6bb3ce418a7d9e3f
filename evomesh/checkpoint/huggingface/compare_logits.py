"""Compare the logits of the native model with those of ``transformers`` on a fixed batch.

Both sides compute in float32 (float64 for a float64 folder) with the same rounded
weights, so they differ by the order of summation only.

The reference is always a folder that ``transformers`` reads itself (``stock_logits``).
Of an import that is the original; the native side has what was committed. Of an export
it is the exported folder, and if the checkpoint is an import that was not trained since,
the original too. The native side of an export is our own forward pass, since a trained
model has no other implementation; its weights are read without the index by which the
export read them (``data_files``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evomesh.checkpoint.huggingface.stock_logits import (
    LENGTH,
    fixed_batch,
    wide_dtype,
)
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import ModelConfig
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.registry import build_model

# Of the largest logit: both compute in float32, the weights being equal.
TOLERANCE = 1e-4
# An exported head is rounded after its rows are normalized, one of muP after it is
# scaled.
ROUNDED_LATER = {"float16": 5e-3, "bfloat16": 4e-2}

TensorReader = Callable[[str], Tensor]  # reads an unsharded tensor by its name


@torch.inference_mode()
def native_logits(config: ModelConfig, weights: TensorReader, dtype: str) -> Tensor:
    """Return the native model's logits [TEXTS, LENGTH, V].

    Its weights are rounded to ``dtype``.
    """
    changes = {
        "dtype": wide_dtype(dtype),
        "use_fp32_norm": False,
        "compile": False,
        "residual_in_fp32": False,
    }
    config = config.model_copy(update=changes)
    rounded_dtype = getattr(torch, dtype)
    bounds = single_sequence(LENGTH)
    rows = list(fixed_batch(config.vocab_size))
    # Each layer is built as a pipeline stage with that layer alone, so that one layer in
    # float32 is in memory at a time: a model of 70B has 280 GB of them.
    for layer in range(config.num_layers):
        stage = build_model(config, layer_range=range(layer, layer + 1))
        stage.eval()
        for name, parameter in stage.named_parameters():
            rounded = weights(name).to(rounded_dtype)
            parameter.copy_(rounded)
        rows = [stage(row, bounds) for row in rows]
        if layer == config.num_layers - 1:
            rows = [stage.logits(row) for row in rows]
        del stage  # freed before the next one is built
    return torch.stack(rows)


def tolerance_of(dtype: str) -> float:
    """Return how much of the largest logit the two sides may differ by where only one rounds a changed weight."""
    return ROUNDED_LATER.get(dtype, TOLERANCE)


def largest_logit_difference(
    found: Tensor,
    reference: Tensor,
    where: str,
    *,
    sides: tuple[str, str],
    tolerance: float = TOLERANCE,
) -> float:
    """Return the largest difference between the logits of two models.

    Args:
        sides: what gave ``found`` and ``reference``, for the message.
        tolerance: of the largest logit.
    Raises:
        CheckpointError: logits are not finite, or differ by more than rounding explains.
    """
    for side, logits in zip(sides, (found, reference), strict=True):
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(
                f"the logits of {side} are not finite", where=where, code="EVO-HF-006"
            )
    size = float(reference.abs().max())
    limit = size * tolerance
    distance = (found - reference).abs()
    difference = float(distance.max())
    if not difference <= limit:
        raise CheckpointError(
            f"logits differ by up to {difference:.3g} between {sides[0]} and {sides[1]} (largest logit {size:.3g})",
            where=where,
            expected=f"at most {limit:.2g}",
            fix="nothing was kept; please report this model's config",
            code="EVO-HF-006",
        )
    return difference
