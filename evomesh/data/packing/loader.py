"""Batches ready before the step asks: read, packed and (with CUDA) pinned by background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from evomesh.data.batch import Batch
from evomesh.data.packing.packs import Pack
from evomesh.data.packing.sampler import SamplerPosition
from evomesh.errors import UserError


class PackReader(Protocol):
    """Packs that are read by global number, from any thread."""

    def __len__(self) -> int: ...
    def read(self, pack: int) -> Pack: ...


class StepSampler(Protocol):
    """Which packs make up a step: a ``PackSampler`` or a ``MixedSampler``."""

    def take(self, position: SamplerPosition) -> tuple[NDArray[np.int64], SamplerPosition]: ...
    def seek(self, step: int) -> SamplerPosition: ...
    def state(self, position: SamplerPosition) -> dict[str, Any]: ...
    def resume(self, state: dict[str, Any]) -> SamplerPosition: ...


def collate(packs: Sequence[Pack]) -> Batch:
    """M packs as one batch [M, T]; bounds are padded on the right by repeating T."""
    width = max(len(pack.cu_seqlens) for pack in packs)
    bounds = np.stack(
        [np.pad(pack.cu_seqlens, (0, width - len(pack.cu_seqlens)), mode="edge") for pack in packs]
    )
    longest = max(int(np.diff(pack.cu_seqlens).max()) for pack in packs)

    def stack(rows: list[NDArray[Any]]) -> torch.Tensor:
        tensor = torch.from_numpy(np.stack(rows))
        return tensor.pin_memory() if torch.cuda.is_available() else tensor

    return Batch(
        tokens=stack([pack.tokens for pack in packs]),
        labels=stack([pack.labels for pack in packs]),
        position_ids=stack([pack.indexes for pack in packs]),
        type_ids=stack([pack.type_ids for pack in packs]),
        cu_seqlens=stack(list(bounds)),
        max_seqlen=longest,
    )


class BatchStream(Protocol):
    """One data-parallel rank's batches, step after step without end."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def check(self) -> None:
        """Read the next batch without taking it: data that cannot be used is refused before a run writes anything."""
        ...

    def skip(self) -> None:
        """Consume the next batch without handing it out (``data.skip_batches``)."""
        ...

    def state(self) -> dict[str, Any]:
        """State before the next batch: one small JSON object for ``TrainData.stream(state=...)``."""
        ...

    def close(self) -> None:
        """Stop the workers; batches under way are dropped."""
        ...


class PackStream:
    """Batches of packs that are read by number.

    Args:
        packs: where packs are read.
        sampler: which packs make up a step.
        dp_rank: this rank holds ``step[dp_rank::dp_size]``.
        dp_size: data-parallel size.
        start: position before the first batch.
        workers: background threads, each working on one step ahead; 0 reads when asked.
        extra_state: added to every state.
    """

    def __init__(
        self,
        packs: PackReader,
        sampler: StepSampler,
        dp_rank: int,
        dp_size: int,
        start: SamplerPosition,
        workers: int = 1,
        extra_state: dict[str, Any] | None = None,
    ) -> None:
        self.packs, self.sampler = packs, sampler
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.position = start  # before the next batch
        self._ahead = start  # before the next batch to be handed to a worker
        self._ready: deque[tuple[Callable[[], Batch], SamplerPosition]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._depth = 1 + workers
        self._extra = extra_state or {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._fill()
        batch, after = self._ready[0]
        result = batch()
        self._ready.popleft()
        self.position = after
        return result

    def check(self) -> None:
        self._fill()
        self._ready[0][0]()

    def skip(self) -> None:
        self._fill()
        self.position = self._ready.popleft()[1]

    def state(self) -> dict[str, Any]:
        return {**self.sampler.state(self.position), **self._extra}

    def close(self) -> None:
        self._ready.clear()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._ready) < self._depth:
            numbers, after = self.sampler.take(self._ahead)
            if len(numbers) % self.dp_size:
                raise UserError(
                    f"step {self._ahead.step} has {len(numbers)} packs, which {self.dp_size} ranks cannot share",
                    where="data.rampup_batch_size",
                    expected="sizes that the data-parallel size divides",
                )
            own = numbers[self.dp_rank :: self.dp_size]
            self._ready.append((self._submit(own), after))
            self._ahead = after

    def _submit(self, numbers: NDArray[np.int64]) -> Callable[[], Batch]:
        def read() -> Batch:
            return collate([self.packs.read(int(number)) for number in numbers])

        if self._pool is None:
            return read
        future: Future[Batch] = self._pool.submit(read)
        return future.result
