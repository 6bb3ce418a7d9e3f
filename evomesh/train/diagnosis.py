"""Find the ranks that slow a run down, by their steps and by small timed probes, without changing a bit of training.

A step shows that a rank is slow, but in a tensor or pipeline group all ranks wait for the
slowest, so all look alike. Probes tell them apart:

    product      the same matrix product on each device: a hot or throttled device
    all-reduce   on each axis, after all have arrived: a slow network. One rank is in one
                 group of each axis; the ranks that all slow groups share are named
    disk read    a piece of the training data, read past the page cache by a thread
                 between two rounds: a slow or hanging file system

Nothing here draws random numbers or touches tensors of the run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from statistics import median

import torch

from evomesh.config.user import expand_home
from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.probes import all_reduce_seconds
from evomesh.train.probes import product_seconds

REPEATS = 3  # of a probe, the fastest of which counts: a busy moment is not a slow rank
# A difference below this is noise, whatever the ratio. Seconds.
PRODUCT_NOISE = 2e-3
REDUCE_NOISE = 3e-3
DISK_NOISE = 50e-3
READ_BYTES = 1 << 20
# Rows of the matrices, of float32: about three milliseconds and 128 MiB on a GPU.
GPU_PRODUCT = 4096
CPU_PRODUCT = 384
# Bytes of an all-reduce.
GPU_MESSAGE = 4 << 20
CPU_MESSAGE = 64 << 10
RANKS_NAMED = 8  # in one sentence

# Axes whose ranks are all over the grid; ``zero`` and ``replica`` are parts of dp.
REDUCED_AXES = ("dp", "tp", "wp", "pp")


@dataclass(frozen=True)
class RankFigures:
    """Figures of one rank, in seconds.

    Attributes:
        peers: ranks that are equal here do equal work: position in pipeline and tensor axis.
        fwd_bwd: mean of forward and backward since the last round.
        product: None where the device had no memory for it.
        disk: None where there is no local file to read.
        reduces: axis -> (first rank of its group, time of an all-reduce).
    """

    rank: int
    host: str
    peers: tuple[int, int] = (0, 0)
    fwd_bwd: float = 0.0
    product: float | None = None
    disk: float | None = None
    reduces: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Diagnosis:
    """Rounds of probes on every rank; the main rank reports what they find.

    Implements ``data.diag_outlier_ratio``.

    Args:
        ratio: a rank is slow that takes more than this times the median of its peers.
        disk: reads between two rounds; None: nothing to read.
        report: gets each sentence on the main rank.
    """

    def __init__(
        self,
        ratio: float,
        grid: Grid,
        device: torch.device,
        disk: DiskProbe | None = None,
        report: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self._ratio = ratio
        self._grid = grid
        self._device = device
        self._disk = disk
        self._report = report
        self._fastest_reduce: dict[str, float] = {}

    def run(self, fwd_bwd: float) -> None:
        """Measure, and report the slow ranks; every rank calls it after the same step.

        Args:
            fwd_bwd: mean seconds of forward and backward since the last round.
        """
        figures = gather_over(self._grid, self._measure(fwd_bwd))
        if self._grid.is_main:
            for sentence in self._sentences(figures):
                self._report(sentence)

    def _measure(self, fwd_bwd: float) -> RankFigures:
        grid = self._grid
        disk = None
        if self._disk is not None:
            disk = self._disk.seconds()
            self._disk.start()
        return RankFigures(
            rank=grid.world_rank,
            host=socket.gethostname(),
            peers=(grid.pp.rank, grid.tp.rank),
            fwd_bwd=fwd_bwd,
            product=time_product(self._device),
            disk=disk,
            reduces=self._reduces(),
        )

    def _reduces(self) -> dict[str, tuple[int, float]]:
        times = {}
        for name in REDUCED_AXES:
            axis = self._grid.axes[name]
            if axis.size == 1:
                continue
            seconds = time_all_reduce(axis, self._device)
            ranks_before = axis.rank * self._stride(axis)
            first = self._grid.world_rank - ranks_before
            times[name] = (first, seconds)
        return times

    def _stride(self, axis: Axis) -> int:
        """Return how far apart in the world two neighbors on an axis are."""
        grid = self._grid
        inner = {"tp": 1, "wp": 1, "dp": grid.tp.size}
        return inner.get(axis.name, grid.tp.size * grid.dp.size)

    def _sentences(self, figures: Sequence[RankFigures]) -> Iterator[str]:
        yield from slow_steps(figures, self._ratio)
        yield from slow_devices(figures, self._ratio)
        yield from slow_disks(figures, self._ratio)
        yield from slow_groups(figures, self._ratio)
        yield from self._slower_than_before(figures)

    def _slower_than_before(self, figures: Sequence[RankFigures]) -> Iterator[str]:
        """Yield the axes with a single group, which has no other to compare it with, only its past."""
        for name, groups in groups_by_axis(figures).items():
            if len(groups) > 1:
                continue
            ((_, seconds),) = groups.items()
            fastest = self._fastest_reduce.setdefault(name, seconds)
            self._fastest_reduce[name] = min(fastest, seconds)
            if is_outlier(seconds, fastest, self._ratio, REDUCE_NOISE):
                yield (
                    f"the all-reduce over axis {name} took {_ms(seconds)}, and {_ms(fastest)} earlier in this run: a "
                    "link of one of its ranks is slow or shared"
                )


def gather_over(grid: Grid, figures: RankFigures) -> list[RankFigures]:
    """Return the figures of all ranks, in the order of ranks."""
    # Along one axis after the other: after tensor ranks have gathered, each data rank
    # brings a whole tensor group, then each stage a whole pipeline stage.
    rows = [figures]
    for axis in (grid.tp, grid.dp, grid.pp):
        parts = all_gather_objects(rows, axis)
        rows = list(chain.from_iterable(parts))
    rows.sort(key=attrgetter("rank"))
    return rows


def is_outlier(seconds: float, usual: float, ratio: float, noise: float) -> bool:
    """Return whether a time is above ``ratio`` times the usual one, and by more than noise."""
    return seconds > ratio * usual and seconds - usual > noise


def slow_steps(figures: Sequence[RankFigures], ratio: float) -> Iterator[str]:
    """Yield the ranks whose forward and backward took longer than those of their data-parallel peers."""
    peers: dict[tuple[int, int], list[RankFigures]] = defaultdict(list)
    for row in figures:
        peers[row.peers].append(row)
    for rows in peers.values():
        usual = median(row.fwd_bwd for row in rows)
        for row in rows:
            if row.fwd_bwd > ratio * usual:
                yield (
                    f"{row.name} is slow: forward and backward took {row.fwd_bwd:.3f} s (median of {len(rows)} "
                    f"ranks: {usual:.3f} s)"
                )


def slow_devices(figures: Sequence[RankFigures], ratio: float) -> Iterator[str]:
    """Yield the ranks whose device computed a product slowly."""
    times = [(row, row.product) for row in figures if row.product is not None]
    yield from _slow_probes(times, ratio, PRODUCT_NOISE, "device: a matrix product")


def slow_disks(figures: Sequence[RankFigures], ratio: float) -> Iterator[str]:
    """Yield the ranks that read the training data slowly."""
    times = [(row, row.disk) for row in figures if row.disk is not None]
    yield from _slow_probes(
        times, ratio, DISK_NOISE, f"disk: reading {READ_BYTES >> 20} MiB of the data"
    )


def _slow_probes(
    times: Sequence[tuple[RankFigures, float]], ratio: float, noise: float, words: str
) -> Iterator[str]:
    if not times:
        return
    usual = median(seconds for _, seconds in times)
    for row, seconds in times:
        if is_outlier(seconds, usual, ratio, noise):
            yield (
                f"{row.name} has a slow {words} took {_ms(seconds)} (median of {len(times)} ranks: {_ms(usual)})"
            )


def groups_by_axis(figures: Sequence[RankFigures]) -> dict[str, dict[int, float]]:
    """Return axis -> first rank of a group -> time of its all-reduce, that of the rank that waited longest."""
    groups: dict[str, dict[int, float]] = defaultdict(dict)
    for row in figures:
        for name, (first, seconds) in row.reduces.items():
            longest = groups[name].get(first, 0.0)
            groups[name][first] = max(longest, seconds)
    return groups


def slow_groups(figures: Sequence[RankFigures], ratio: float) -> Iterator[str]:
    """Yield one sentence for the groups whose all-reduce is slow, with the ranks that all of them share.

    Example: of eight ranks in rows of two (tp) and columns of four (dp), the row of ranks
    4 and 5 is slow, and the column of 1, 3, 5 and 7. Rank 5 is in both.
    """
    # 1. Groups that are slow beside the others of their axis.
    suspects: list[set[int]] = []
    parts = []
    for name, groups in groups_by_axis(figures).items():
        usual = median(groups.values())
        slow = {
            first: seconds
            for first, seconds in groups.items()
            if is_outlier(seconds, usual, ratio, REDUCE_NOISE)
        }
        if slow:
            suspects.append(_members(figures, name, slow))
            parts.append(
                f"axis {name} {_ms(max(slow.values()))} instead of {_ms(usual)}"
            )
    if not suspects:
        return

    # 2. A rank with a bad link slows one group of each axis: it is in all of them. If
    #    none is, there is more than one cause, and all are named.
    shared = set.intersection(*suspects) or set.union(*suspects)
    named = [row.name for row in figures if row.rank in shared]
    listed = ", ".join(named[:RANKS_NAMED])
    more = len(named) - RANKS_NAMED
    if more > 0:
        listed += f" and {more} more"
    yield f"slow network at {listed}: an all-reduce took over {'; '.join(parts)}"


def _members(
    figures: Sequence[RankFigures], axis: str, firsts: Iterable[int]
) -> set[int]:
    wanted = set(firsts)
    return {
        row.rank
        for row in figures
        if axis in row.reduces and row.reduces[axis][0] in wanted
    }


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def time_product(device: torch.device) -> float | None:
    """Return the seconds of a matrix product of some milliseconds; None where there is no memory for it."""
    size = GPU_PRODUCT if device.type == "cuda" else CPU_PRODUCT
    try:
        return product_seconds(device, size, REPEATS)
    except torch.OutOfMemoryError:
        return None


def time_all_reduce(axis: Axis, device: torch.device) -> float:
    """Return the seconds of an all-reduce over an axis once all its ranks have arrived."""
    nbytes = GPU_MESSAGE if device.type == "cuda" else CPU_MESSAGE
    return all_reduce_seconds(axis, device, nbytes, REPEATS)


class DiskProbe:
    """Reads a piece of a file on a thread, past the page cache, a different piece each time.

    Args:
        folder: with the training data; its first large file is read.
    """

    def __init__(self, folder: str) -> None:
        self._folder = expand_home(folder)
        self._path: Path | None = None
        self._round = 0
        self._started = 0.0
        self._seconds: float | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start a read, unless the last one is still waiting for the disk."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._started = time.perf_counter()
        self._thread = threading.Thread(
            target=self._read, name="disk probe", daemon=True
        )
        self._thread.start()

    def seconds(self) -> float | None:
        """Return the seconds of the last read, so far if it is still waiting; None before the first one."""
        if self._thread is not None and self._thread.is_alive():
            return time.perf_counter() - self._started
        return self._seconds

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a file that is gone fails elsewhere
            self._path = self._path or first_large_file(self._folder)
            if self._path is None:
                return
            self._round += 1
            started = time.perf_counter()
            read_past_cache(self._path, self._round)
            self._seconds = time.perf_counter() - started


def first_large_file(folder: Path) -> Path | None:
    """Return the first file of at least ``READ_BYTES`` below a folder, else the largest, None without a file."""
    largest: Path | None = None
    largest_size = -1
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent, name)
            size = path.stat().st_size
            if size >= READ_BYTES:
                return path
            if size > largest_size:
                largest = path
                largest_size = size
    return largest


def read_past_cache(path: Path, number: int) -> int:
    """Read the piece of a file that a number chooses, after dropping it from the page cache; return its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        pieces = max(1, size // READ_BYTES)
        piece = number % pieces
        offset = READ_BYTES * piece
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, READ_BYTES, os.POSIX_FADV_DONTNEED)
        return len(os.pread(descriptor, READ_BYTES, offset))
    finally:
        os.close(descriptor)
