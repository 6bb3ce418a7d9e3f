"""The package whose flash attention torch calls instead of the built-in one (``model.attention_kernel``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from evomesh.config.model import AttentionKernel, ModelConfig
from evomesh.errors import UserError
from evomesh.layers.dtype import parameter_dtype

_KEY = "model.attention_kernel"
_USE_AUTO = f'set {_KEY}="auto", with which torch takes its own kernel'


@dataclass(frozen=True)
class _FlashPackage:
    """Package with a flash attention, and what it needs.

    Attributes:
        module: that torch imports.
        generations: of GPUs that it runs on: the first number of their compute capability.
        gpus: names of such GPUs.
        widest_head: the largest head dim that it takes.
    """

    module: str
    generations: tuple[int, ...]
    gpus: str
    widest_head: int


_PACKAGES = {
    "FA3": _FlashPackage("flash_attn_interface", (9,), "H100, H200", 256),
    "FA4": _FlashPackage(
        "flash_attn.cute.interface", (9, 10), "H100, H200, B200, GB200", 128
    ),
}


@contextmanager
def attention_kernel(model: ModelConfig, device: torch.device) -> Iterator[None]:
    """Let torch's flash attention be that of the package ``model.attention_kernel`` in this context.

    "auto" changes nothing.

    Raises:
        UserError: this torch, GPU or environment does not have it, or it does not take the attention of ``model``.
    """
    name = model.attention_kernel
    if name == "auto":
        yield
        return
    from torch.nn.attention import restore_flash_attention_impl

    _check_device(name, device)
    _check_attention(name, model)
    _activate(name)
    try:
        yield
    finally:
        restore_flash_attention_impl()


def _check_device(name: AttentionKernel, device: torch.device) -> None:
    """Refuse a device on which torch would not call the package, or would fail in the first step."""
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


def _check_attention(name: AttentionKernel, model: ModelConfig) -> None:
    """Refuse a model whose attention no flash kernel computes: torch would never call the package."""
    widest = _PACKAGES[name].widest_head
    dtype = parameter_dtype(model.dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        raise _refusal(
            f"{name} computes in 16 bits, and model.dtype is {dtype}",
            expected='model.dtype "torch.bfloat16" or "torch.float16"',
        )
    if model.head_dim % 8 or model.head_dim > widest:
        raise _refusal(
            f"{name} does not take heads of {model.head_dim} columns",
            expected=f"a model.head_dim that is a multiple of 8, up to {widest}",
        )
    for key in ("attn_logit_softcapping", "attn_drop_rate"):
        if getattr(model, key):
            raise _refusal(
                f"{name} has no model.{key}, so that attention does not use it",
                expected=f"a model without {key}",
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
