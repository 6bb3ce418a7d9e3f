"""The package whose flash attention torch calls instead of the built-in one (``model.attention_kernel``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from evomesh.config.model import AttentionKernel
from evomesh.errors import UserError

_KEY = "model.attention_kernel"
_USE_AUTO = f'set {_KEY}="auto", with which torch takes its own kernel'


@dataclass(frozen=True)
class _FlashPackage:
    """Package with a flash attention, and what it needs.

    Attributes:
        module: that torch imports.
        generations: of GPUs that it runs on: the first number of their compute capability.
        gpus: names of such GPUs.
    """

    module: str
    generations: tuple[int, ...]
    gpus: str


_PACKAGES = {
    "FA3": _FlashPackage("flash_attn_interface", (9,), "H100, H200"),
    "FA4": _FlashPackage(
        "flash_attn.cute.interface", (9, 10), "H100, H200, B200, GB200"
    ),
}


@contextmanager
def attention_kernel(
    name: AttentionKernel, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Let torch's flash attention be that of the package ``name`` in this context; "auto" changes nothing.

    Args:
        dtype: of queries, keys and values.

    Raises:
        UserError: this torch, GPU or environment does not have it, or it does not take ``dtype``.
    """
    if name == "auto":
        yield
        return
    from torch.nn.attention import restore_flash_attention_impl

    _check_device(name, dtype, device)
    _activate(name)
    try:
        yield
    finally:
        restore_flash_attention_impl()


def _check_device(
    name: AttentionKernel, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a device or a dtype on which torch would not call the package, or would fail in the first step."""
    package = _PACKAGES[name]
    if device.type != "cuda":
        raise _refusal(
            f"{name} runs on NVIDIA GPUs, and this process computes on {device.type}",
            expected=f"a GPU ({package.gpus})",
        )
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in package.generations:
        found = torch.cuda.get_device_name(device)
        needed = " or ".join(f"{number}.x" for number in package.generations)
        raise _refusal(
            f"{name} does not run on {found} (compute capability {capability[0]}.{capability[1]})",
            expected=f"compute capability {needed} ({package.gpus})",
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise _refusal(
            f"{name} computes in 16 bits, and model.dtype is {dtype}",
            expected='model.dtype "torch.bfloat16" or "torch.float16"',
        )


def _activate(name: AttentionKernel) -> None:
    from torch.nn import attention

    known = attention.list_flash_attention_impls()
    if name not in known:
        raise _refusal(
            f"torch {torch.__version__} has no {name}",
            expected=f"one of {', '.join(known) or 'none'}, which this torch has",
            fix="install a newer torch",
        )
    module = _PACKAGES[name].module
    try:
        importlib.import_module(module)
        attention.activate_flash_attention_impl(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise _refusal(
            f"{name} needs the Python module {module}, which cannot be used: {error}",
            expected=f"a flash attention that has {module}, built for torch {torch.__version__}",
            fix="install it (https://github.com/Dao-AILab/flash-attention)",
        ) from error


def _refusal(message: str, *, expected: str, fix: str = "") -> UserError:
    fixes = [fix, _USE_AUTO] if fix else [_USE_AUTO]
    return UserError(
        message,
        where=_KEY,
        expected=expected,
        fix=", or ".join(fixes),
        code="EVO-MODEL-008",
    )
