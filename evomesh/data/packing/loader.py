"""Prefetch batches: background threads read and pack them and, with CUDA, copy them to pinned memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from evomesh.data.batch import Batch
from evomesh.data.packing.packs import Pack
from evomesh.data.packing.sampler import SamplerPosition
from evomesh.errors import UserError
from evomesh.rounding import next_power_of_two


class PackReader(Protocol):
    """A source of packs that are read by number, from any thread: a ``Corpus``."""

    def __len__(self) -> int: ...
    def read(self, pack: int) -> Pack: ...


class StepSampler(Protocol):
    """Decides which packs make up a step: a ``PackSampler`` or a ``MixedSampler``."""

    def take(
        self, position: SamplerPosition
    ) -> tuple[NDArray[np.int64], SamplerPosition]: ...
    def seek(self, step: int) -> SamplerPosition: ...
    def state(self, position: SamplerPosition) -> dict[str, Any]: ...
    def resume(self, state: dict[str, Any]) -> SamplerPosition: ...


def collate(packs: Sequence[Pack]) -> Batch:
    """Stack M packs into a batch [M, T]; cu_seqlens are padded on the right by repeating T, to 2**n + 1 bounds."""
    bounds = [pack.cu_seqlens for pack in packs]
    padded_bounds = _pad_bounds(bounds)
    lengths = np.diff(padded_bounds)
    max_seqlen = int(lengths.max())
    return Batch(
        tokens=_stack(pack.tokens for pack in packs),
        labels=_stack(pack.labels for pack in packs),
        position_ids=_stack(pack.position_ids for pack in packs),
        type_ids=_stack(pack.type_ids for pack in packs),
        cu_seqlens=_stack(padded_bounds),
        max_seqlen=max_seqlen,
    )


def _pad_bounds(bounds: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """Repeat the last bound of each pack until all have as many segments, a power of two.

    cuDNN's attention keeps a plan for each number of segments that it has seen, and
    makes one in some 40 ms.
    """
    # Bounds 0 3 8 and 0 8 become 0 3 8 and 0 8 8: the segment that is added is empty.
    sizes = map(len, bounds)
    most_segments = max(sizes) - 1
    length = 1 + next_power_of_two(most_segments)
    padded = []
    for of_pack in bounds:
        missing = length - len(of_pack)
        margins = (0, missing)
        row = np.pad(of_pack, margins, mode="edge")
        padded.append(row)
    return padded


def _stack(rows: Iterable[NDArray[Any]]) -> torch.Tensor:
    """Stack arrays of one shape into a tensor, in pinned memory if there is a GPU."""
    tensor = torch.from_numpy(np.stack(list(rows)))
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class BatchStream(Protocol):
    """The endless batches of one data-parallel rank, one per step."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def check(self) -> None:
        """Read the next batch without taking it, so that bad data is refused before a run writes anything."""
        ...

    def skip(self) -> None:
        """Consume the next batch without returning it (``data.skip_batches``)."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the state before the next batch: one small JSON object for ``TrainData.stream(state=...)``."""
        ...

    def close(self) -> None:
        """Stop the workers and drop prefetched batches."""
        ...


@dataclass(frozen=True)
class PrefetchedBatch:
    """A batch that is being read, and the position after it."""

    get: Callable[[], Batch]
    position_after: SamplerPosition


class PackStream:
    """The batches of a corpus, whose packs are read by number.

    Args:
        packs: reads a pack.
        sampler: which packs make up a step.
        dp_rank: this rank reads ``packs_of_step[dp_rank::dp_size]``.
        dp_size: data-parallel size.
        start: position before the first batch.
        workers: background threads, each prefetching one step; 0 reads on demand.
        extra_state: added to every state.
    """

    def __init__(
        self,
        packs: PackReader,
        sampler: StepSampler,
        *,
        dp_rank: int,
        dp_size: int,
        start: SamplerPosition,
        workers: int,
        extra_state: dict[str, Any],
    ) -> None:
        self.packs = packs
        self.sampler = sampler
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.position = start  # before the next batch
        self._prefetch_position = start  # before the next batch to prefetch
        self._prefetched: deque[PrefetchedBatch] = deque()
        self._prefetch_depth = 1 + workers
        self._pool = (
            ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        )
        self._extra_state = extra_state

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._prefetch()
        # A batch that fails stays in the queue: the next call fails again.
        batch = self._prefetched[0].get()
        self.position = self._prefetched.popleft().position_after
        return batch

    def check(self) -> None:
        self._prefetch()
        self._prefetched[0].get()

    def skip(self) -> None:
        self._prefetch()
        self.position = self._prefetched.popleft().position_after

    def state(self) -> dict[str, Any]:
        return {**self.sampler.state(self.position), **self._extra_state}

    def close(self) -> None:
        self._prefetched.clear()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _prefetch(self) -> None:
        while len(self._prefetched) < self._prefetch_depth:
            # Positions are computed here, in order; only reading and packing run on the
            # workers.
            position = self._prefetch_position
            packs, after = self.sampler.take(position)
            if len(packs) % self.dp_size:
                raise UserError(
                    f"step {position.step} has {len(packs)} packs, not a multiple of {self.dp_size} ranks",
                    where="data.rampup_batch_size",
                    expected="sizes that are multiples of the data-parallel size",
                    code="EVO-CONFIG-008",
                )
            packs_of_rank = packs[self.dp_rank :: self.dp_size]
            batch = PrefetchedBatch(self._submit(packs_of_rank), after)
            self._prefetched.append(batch)
            self._prefetch_position = after

    def _submit(self, packs: NDArray[np.int64]) -> Callable[[], Batch]:
        """Start reading a batch on a worker; return a function that waits for it (without workers: that reads it)."""

        def read() -> Batch:
            return collate([self.packs.read(int(pack)) for pack in packs])

        if self._pool is None:
            return read
        future: Future[Batch] = self._pool.submit(read)
        return future.result
