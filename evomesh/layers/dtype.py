"""The two dtype rules of the numerics contract: storage of parameters, and accumulation (docs/adr/0001)."""

from __future__ import annotations

import torch

from evomesh.config.schema import DType

_STORED = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def parameter_dtype(name: DType) -> torch.dtype:
    """Return the torch dtype of ``model.dtype``; "tf32" is float32 whose CUDA products use TF32."""
    return _STORED[name]


def promote(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for anything narrower; float64 stays float64, so that it can prove equality."""
    return torch.promote_types(dtype, torch.float32)
