"""``--device``."""

from __future__ import annotations

from evomesh.errors import UserError


def choose_device(device: str) -> str:
    """The device a user named, else cuda where there is one.

    Raises:
        UserError: it cannot be used here.
    """
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch has one for each way to lack a device
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{chosen!r} cannot be used: {reason}", where="--device", expected="cpu or cuda"
        ) from None
    return chosen
