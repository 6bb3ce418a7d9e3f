"""Whether two folders hold one model: logits of a fixed batch, by two programs, with the same rounded weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint import format as fmt
from evomesh.checkpoint import read
from evomesh.checkpoint.boxes import Box, Part
from evomesh.checkpoint.find import Found
from evomesh.checkpoint.format import CheckpointError, TensorRecord
from evomesh.config.schema import ModelConfig
from evomesh.layers.documents import whole
from evomesh.models.registry import build_model

TEXTS, LENGTH = 2, 32  # the fixed batch
TOLERANCE = 1e-4  # of the largest logit: both compute in float32, the weights being equal
NORM_HEAD = {"float16": 5e-3, "bfloat16": 4e-2}  # an exported head is rounded after its rows are normalised


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def fixed_batch(vocab_size: int) -> Tensor:
    """[TEXTS, LENGTH] token ids, always the same."""
    return torch.randint(vocab_size, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(20))


def read_tensor(found: Found, record: TensorRecord) -> Tensor:
    """One whole tensor of a checkpoint; every piece is checked against its hash."""
    tensor = torch.empty(record.shape, dtype=fmt.DTYPES[record.dtype])
    part = Part(tensor, Box((0,) * len(record.shape), record.shape))
    read.run(found, [read.Job(record, piece, (part,)) for piece in record.pieces])
    return tensor


def wide_dtype(dtype: str) -> str:
    """Compared in float32, or in float64 where that was exported."""
    return "float64" if dtype == "float64" else "float32"


@torch.inference_mode()
def native_logits(config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: str) -> Tensor:
    """[TEXTS, LENGTH, V] by our own model, its weights rounded to ``dtype``."""
    changes = {"dtype": wide_dtype(dtype), "use_fp32_norm": False, "compile": False, "residual_in_fp32": False}
    model = build_model(config.model_copy(update=changes))
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        parameters[name].copy_(tensor.to(getattr(torch, dtype)))
    model.eval()
    rows = fixed_batch(config.vocab_size)
    return torch.stack([model.logits(model(row, whole(LENGTH))) for row in rows])


@torch.inference_mode()
def transformers_logits(folder: Path, vocab_size: int, dtype: str) -> Tensor:
    """[TEXTS, LENGTH, V] by ``transformers``, which runs no code of the folder."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=getattr(torch, wide_dtype(dtype)),
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        raise CheckpointError(f"transformers reports {wrong}", where=str(folder))
    model.eval()
    logits: Tensor = model(fixed_batch(vocab_size)).logits
    return logits


def largest_difference(ours: Tensor, theirs: Tensor, config: ModelConfig, dtype: str, where: str) -> float:
    """
    Raises:
        CheckpointError: not finite, or more apart than rounding explains.
    """
    if not bool(torch.isfinite(ours).all()):
        raise CheckpointError("the native model's logits are not finite", where=where)
    difference, size = float((ours - theirs).abs().max()), float(ours.abs().max())
    limit = size * (NORM_HEAD.get(dtype, TOLERANCE) if config.norm_head else TOLERANCE)
    if not difference <= limit:
        raise CheckpointError(
            f"logits differ by up to {difference:.3g} from the native model's (largest logit {size:.3g})",
            where=where,
            expected=f"at most {limit:.2g}",
            fix="nothing was kept; please report this model's config",
        )
    return difference
