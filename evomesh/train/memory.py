"""Memory of a run on the CPU, before anything is allocated."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping

import torch

from evomesh.config.layout import run_sizes
from evomesh.config.schema import Config
from evomesh.config.size import parameter_count
from evomesh.errors import UserError
from evomesh.monitor.status import host_memory
from evomesh.outside_errors import read_meminfo
from evomesh.quantities import readable

HALF = ("float16", "bfloat16")
# Tensors of a weight's shape that an update rule remembers, at least: Muon's AdamW has two.
LEAST_STATE = {"adamw": 2, "muon": 1, "lion": 1, "schedule_free": 2}


def bytes_per_rank(config: Config, world_size: int) -> float | None:
    """Return what weights, gradients and the optimizer's state need at least, in bytes; None for a custom model.

    Activations, buckets and the data come on top, and the largest stage has more than
    its share.
    """
    parameters = parameter_count(config.model)
    if parameters is None:
        return None
    # 1. Bytes of each parameter. 16-bit weights have gradients, masters and what the rule
    #    remembers in float32; others are their own masters.
    is_double = config.model.dtype == "float64"
    gradient = 8 if is_double else 4
    weight = gradient
    remembered = LEAST_STATE[config.optimizer.type]
    if config.optimizer.ema.decay is not None:
        remembered += 1
    state = remembered * gradient
    if config.model.dtype in HALF:
        weight = 2
        state += gradient

    # 2. Over how many ranks they are sharded: by the model's layout, the state by ZeRO
    #    too, with FSDP weights and gradients as well.
    sizes = run_sizes(config, world_size)
    within_layer = sizes.wp if sizes.isp else sizes.tp
    shards = sizes.pp * within_layer
    shards_of_state = shards * sizes.zero
    shards_of_weights = shards
    if config.parallel.zero1.fsdp:
        shards_of_weights = shards_of_state
    held = (weight + gradient) / shards_of_weights
    held += state / shards_of_state
    return parameters * held


def available_bytes() -> int | None:
    """Return how much memory this process may still take; None where the system does not report it."""
    try:
        rows = read_meminfo()
        available = rows["MemAvailable"] + rows["SwapFree"]
    except (OSError, ValueError, KeyError):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return available if limit == resource.RLIM_INFINITY else min(available, limit)


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process uses at most on its device, and the bytes there are.

    On a CPU it is what the process uses now.
    """
    if device.type != "cuda":
        return host_memory()
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_allocated(device), total


def refuse_too_large(
    config: Config,
    world_size: int,
    environment: Mapping[str, str] = os.environ,
    available: Callable[[], int | None] = available_bytes,
) -> None:
    """Refuse a model that cannot fit into the memory of this machine, before it is built.

    Raises:
        UserError: the ranks on this machine need more than is free.
    """
    needed = bytes_per_rank(config, world_size)
    free = available()
    if needed is None or free is None:
        return
    stated = environment.get("LOCAL_WORLD_SIZE", "1")  # by torchrun
    ranks = int(stated) if stated.isdigit() else 1
    needed *= max(ranks, 1)
    if needed <= free:
        return
    parameters = parameter_count(config.model)
    raise UserError(
        f"the model does not fit: weights, gradients and the optimizer's state of its {parameters:,} parameters need "
        f"at least {readable(needed)} on this machine, and {readable(free)} are free",
        where="model",
        expected="a model that fits into memory",
        fix="train a smaller one here (evomesh config copy demo .), or shard it over GPUs or more machines: "
        "evomesh plan CONFIG shows what each needs",
        code="EVO-MODEL-004",
    )


def float16_warning(config: Config, ratio: Callable[[], float]) -> str | None:
    """Return the warning about float16 on a CPU, None where it is as fast as float32.

    Args:
        ratio: how many times as long as in float32 a product takes; measured if needed.
    """
    if config.model.dtype != "float16":
        return None
    times = ratio()
    if times <= 1:
        return None
    return (
        f"model.dtype: float16 is slow on a CPU: here a matrix product takes {times:.1f} times as long as in "
        'float32; set model.dtype="torch.float32"'
    )


def product_ratio(size: int = 256, repeats: int = 3) -> float:
    """Return the time of a float16 matrix product as a multiple of the same in float32, the best of a few."""
    half = _product_seconds(torch.float16, size, repeats)
    single = _product_seconds(torch.float32, size, repeats)
    return half / single


def _product_seconds(dtype: torch.dtype, size: int, repeats: int) -> float:
    """Return the shortest time of a matrix product."""
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds = time.perf_counter() - started
        times.append(seconds)
    return min(times)
