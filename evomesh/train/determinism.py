"""The deterministic mode of the numerics contract (docs/adr/0001-numerics-contract.md)."""

from __future__ import annotations

import os

import torch

from evomesh.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# Sizes with which cuBLAS repeats its sums, by NVIDIA's documentation.
_REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


def enable_determinism() -> None:
    """Make torch use kernels that repeat to the bit, or raise an error where an operation has none.

    Call it before the first use of CUDA, since cuBLAS reads its variable only once.

    Raises:
        UserError: the environment asks cuBLAS for a workspace with which its sums do not repeat.
    """
    workspace = os.environ.setdefault(_WORKSPACE, _REPEATABLE_WORKSPACES[0])
    if workspace not in _REPEATABLE_WORKSPACES:
        raise UserError(
            f"{_WORKSPACE}={workspace} does not let cuBLAS repeat its sums",
            where="deterministic",
            expected=" or ".join(_REPEATABLE_WORKSPACES),
            fix=f"unset {_WORKSPACE}, or set deterministic=False",
            code="EVO-TRAIN-009",
        )
    # Compiled blocks: choose the shape of a reduction by rule, not by which was fastest
    # in this run.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written; filling it would cost a pass
    # over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
