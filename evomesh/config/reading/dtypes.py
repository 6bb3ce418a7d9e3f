"""Spellings of a dtype in a config file."""

from __future__ import annotations

from typing import Any

DTYPES = {
    "torch.float16": "float16",
    "torch.half": "float16",
    "torch.bfloat16": "bfloat16",
    "torch.float32": "float32",
    "torch.float": "float32",
    "torch.tf32": "tf32",
    "torch.float64": "float64",
    "torch.double": "float64",
}


def dtype_name(dtype: Any) -> Any:
    """Return "float16" for "torch.half", torch.half and the like; a value of another kind as it is."""
    # A file may import torch, but this package must not: the class is known by its name.
    name = str(dtype) if type(dtype).__name__ == "dtype" else dtype
    return DTYPES.get(name, name) if isinstance(name, str) else name
