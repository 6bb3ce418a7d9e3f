"""Judgments about the machines of all ranks: versions, devices, limits and clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from evomesh.diagnose.facts import MachineFacts
from evomesh.diagnose.results import CheckResult, Status, by_value, listed
from evomesh.parallel.exchange import Exchange
from evomesh.parallel.process_group import ranks_on_one_gpu
from evomesh.quantities import counted, readable

MAX_SKEW_S = 1.0
ROUNDS = 5  # of messages, to measure clocks
# Of a rank: threads of OpenMP, of its data readers and of saves; files of data and logs.
PROCESSES_OF_RANK = 256
FILES_OF_RANK = 256
FILES_PER_PEER = 2  # of the store that rank 0 serves
MIN_SHARED_MEMORY = 64 << 20  # bytes for each rank of a host, with NCCL
MIB = 1 << 20
SLOW_PRODUCT = 2.0  # times as long as the median rank
PRODUCT_NOISE_S = 2e-3  # a smaller difference means nothing


def judge_versions(ranks: Sequence[MachineFacts]) -> CheckResult:
    """Refuse ranks with different programs."""
    names = ranks[0].versions
    places = [rank.place for rank in ranks]
    for name in names:
        values = [rank.versions.get(name, "none") for rank in ranks]
        if len(set(values)) > 1:
            return CheckResult(
                "versions",
                "fail",
                f"{name} differs: {by_value(values, places)}",
                "install the same on every node, or start all ranks in one container image",
            )
    known = [f"{name} {version}" for name, version in names.items()]
    return CheckResult("versions", "ok", f"{', '.join(known)} on {_count(ranks)}")


def judge_devices(ranks: Sequence[MachineFacts], backend: str) -> CheckResult:
    """Judge the devices of all ranks, and the backend that they lead to."""
    places = [rank.place for rank in ranks]
    kinds = [_kind(rank) for rank in ranks]
    sharers = ranks_on_one_gpu([rank.gpu for rank in ranks])
    if len(set(kinds)) > 1:
        return CheckResult(
            "devices",
            "fail",
            f"devices differ: {by_value(kinds, places)}",
            "give every rank a device of one kind: --gpus-per-task=1, and nvidia-smi on the nodes without one",
        )
    if sharers:
        where = listed([places[rank] for rank in sharers])
        return CheckResult(
            "devices",
            "warn",
            f"{where} share one GPU; backend {backend}, slowly, because NCCL refuses this",
            "start one rank for each GPU",
        )
    found = f"{kinds[0]} on {_count(ranks)}; backend {backend}"
    crowd = _crowded_host(ranks)
    if crowd and not ranks[0].on_gpu:
        return CheckResult(
            "devices", "warn", f"{found}; {crowd}", "start fewer ranks on a host"
        )
    return CheckResult("devices", "ok", found)


def judge_products(
    ranks: Sequence[MachineFacts], seconds: Sequence[float]
) -> CheckResult:
    """Name the ranks whose device is slow: hot, throttled, or shared with another job.

    Args:
        seconds: of each rank for the same matrix product, all ranks at once.
    """
    usual = median(seconds)
    limit = max(SLOW_PRODUCT * usual, usual + PRODUCT_NOISE_S)
    slow = []
    for rank, own_seconds in zip(ranks, seconds, strict=True):
        if own_seconds > limit:
            slow.append(rank.place)
    found = f"a matrix product takes {1e3 * usual:.2f} ms, at most {1e3 * max(seconds):.2f} ms"
    if slow:
        return CheckResult(
            "product",
            "warn",
            f"{found}: far slower than the others is {listed(slow)}",
            "look for another job on that device, its temperature and clocks: nvidia-smi -q -d PERFORMANCE, top",
        )
    return CheckResult("product", "ok", found)


def _kind(rank: MachineFacts) -> str:
    """Return the name of a device without its number."""
    _, _, model = rank.device.partition(" ")
    return model or rank.device


def _crowded_host(ranks: Sequence[MachineFacts]) -> str:
    """Return which host has more ranks than cores, "" if none has."""
    for host, members in _by_host(ranks).items():
        cores = members[0].cores
        if len(members) > cores:
            return f"{len(members)} ranks share {counted(cores, 'core')} of {host}"
    return ""


def _by_host(ranks: Sequence[MachineFacts]) -> dict[str, list[MachineFacts]]:
    hosts: dict[str, list[MachineFacts]] = {}
    for rank in ranks:
        hosts.setdefault(rank.host, []).append(rank)
    return hosts


def _count(ranks: Sequence[MachineFacts]) -> str:
    hosts = len(_by_host(ranks))
    if len(ranks) == 1:
        return "one process"
    return f"all {len(ranks)} ranks on {counted(hosts, 'host')}"


def judge_limits(ranks: Sequence[MachineFacts]) -> list[CheckResult]:
    """Judge the limits of all ranks, each with its own line."""
    # Limits of a process are compared with the needs of one rank, limits of a user or a
    # machine with those of the most crowded host.
    crowds = {host: len(members) for host, members in _by_host(ranks).items()}
    most = max(crowds.values())
    files = FILES_OF_RANK + FILES_PER_PEER * len(ranks)
    has_gpus = ranks[0].on_gpu
    return [
        _judge_limit(
            "open files",
            ranks,
            [rank.limits.open_files for rank in ranks],
            needed=files,
            fix=f"ulimit -Hn {files} or more, or LimitNOFILE in the unit that starts the job",
        ),
        _judge_limit(
            "processes",
            ranks,
            [rank.limits.processes for rank in ranks],
            needed=PROCESSES_OF_RANK * most,
            fix="raise ulimit -u: threads count too",
        ),
        _judge_limit(
            "locked memory",
            ranks,
            [rank.limits.locked_memory for rank in ranks],
            needed=64 * MIB if has_gpus else 0,
            fix="ulimit -l unlimited: InfiniBand and pinned memory need it (memlock in limits.conf)",
            unit=readable,
            status="warn",
        ),
        _judge_limit(
            "/dev/shm",
            ranks,
            [rank.limits.shared_memory for rank in ranks],
            needed=MIN_SHARED_MEMORY * most if has_gpus else MIB,
            fix="docker run --shm-size=8g, or a memory volume at /dev/shm",
            unit=readable,
            status="fail" if has_gpus else "warn",
        ),
    ]


def _judge_limit(
    name: str,
    ranks: Sequence[MachineFacts],
    values: Sequence[int | None],
    *,
    needed: int,
    fix: str,
    unit: Callable[[float], str] = lambda value: f"{value:g}",
    status: Status = "fail",
) -> CheckResult:
    """Return the result on one limit of all ranks; None is no limit."""
    low = []
    for rank, value in zip(ranks, values, strict=True):
        if value is not None and value < needed:
            low.append(rank.place)
    finite = [value for value in values if value is not None]
    if low:
        least = min(finite)
        found = f"at most {unit(least)}, and {unit(needed)} are needed: {listed(low)}"
        return CheckResult(name, status, found, fix)
    if not finite:
        return CheckResult(name, "ok", "no limit")
    return CheckResult(name, "ok", f"at most {unit(min(finite))}")


def clock_offsets(
    exchange: Exchange, clock: Callable[[], float] = time.time
) -> list[float]:
    """Return by how many seconds each rank's clock is certainly ahead of rank 0's (negative: behind).

    A rank reads its clock after a message of rank 0 and before its answer arrives there.
    What is outside that time on rank 0's clock is skew; inside it there is no knowing.
    """
    proven: list[float] = [0.0] * exchange.size
    for _ in range(ROUNDS):
        sent = clock()
        exchange.broadcast(None)
        readings = exchange.gather(clock())
        if readings is None:
            continue
        arrived = clock()
        for rank, reading in enumerate(readings):
            nearest = min(max(reading, sent), arrived)
            offset = reading - nearest
            if abs(offset) > abs(proven[rank]):
                proven[rank] = offset
    offsets: list[float] = exchange.broadcast(proven)
    return offsets


def judge_clocks(
    ranks: Sequence[MachineFacts], offsets: Sequence[float]
) -> CheckResult:
    """Refuse clocks that are more than a second apart."""
    wrong = []
    for rank, offset in zip(ranks, offsets, strict=True):
        if abs(offset) > MAX_SKEW_S:
            way = "ahead of" if offset > 0 else "behind"
            wrong.append(f"{rank.place} is {abs(offset):.1f} s {way} {ranks[0].place}")
    if wrong:
        return CheckResult(
            "clocks",
            "fail",
            "; ".join(wrong[:4]),
            "start chronyd or ntpd on every node; stores refuse signatures, and lines of logs are in the wrong order",
        )
    largest = max(map(abs, offsets))
    return CheckResult(
        "clocks", "ok", f"at most {largest:.3f} s apart, as far as is known"
    )
