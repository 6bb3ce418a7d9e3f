"""Measurement of this machine: what ``evomesh plan --measure`` writes into a device file.

As many processes as there are cores time operators at the same time, because what they
share (memory, caches) is shared in a run too. Then two and four of them send each other
messages: with four, also in two pairs at the same time.

    small models -> operators one by one -> medians by work -> rates of each operator
    messages     -> medians by bytes                        -> rates of each kind of message
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomesh.config.schema import Config, ParallelConfig
from evomesh.parallel.build import build_grid
from evomesh.parallel.local_world import run_in_world
from evomesh.parallel.message_times import OPERATIONS, MessageTimes
from evomesh.plan.device import Device, Efficiencies, Links, Rates
from evomesh.plan.measured_rates import (
    ANY,
    GIGA,
    MICRO,
    Host,
    MessageRate,
    OperatorRate,
)
from evomesh.plan.operator_times import (
    RepeatedStep,
    TimedKernel,
    time_launches,
    time_operators,
)
from evomesh.plan.timeline import KernelKind
from evomesh.train.allocator import keep_freed_memory

# Ranks of a world that sends messages.
WORLDS = (2, 4)
MESSAGE_BYTES = (64, 4096, 2**16, 2**18, 2**20, 2**22, 2**24, 2**25)
DTYPES = ("float32", "bfloat16")
# Seconds for one small model, and for one size of message.
_MODEL_S = 0.7
_MESSAGE_S = 0.08
_STEPS_OF_TINY = 12


@dataclass(frozen=True)
class SmallModel:
    """Sizes of a model whose operators are timed."""

    hidden: int
    heads: int
    seq_len: int
    micro_bsz: int
    vocab: int
    layers: int = 2

    def config(self, dtype: str, parallel: dict[str, Any] | None = None) -> Config:
        model = {
            "model_type": "LLAMA2",
            "dtype": dtype,
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_kv_attention_heads": self.heads // 2,
            "mlp_ratio": 2.7,
            "multiple_of": 32,
            "vocab_size": self.vocab,
            "no_bias": True,
        }
        data = {
            "seq_len": self.seq_len,
            "micro_bsz": self.micro_bsz,
            "micro_num": 2,
        }
        sections = {"model": model, "data": data, "parallel": parallel or {}}
        return Config.model_validate(sections)


TINY = SmallModel(32, 2, 32, 1, 64, layers=4)
MODELS = (
    SmallModel(64, 4, 64, 1, 256),
    SmallModel(128, 4, 128, 2, 1024),
    SmallModel(256, 4, 256, 1, 4096),
    SmallModel(256, 8, 512, 2, 1024),
    SmallModel(128, 2, 1024, 1, 512),
    SmallModel(512, 8, 128, 2, 2048),
    SmallModel(512, 8, 512, 1, 4096),
    SmallModel(256, 4, 2048, 1, 512),
    SmallModel(1024, 16, 128, 1, 1024, layers=1),
)
# Operators of sharded weights and of tensor ranks.
_OF_RANKS = SmallModel(256, 8, 256, 1, 1024)
SHARDED: tuple[tuple[SmallModel, dict[str, Any]], ...] = (
    (_OF_RANKS, {"zero1": {"size": -1, "fsdp": True}}),
    (_OF_RANKS, {"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 2}}),
    (_OF_RANKS, {"tensor": {"size": 2, "mode": "mtp"}}),
)


@dataclass(frozen=True)
class RankTimes:
    """Times of one rank."""

    launch: float
    kernels: list[TimedKernel]


def time_kernels(rank: int, device: torch.device, world_size: int) -> RankTimes:
    """Time the operators of small models, on all ranks at the same time."""
    keep_freed_memory()
    config = TINY.config("float32")
    tiny = RepeatedStep(config, 0, 1, device)
    share = time_launches(tiny, device, _STEPS_OF_TINY)
    kernels = []
    for dtype in DTYPES:
        kernels += _kernels_alone(dtype, device)
        if world_size == WORLDS[0]:
            kernels += _kernels_sharded(dtype, rank, device)
    medians = _medians(kernels)
    return RankTimes(share.launch, medians)


def _kernels_alone(dtype: str, device: torch.device) -> list[TimedKernel]:
    kernels = []
    for model in MODELS:
        config = model.config(dtype)
        step = RepeatedStep(config, 0, 1, device)
        kernels += time_operators(step, device, _MODEL_S)
    return kernels


def _kernels_sharded(dtype: str, rank: int, device: torch.device) -> list[TimedKernel]:
    kernels = []
    for model, parallel in SHARDED:
        config = model.config(dtype, parallel)
        step = RepeatedStep(
            config,
            rank,
            WORLDS[0],
            device,
        )
        # All ranks take as many steps.
        kernels += time_operators(
            step,
            device,
            math.inf,
            most=3,
        )
    return kernels


def _medians(kernels: Iterable[TimedKernel]) -> list[TimedKernel]:
    """Return one kernel for all with about the same work."""
    groups: dict[object, list[TimedKernel]] = defaultdict(list)
    for one in kernels:
        kernel = one.kernel
        if kernel.work == 0:
            continue
        key = (
            kernel.operator,
            kernel.dtype,
            _size_class(kernel.size),
            _octave(one, parts=2),
        )
        groups[key].append(one)
    found = []
    for group in groups.values():
        in_order = sorted(group, key=_work_of)
        middle = in_order[len(in_order) // 2]
        seconds = _median_seconds(group)
        found.append(TimedKernel(middle.kernel, seconds))
    return found


def _work_of(one: TimedKernel) -> int:
    return one.kernel.work


def _octave(one: TimedKernel, parts: int) -> int:
    """Return the nearest power of two of its work, or of a root of two."""
    exponent = math.log2(one.kernel.work)
    return round(parts * exponent)


def _median_seconds(group: Sequence[TimedKernel]) -> float:
    seconds = [one.seconds for one in group]
    return statistics.median(seconds)


def _size_class(size: int) -> int:
    """Return the nearest power of two; 0 for 0."""
    return 2 ** round(math.log2(size)) if size > 0 else 0


MessageKey = tuple[str, int, int]  # operation, bytes, ranks of a group


def time_messages(
    rank: int, device: torch.device, world_size: int
) -> dict[MessageKey, float]:
    """Time each kind of message in groups of all ranks, and of two."""
    keep_freed_memory()
    times = {}
    for ranks in WORLDS:
        if ranks > world_size:
            continue
        sizes = ParallelConfig.model_validate({"tensor": {"size": ranks}})
        axis = build_grid(sizes, world_size, rank).tp
        timed = MessageTimes(axis, device)
        for operation in OPERATIONS:
            for nbytes in MESSAGE_BYTES:
                seconds = timed.seconds(operation, nbytes, _MESSAGE_S)
                times[operation, nbytes, ranks] = seconds
    return times


def measure_device(name: str, say: Callable[[str], None]) -> Device:
    """Measure this machine.

    Args:
        say: called with what is being measured.

    Raises:
        UserError: a process has failed.
    """
    kind = "cpu"
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        kind = "cuda"
        cores = torch.cuda.device_count()
    workers = min(WORLDS[0], cores)
    say(f"operators, in {workers} processes at the same time")
    by_rank = run_in_world(
        time_kernels,
        workers,
        kind,
        workers,
    )
    kernels = []
    for times in by_rank:
        kernels += times.kernels
    messages: list[MessageRate] = []
    for ranks in WORLDS:
        if kind == "cuda" and ranks > cores:
            continue
        say(f"messages between {ranks} processes")
        answers = run_in_world(
            time_messages,
            ranks,
            kind,
            ranks,
        )
        messages += message_rates(answers, ranks)
    host = None
    if kind == "cpu":
        host = _host_of(by_rank, cores)
    operators = operator_rates(kernels)
    return device_of(name, kind, operators, messages, host)


def _host_of(by_rank: Sequence[RankTimes], cores: int) -> Host:
    launches = [times.launch for times in by_rank]
    launch = statistics.mean(launches) / MICRO
    return Host(cores=cores, launch=_rounded(launch))


def operator_rates(kernels: Sequence[TimedKernel]) -> list[OperatorRate]:
    """Return the curve of each operator, and one of each kind of kernel for operators that were not timed."""
    curves: dict[tuple[str, str, int], list[TimedKernel]] = defaultdict(list)
    for one in kernels:
        kernel = one.kernel
        dtype = kernel.dtype or "float32"
        size = _size_class(kernel.size)
        of_kind = f"{kernel.kind.value} {ANY}"
        for name in (kernel.operator, of_kind):
            key = (name, dtype, size)
            curves[key].append(one)
    found = []
    for (name, dtype, size), timed in sorted(curves.items()):
        points = _points(timed)
        curve = OperatorRate(
            name=name,
            dtype=dtype,
            size=size,
            work=tuple(points),
            rate=_rates(points),
        )
        found.append(curve)
    return found


def _rates(seconds: Mapping[float, float]) -> tuple[float, ...]:
    """Return the rates of times by work."""
    rates = []
    for work, time in seconds.items():
        rate = work / time / GIGA
        rates.append(_rounded(rate))
    return tuple(rates)


def _points(timed: Sequence[TimedKernel]) -> dict[float, float]:
    """Return the median seconds by work, one for each octave, ascending."""
    groups: dict[int, list[TimedKernel]] = defaultdict(list)
    for one in timed:
        octave = _octave(one, parts=1)
        groups[octave].append(one)
    points = {}
    for octave in sorted(groups):
        group = groups[octave]
        amounts = map(_work_of, group)
        work = statistics.median_low(amounts)
        seconds = _median_seconds(group)
        points[float(work)] = seconds
    return points


def message_rates(
    answers: Sequence[dict[MessageKey, float]], processes: int
) -> list[MessageRate]:
    """Return the rates of each kind of message, from the mean of what the ranks have timed."""
    curves: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for operation, nbytes, ranks in answers[0]:
        key = (operation, nbytes, ranks)
        seconds = statistics.mean(answer[key] for answer in answers)
        curves[operation, ranks][nbytes] = seconds
    found = []
    for (operation, ranks), times in curves.items():
        shortest = times[min(times)]
        rate = MessageRate(
            operation=operation,
            ranks=ranks,
            processes=processes,
            latency=_rounded(shortest / MICRO),
            work=tuple(times),
            rate=_rates(times),
        )
        found.append(rate)
    return found


def device_of(
    name: str,
    kind: str,
    operators: Sequence[OperatorRate],
    messages: Sequence[MessageRate],
    host: Host | None,
) -> Device:
    """Return the device with these rates; what is not measured follows the best of them."""
    products = KernelKind.MATRIX.value
    wide = best_rate(operators, products, "float32") / 1e3
    half = best_rate(operators, products, "bfloat16") / 1e3
    memory = best_rate(operators, KernelKind.MEMORY.value, "float32")
    sends = [rate for rate in messages if rate.operation == "send"]
    link = max((max(rate.rate) for rate in sends), default=memory)
    latency = min((rate.latency for rate in sends), default=0.0)
    return Device(
        name=name,
        kind="cpu" if kind == "cpu" else "cuda",
        memory_gib=_memory_gib(kind),
        gpus_per_node=max(WORLDS) if kind == "cpu" else torch.cuda.device_count(),
        rates=Rates(
            bfloat16=_rounded(half),
            float16=_rounded(half),
            float32=_rounded(wide),
            memory=_rounded(memory),
        ),
        links=Links(
            node=link,
            network=link,
            node_latency=latency,
            network_latency=latency,
        ),
        efficiencies=Efficiencies(matrix=1, attention=1, memory=1, link=1),
        host=host,
        operators=tuple(operators),
        messages=tuple(messages),
    )


def best_rate(operators: Sequence[OperatorRate], kind: str, dtype: str) -> float:
    """Return the highest rate of a kind of kernels, in 10^9 a second."""
    name = f"{kind} {ANY}"
    found = [
        max(curve.rate)
        for curve in operators
        if curve.name == name and curve.dtype == dtype
    ]
    return max(found, default=1.0)


def _memory_gib(kind: str) -> float:
    if kind == "cuda":
        nbytes = torch.cuda.get_device_properties(0).total_memory
    else:
        nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return round(nbytes / 2**30, 1)


def machine_name() -> str:
    """Return what a device file calls this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} with {os.cpu_count()} cores"


def _rounded(value: float) -> float:
    """Return a number to four digits."""
    return float(f"{value:.4g}")
