"""Attention of one new token per sequence to keys and values in pages: torch's kernel, and whether it can be used.

Shapes: B sequences, N query heads, G key/value heads, H head dim, S tokens of a page, W pages of the longest table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from evomesh.errors import UserError
from evomesh.generate.paged_cache import PAGE_SIZE
from evomesh.generate.step_graph import first_line
from evomesh.layers.attention import FLASH_HEAD_DIM, Attention
from evomesh.layers.scores import attend_to_visible

# Largest difference that 16-bit rounding explains, relative to the largest element.
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHECKED_LENGTHS = (1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE + 77)


@dataclass(frozen=True)
class PagedRows:
    """The places of the keys and values of each sequence.

    Attributes:
        lengths: [B] int32, tokens of each sequence, the new one included.
        tables: [B, W] int32, its pages.
        query_bounds: [B + 1] int32, 0 .. B: each sequence has one query.
        key_bounds: [B + 1] int32, as if all were of the longest length; torch's kernel asks for it, but goes by the
            lengths.
        longest: an upper bound of the lengths, a Python int so that no kernel waits for the device.
    """

    lengths: Tensor
    tables: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest: int


# (q [B, N, H], keys and values [pages, S, G, H], rows, window, scale) -> [B, N, H]
PagedKernel: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, PagedRows, int | None, float | None], Tensor
]


def attend_to_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Attend with torch's variable-length flash kernel and its block table."""
    from torch.nn.attention.varlen import varlen_attn

    # One query is the last token: it sees all keys, and needs no causal mask. For no
    # mask at all the kernel treats the query heads of a group together.
    window_size = (-1, -1) if window is None else (window - 1, 0)
    if scale is not None:
        # As in training: not every version of the kernel takes a scale.
        q = q * (scale * q.shape[2] ** 0.5)
    out = varlen_attn(
        q,
        keys,
        values,
        rows.query_bounds,
        None if _has_other_kernel() else rows.key_bounds,
        1,
        rows.longest,
        window_size=window_size,
        enable_gqa=q.shape[1] != keys.shape[2],
        seqused_k=rows.lengths,
        block_table=rows.tables,
    )
    assert isinstance(out, Tensor)  # a tuple only on demand
    return out


def _has_other_kernel() -> bool:
    """Return whether the user has activated FA3 or FA4, which take either pages or bounds of keys."""
    from torch.nn import attention

    current = getattr(attention, "current_flash_attention_impl", None)
    return current is not None and current() is not None


def reason_against_pages(model: nn.Module, device: torch.device) -> str:
    """Return why this model cannot be decoded with torch's paged kernel; "" if it can."""
    layers = attention_layers(model)
    if not layers:
        return "its attention is its own"
    weight = layers[0].wqkv.weight
    head_dim = layers[0].head_dim
    if device.type != "cuda":
        return f"it is on {device.type}"
    if weight.dtype not in ROUNDING:
        return f"its weights are {weight.dtype}, not 16-bit numbers"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than the kernel supports"
    if head_dim % 8 or head_dim > FLASH_HEAD_DIM:
        return f"its heads have {head_dim} columns"
    if any(layer.scores.softcap is not None for layer in layers):
        return "its attention scores are capped"
    if not _torch_has_pages():
        return f"torch {torch.__version__} has no block table"
    return ""


def attention_layers(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def _torch_has_pages() -> bool:
    """Return whether ``varlen_attn`` takes a block table: torch 2.12 added it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    known = inspect.signature(varlen_attn).parameters
    return {"block_table", "seqused_k", "window_size"} <= known.keys()


@torch.inference_mode()
def fault_of_kernel(
    kernel: PagedKernel,
    model: nn.Module,
    device: torch.device,
) -> str:
    """Compare the kernel with dense attention on random numbers of this model's shapes; return what is wrong, or ""."""
    rules: dict[tuple[int | None, float | None], Attention] = {}
    for layer in attention_layers(model):
        rules.setdefault((layer.window, layer.scores.scale), layer)
    for layer in rules.values():
        try:
            difference = _difference(kernel, layer, device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            _check_device(device, error)
            return f"it fails: {first_line(error)}"
        allowed = ROUNDING.get(layer.wqkv.weight.dtype, 1e-4)
        if not difference <= allowed:
            return f"it differs from dense attention by {difference:.2g} of the largest element"
    return ""


def _check_device(device: torch.device, cause: Exception) -> None:
    """Refuse to continue where the kernel has left the GPU in a state in which nothing works.

    Raises:
        UserError: it has.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise UserError(
            f"torch's kernel for paged keys and values has failed, and this process cannot use {device} any more: "
            f"{first_line(cause)}",
            where="paged",
            expected="off",
            fix="start again with --paged off (generation.paged: off)",
            code="EVO-GEN-005",
        ) from error


def _difference(kernel: PagedKernel, layer: Attention, device: torch.device) -> float:
    """Return the largest difference of the two on random numbers, relative to the largest element."""
    query_heads = layer.kv_heads * (layer.group_width // layer.head_dim - 2)
    count = len(CHECKED_LENGTHS)
    table_width = -(-max(CHECKED_LENGTHS) // PAGE_SIZE)
    pages = count * table_width
    random = torch.Generator(device)
    random.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(
            *shape,
            layer.head_dim,
            generator=random,
            device=device,
        )
        return numbers.to(layer.wqkv.weight.dtype)

    q = draw(count, query_heads)
    keys = draw(pages, PAGE_SIZE, layer.kv_heads)
    values = draw(pages, PAGE_SIZE, layer.kv_heads)
    shuffled = torch.randperm(
        pages,
        generator=random,
        device=device,
    )
    longest = table_width * PAGE_SIZE
    query_bounds = torch.arange(count + 1, device=device).int()
    rows = PagedRows(
        lengths=torch.tensor(CHECKED_LENGTHS, device=device).int(),
        tables=shuffled.view(count, table_width).int(),
        query_bounds=query_bounds,
        key_bounds=query_bounds * longest,
        longest=longest,
    )
    found = kernel(
        q,
        keys,
        values,
        rows,
        layer.window,
        layer.scores.scale,
    )
    expected = _dense(
        q,
        keys,
        values,
        rows,
        layer,
    )
    error = found.float() - expected
    largest_error = error.abs().max()
    largest = expected.abs().max()
    return float(largest_error / largest)


def _dense(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    layer: Attention,
) -> Tensor:
    """Attend in float32 to the keys and values of each sequence, gathered from their pages."""
    outs: list[Tensor] = []
    for row, length in enumerate(rows.lengths.tolist()):
        first = max(0, length - (layer.window or length))
        table = rows.tables[row].long()
        own_keys = _gathered(keys, table)[first:length]
        own_values = _gathered(values, table)[first:length]
        query = q[row].float()
        out = attend_to_visible(
            query[None, :, None],
            own_keys.transpose(0, 1)[None],
            own_values.transpose(0, 1)[None],
            visible=None,
            rule=layer.scores,
        )
        outs.append(out[0, :, 0])
    return torch.stack(outs)


def _gathered(pool: Tensor, table: Tensor) -> Tensor:
    """Return the tokens of a sequence in order, [W S, G, H] float32."""
    return pool[table].flatten(0, 1).float()
