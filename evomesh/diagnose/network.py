"""Network of the ranks: where they meet, addresses of hosts, latency and bandwidth of each axis of the layout."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from statistics import median

import torch

from evomesh.diagnose.results import CheckResult, RankPlace, listed
from evomesh.parallel.exchange import Exchange, gather_on_all_ranks
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.probes import MessageTime, time_messages
from evomesh.quantities import readable

MESSAGES = (8, 1 << 16, 1 << 22)  # bytes: latency, a small bucket, a large one
SLOW_GROUP = 4.0  # times as long as the median group of the axis
# Below this many seconds a group is not slow, whatever the others take.
NOISE_S = 0.01


def problem_of_address() -> str:
    """Return why other hosts could not connect to this one by its name, "" if nothing is in the way.

    gloo listens on the address of the host's name.
    """
    name = socket.gethostname()
    try:
        addresses = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return f"the name {name} has no address"
    family, kind, protocol, _, address = addresses[0]
    try:
        with socket.socket(family, kind, protocol) as listener:
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        return f"no port can be opened at {address[0]}, the address of {name}: {error.strerror}"
    return ""


def judge_ports(
    problems: Sequence[str], places: Sequence[RankPlace], met_at: str
) -> CheckResult:
    """Judge whether each rank can be reached.

    Args:
        problems: of each rank what ``problem_of_address`` returned.
        met_at: the address where the ranks met, "" for one process.
    """
    for problem, place in zip(problems, places, strict=True):
        if problem:
            return CheckResult(
                "ports",
                "warn",
                f"{place}: {problem}",
                "add the name to /etc/hosts, or name the interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
            )
    if not met_at:
        return CheckResult(
            "ports", "ok", "one process meets nobody; a port can be opened"
        )
    return CheckResult(
        "ports", "ok", f"all ranks met at {met_at}; each can open a port on its address"
    )


def groups_to_time(grid: Grid) -> Iterator[Axis]:
    """Yield the axes of more than one rank, each group of ranks once: several axes may share one."""
    seen = set()
    for axis in grid.axes.values():
        # ``ends`` has a group on the ranks of two stages only, the others none.
        if axis.size > 1 and axis.name != "ends" and id(axis.group) not in seen:
            seen.add(id(axis.group))
            yield axis


def time_groups(
    grid: Grid,
    device: torch.device,
    exchange: Exchange,
    places: Sequence[RankPlace],
) -> list[CheckResult]:
    """Time messages on each axis and judge them; every rank calls it."""
    results = []
    for axis in groups_to_time(grid):
        times = time_messages(axis, device, MESSAGES)
        seconds = [time.seconds for time in times]
        answers = gather_on_all_ranks(exchange, seconds)
        result = judge_axis(axis.name, axis.size, answers, places)
        results.append(result)
    return results


def judge_axis(
    name: str, size: int, answers: Sequence[list[float]], places: Sequence[RankPlace]
) -> CheckResult:
    """Judge the times of one axis, and name the ranks of a slow group.

    Args:
        size: ranks of a group.
        answers: of each rank the seconds of each of ``MESSAGES``.
    """
    parts = []
    slow: list[RankPlace] = []
    for index, nbytes in enumerate(MESSAGES):
        of_ranks = [seconds[index] for seconds in answers]
        slowest = MessageTime(nbytes, max(of_ranks), size)
        parts.append(_describe(slowest))
        # Short messages take microseconds, which differ by chance: below some time no
        # group is slow.
        limit = max(SLOW_GROUP * median(of_ranks), NOISE_S)
        for seconds, place in zip(of_ranks, places, strict=True):
            if seconds > limit and place not in slow:
                slow.append(place)
    found = f"groups of {size}, the slowest: {'; '.join(parts)}"
    if slow:
        return CheckResult(
            f"axis {name}",
            "warn",
            f"{found}; far slower than the other groups: {listed(slow)}",
            "check links and switch ports of these hosts: ethtool, ibstat, NCCL_DEBUG=INFO",
        )
    return CheckResult(f"axis {name}", "ok", found)


def _describe(time: MessageTime) -> str:
    microseconds = 1e6 * time.seconds
    if time.nbytes == MESSAGES[0]:
        return f"latency {microseconds:.0f} us"
    return f"{readable(time.nbytes)} at {readable(time.bandwidth)}/s"
