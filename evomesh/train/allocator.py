"""Settings of the allocators of host and device that keep freed memory usable for the next step.

glibc gives every freed block above its mmap threshold (at most 32 MiB by default) back
to the kernel at once. A training step on the CPU frees and takes the same large blocks
again and again, and each time the kernel hands out zeroed pages one fault at a time:
about a tenth of the step of a 60M model.
"""

from __future__ import annotations

import ctypes
import os

# torch's variable for its device allocators, and its older names.
_DEVICE_SETTINGS = "PYTORCH_ALLOC_CONF"
_OLDER_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Bytes; the heap can fragment, and the logits of a chunk take 64 MiB.
_LARGEST_HEAP_BLOCK = 256 << 20
# mallopt(3)
_ENVIRONMENT_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let the allocator reuse large blocks instead of returning them to the kernel.

    The process keeps its peak memory from then on; the peak itself grew by 5 % for a
    60M model.

    Returns:
        False where the C library is not glibc or the user has set the thresholds in the environment.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    user_has_chosen = "glibc.malloc" in tunables or any(
        name in os.environ for name in _ENVIRONMENT_VARIABLES
    )
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    )
    if user_has_chosen or mallopt is None:
        return False
    # C int.
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    )


def use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments instead of adding more, where the user has set nothing.

    Blocks of different sizes, such as packs of different lengths need, then leave no
    holes that fit nobody. Call it before the first use of CUDA, which reads the variable.
    """
    names = (_DEVICE_SETTINGS, *_OLDER_NAMES)
    if not any(name in os.environ for name in names):
        os.environ[_DEVICE_SETTINGS] = "expandable_segments:True"
