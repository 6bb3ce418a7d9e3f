"""Let ranks agree on a save or a load through small JSON messages to rank 0 and back.

Messages are JSON, never pickles. They have a separate process group (gloo), so that
those of a save in the background cannot mix with gradients.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, Protocol

import torch
import torch.distributed as dist

from evomesh.errors import EXIT_RESTART, UserError
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place


class Exchange(Protocol):
    """The ranks that save and load together; every rank calls every method in the same order."""

    rank: int
    size: int

    def gather(self, message: Any) -> list[Any] | None:
        """Return the messages of all ranks, by rank, on rank 0; None elsewhere."""

    def broadcast(self, message: Any) -> Any:
        """Return rank 0's message on every rank."""

    def scatter(self, messages: list[Any] | None) -> Any:
        """Return on each rank the message that rank 0 has for it; elsewhere ``messages`` is None."""

    def pass_on(
        self,
        data: torch.Tensor,
        to: int,
        received: torch.Tensor,
        source: int,
        ring_name: str,
    ) -> None:
        """Send ``data`` to one rank while ``received`` is filled by another; an empty one is left out.

        The one method that only some ranks call: those of a ring, each as often as the others.

        Args:
            data: bytes in host memory, as is ``received``.
            ring_name: the same on all ranks of the ring, and on no others.
        """

    def twin(self) -> Exchange:
        """Return a second exchange of the same ranks whose messages cannot mix with those of this one."""

    def close(self) -> None:
        """Give up the process group; no method may be called afterwards."""


class PeerLostError(UserError):
    """A rank died or stopped answering: the process group cannot be used any more, only a restart helps.

    ``PeerWatch`` knows which.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the connection to another rank broke: {str(error).partition(chr(10))[0]}",
            fix="rerun the same command; it resumes from the last committed checkpoint",
            exit_code=EXIT_RESTART,
            code="EVO-PARALLEL-005",
        )


class SingleProcessExchange:
    """The exchange of a process without other ranks."""

    rank, size = 0, 1

    def gather(self, message: Any) -> list[Any]:
        return [message]

    def broadcast(self, message: Any) -> Any:
        return message

    def scatter(self, messages: list[Any] | None) -> Any:
        assert messages is not None
        return messages[0]

    def pass_on(
        self,
        data: torch.Tensor,
        to: int,
        received: torch.Tensor,
        source: int,
        ring_name: str,
    ) -> None:
        raise AssertionError("a ring has at least two ranks")

    def twin(self) -> SingleProcessExchange:
        return self

    def close(self) -> None:
        return


class GroupExchange:
    """An exchange over all ranks of the job, with a separate process group.

    Args:
        timeout_s: seconds after which a rank that does not answer counts as dead.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self._timeout_s = timeout_s
        self._group = dist.new_group(
            backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)
        )
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._name = f"the exchange of all ranks:{self._group.group_name}"

    def gather(self, message: Any) -> list[Any] | None:
        try:
            with this_process().collective(Place.GATHER, self._name):
                return self._gather(message)
        except RuntimeError as error:
            raise PeerLostError(error) from error

    def broadcast(self, message: Any) -> Any:
        try:
            with this_process().collective(Place.BROADCAST, self._name):
                return self._broadcast(message)
        except RuntimeError as error:
            raise PeerLostError(error) from error

    def scatter(self, messages: list[Any] | None) -> Any:
        try:
            return self._scatter(messages)
        except RuntimeError as error:
            raise PeerLostError(error) from error

    def pass_on(
        self,
        data: torch.Tensor,
        to: int,
        received: torch.Tensor,
        source: int,
        ring_name: str,
    ) -> None:
        try:
            with this_process().collective(Place.SEND, ring_name):
                works = []
                if data.numel():
                    works.append(dist.isend(data, to, group=self._group))
                if received.numel():
                    works.append(dist.irecv(received, source, group=self._group))
                for work in works:
                    assert work is not None  # this rank is in the group
                    work.wait()
        except RuntimeError as error:
            raise PeerLostError(error) from error

    def _gather(self, message: Any) -> list[Any] | None:
        data = _encode(message)
        # gloo gathers tensors of equal size: all ranks learn all sizes, and each message
        # is padded to that of the longest.
        own_size = len(data)
        sizes = self._sizes_of_all(own_size)
        padded = _zero_bytes(max(sizes))
        padded[:own_size] = data
        gathered = None  # only rank 0 receives
        if self.rank == 0:
            gathered = [torch.zeros_like(padded) for _ in sizes]
        dist.gather(padded, gathered, dst=0, group=self._group)
        if gathered is None:
            return None
        return list(map(_decode_padded, gathered, sizes))

    def _sizes_of_all(self, own_size: int) -> list[int]:
        """Return the size of each rank's message, in order of the ranks."""
        own = torch.tensor([own_size])
        sizes = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(sizes, own, group=self._group)
        return [int(size) for size in sizes]

    def _broadcast(self, message: Any) -> Any:
        if self.rank == 0:
            data = _encode(message)
        else:
            data = _zero_bytes(0)
        # The size first: a rank must make room for a message before it receives it.
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0, group=self._group)
        if self.rank:
            data = _zero_bytes(int(size))
        dist.broadcast(data, src=0, group=self._group)
        return _decode(data)

    def _scatter(self, messages: list[Any] | None) -> Any:
        encoded = []
        for message in messages or []:
            data = _encode(message)
            encoded.append(data)
        # gloo scatters tensors of equal size: all are padded to that of the longest, with
        # blanks, which JSON may have at its end.
        length = self._size_of_longest(encoded)
        received = _blanks(length)
        padded = None  # only rank 0 sends
        if self.rank == 0:
            padded = [_padded(data, received) for data in encoded]
        dist.scatter(received, padded, src=0, group=self._group)
        return _decode(received)

    def _size_of_longest(self, encoded: list[torch.Tensor]) -> int:
        """Return the size of rank 0's longest message."""
        sizes = map(len, encoded)
        longest = torch.tensor([max(sizes, default=0)])
        dist.broadcast(longest, src=0, group=self._group)
        return int(longest)

    def twin(self) -> GroupExchange:
        return GroupExchange(self._timeout_s)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group(self._group)


def _encode(message: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def _zero_bytes(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


def _blanks(count: int) -> torch.Tensor:
    return torch.full((count,), ord(" "), dtype=torch.uint8)


def _padded(data: torch.Tensor, blanks: torch.Tensor) -> torch.Tensor:
    """Return ``data`` with blanks after it."""
    padded = blanks.clone()
    padded[: len(data)] = data
    return padded


def _decode_padded(data: torch.Tensor, size: int) -> Any:
    return _decode(data[:size])


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def gather_on_all_ranks(exchange: Exchange, message: Any) -> list[Any]:
    """Return the messages of all ranks, by rank, on every rank."""
    gathered = exchange.gather(message)
    answers: list[Any] = exchange.broadcast(gathered)
    return answers


def default_exchange() -> Exchange:
    """Return an exchange over all ranks of the job, or of this process alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return GroupExchange()
    return SingleProcessExchange()
