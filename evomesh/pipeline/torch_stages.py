"""The stages of torch's pipeline: receive buffers exist only while needed, and transfers are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from evomesh.parallel.recording import TransferRecord

if TYPE_CHECKING:
    from torch.distributed import P2POp

FORWARD, BACKWARD, WEIGHT = "forward", "backward", "weight"


class BoundedStage(PipelineStage):
    """A stage whose receive buffers are bounded by the depth of the pipeline.

    Before 2.15, torch's stage has a buffer for every micro-batch and direction, for as
    long as the schedule exists: 8 GiB for 128 micro-batches of 4096 tokens of a 7B, of
    which 1F1B needs those of pp micro-batches. Here a buffer is allocated when it is
    received into, and given up as soon as its micro-batch has used it. Until then, its
    place is held by a tensor on the meta device, which has no memory.
    """

    def _prepare_forward_infra(self, *arguments: Any, **options: Any) -> Any:
        with self._on_meta_device():
            return super()._prepare_forward_infra(*arguments, **options)

    def _prepare_backward_infra(self, *arguments: Any, **options: Any) -> Any:
        with self._on_meta_device():
            return super()._prepare_backward_infra(*arguments, **options)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(
        self, fwd_chunk_id: int, *arguments: Any, **options: Any
    ) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        # What backward needs of it, autograd and the stage's cache hold.
        self._give_up(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if self.has_backward:
            self._give_up(self.grad_recv_info[bwd_chunk_id])
        # The schedule keeps the losses of a step. Their graphs are used, but would still
        # hold what the last stage has received.
        if loss is not None and full_backward:
            loss.detach_()

    @contextmanager
    def _on_meta_device(self) -> Iterator[None]:
        """Have torch make its buffers without memory: shapes are given, so it communicates nothing here."""
        device = self.device
        self.device = torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _allocate(self, places: Iterable[Any]) -> None:
        for place in places:
            _move_buffer(place, self.device)

    def _give_up(self, places: Iterable[Any]) -> None:
        for place in places:
            _move_buffer(place, torch.device("meta"))


def _move_buffer(place: Any, device: torch.device) -> None:
    """Replace the buffer of one of torch's ``_RecvInfo`` by an empty one on a device; the first stage has none."""
    old = getattr(place, "buffer", None)
    if old is not None:
        new = torch.empty_like(old, device=device)
        place.buffer = new.requires_grad_(old.requires_grad)


class RecordedStage(BoundedStage):
    """A stage that records its transfers for the watchdog.

    Attributes:
        transfers: of this rank's stages together; set once it is built.
    """

    transfers: TransferRecord

    def _rank_of(self, stage: int) -> int:
        return int(self.stage_index_to_group_rank[stage])

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        operations: list[P2POp] = super().get_fwd_recv_ops(fwd_chunk_id)
        if operations:
            source = self._rank_of(self.stage_index - 1)
            key = (self.stage_index, FORWARD, fwd_chunk_id)
            self.transfers.receive(source, operations, key)
        return operations

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        operations: list[P2POp] = super().get_bwd_recv_ops(bwd_chunk_id)
        if operations:
            source = self._rank_of(self.stage_index + 1)
            key = (self.stage_index, BACKWARD, bwd_chunk_id)
            self.transfers.receive(source, operations, key)
        return operations

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        if operations:
            self.transfers.send(self._rank_of(self.stage_index + 1), operations)
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        if operations:
            self.transfers.send(self._rank_of(self.stage_index - 1), operations)
        return operations

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with self.transfers.computing((self.stage_index, FORWARD, fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with self.transfers.computing((self.stage_index, BACKWARD, bwd_chunk_id)):
            return super().backward_one_chunk(bwd_chunk_id, *args, **options)

    def backward_weight_one_chunk(
        self, bwd_chunk_id: int, last_backward: bool = False
    ) -> None:
        with self.transfers.computing((self.stage_index, WEIGHT, bwd_chunk_id)):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class ZeroBubbleStage(RecordedStage):
    """A stage whose weight gradients are computed separately from, and later than, its input gradients.

    torch does not call autograd's post-accumulate hooks then. They are called here, so
    that 16-bit gradients are accumulated in float32 after every micro-batch and full
    gradient buckets are launched.
    """

    def backward_weight_one_chunk(
        self, bwd_chunk_id: int, last_backward: bool = False
    ) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        # It has no input gradients, so torch ran its backward in one pass, with hooks.
        if self.stage_index == 0:
            return
        for parameter in self.submod.parameters():
            if parameter.grad is None:
                continue
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)
