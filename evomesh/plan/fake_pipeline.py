"""Torch's own pipeline schedules in a world of one process, whose other ranks never answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from evomesh.plan.storage_lives import StorageLives
from evomesh.plan.trace import TracedDevice

# Methods of torch's stages, and of ours.
VOTES = ("_warmup_forward_vote", "_warmup_backward_result")
PLACE_HOLDING = ("_prepare_forward_infra", "_prepare_backward_infra", "_give_up")


class AgreedVote:
    """Stands for the answer of all stages that they know their shapes."""

    def item(self) -> int:
        return 1


@dataclass(frozen=True)
class HeldTransfer:
    """A transfer that holds its tensor for as long as it is known, as those of real backends do.

    Torch's interleaved and zbv schedules keep those of all sends until the end of a step.
    """

    work: Any
    tensor: Tensor

    def wait(self) -> None:
        self.work.wait()


@contextmanager
def pipeline_in_fake_world(device: TracedDevice, lives: StorageLives) -> Iterator[None]:
    """Let torch's schedules run this rank's part of a step in the ``with`` block; what they receive has no values."""
    from torch.distributed.pipelining import schedules

    replaced = list(_replacements(lives))
    transfers = (schedules, "_batch_p2p", _transfer_each)
    replaced.append(transfers)
    if device is not TracedDevice.CPU:
        # The device has no random numbers to keep.
        replaced.append((torch.random, "fork_rng", _keep_none))
    with ExitStack() as stack:
        for owner, name, method in replaced:
            replacement = patch.object(owner, name, method)
            stack.enter_context(replacement)
        yield


def _replacements(lives: StorageLives) -> Iterator[tuple[Any, str, Any]]:
    """Yield a class, the name of a method and what replaces it."""
    from torch.distributed.pipelining import PipelineStage

    from evomesh.pipeline.torch_stages import BoundedStage

    # From torch 2.13 on, the stages vote on whether all know their shapes.
    for name in VOTES:
        if hasattr(PipelineStage, name):
            yield PipelineStage, name, _agree
    # What holds the place of a buffer has no memory on a real device.
    for name in PLACE_HOLDING:
        method = getattr(BoundedStage, name)
        yield BoundedStage, name, _hidden_from(lives, method)


def _hidden_from(lives: StorageLives, method: Any) -> Any:
    """Return a method of a stage whose tensors are not counted."""

    def hidden(stage: Any, *args: Any, **options: Any) -> Any:
        with lives.looking_away():
            return method(stage, *args, **options)

    return hidden


def _agree(*_: Any, **__: Any) -> AgreedVote:
    return AgreedVote()


def _keep_none(*_: Any, **__: Any) -> Any:
    return nullcontext()


def _transfer_each(operations: Sequence[Any], desc: str | None = None) -> list[Any]:
    """Launch sends and receives one by one: a device without a backend cannot combine them."""
    works = []
    for operation in operations:
        works.append(_transfer(operation))
    return works


def _transfer(operation: Any) -> HeldTransfer:
    is_send = operation.op.__name__ == "isend"
    peer = "group_dst" if is_send else "group_src"
    options = {peer: operation.group_peer, "tag": operation.tag}
    work = operation.op(operation.tensor, group=operation.group, **options)
    return HeldTransfer(work, operation.tensor)
