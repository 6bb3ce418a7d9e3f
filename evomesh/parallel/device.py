"""The device that a process computes on: chosen by its local rank, or by the user."""

from __future__ import annotations

import torch

from evomesh.errors import UserError


def device_of_rank(local_rank: int) -> torch.device:
    """Make CUDA device ``local_rank`` modulo the visible devices the current one and return it; else the CPU.

    srun may show each task one device only, hence the modulo.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def device_by_name(name: str) -> str:
    """Return the device that ``--device`` names; for "", cuda if available, else cpu.

    Raises:
        UserError: the device cannot be used on this machine.
    """
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    # torch raises a different type for each way in which a device can be missing.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{chosen!r} cannot be used: {reason}",
            where="--device",
            expected="cpu or cuda",
            code="EVO-PARALLEL-007",
        ) from None
    return chosen
