"""Torch's own pipeline schedules in a world of one process, whose other ranks never answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from evomesh.plan.storage_lives import StorageLives
from evomesh.plan.trace import TracedDevice


class AgreedVote:
    """Stands for the answer of all stages that they know their shapes."""

    def item(self) -> int:
        return 1


@contextmanager
def pipeline_in_fake_world(device: TracedDevice, lives: StorageLives) -> Iterator[None]:
    """Let torch's schedules run this rank's part of a step in the ``with`` block; what they receive has no values."""
    from torch.distributed.pipelining import PipelineStage, schedules

    from evomesh.pipeline.torch_stages import BoundedStage

    with ExitStack() as stack:
        # From torch 2.13 on, the stages vote on whether all know their shapes.
        for name in ("_warmup_forward_vote", "_warmup_backward_result"):
            if hasattr(PipelineStage, name):
                stack.enter_context(patch.object(PipelineStage, name, _agree))
        stack.enter_context(patch.object(schedules, "_batch_p2p", _transfer_each))
        # What holds the place of a buffer has no memory on a real device.
        for name in ("_prepare_forward_infra", "_prepare_backward_infra", "_give_up"):
            hidden = _hidden_from(lives, getattr(BoundedStage, name))
            stack.enter_context(patch.object(BoundedStage, name, hidden))
        if device is not TracedDevice.CPU:
            # The device has no random numbers to keep.
            fork = patch.object(torch.random, "fork_rng", _keep_none)
            stack.enter_context(fork)
        yield


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
    for one in operations:
        peer = "group_dst" if one.op is dist.isend else "group_src"
        works.append(
            one.op(one.tensor, group=one.group, tag=one.tag, **{peer: one.group_peer})
        )
    return works
