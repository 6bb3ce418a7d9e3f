"""``StorageLives``: every storage of a traced step, from its birth to its end, with what it is for.

What a storage is for shows where it is made, or later in what happens to it:

    made in a model's forward     kept for backward if it outlives the forward, else a temporary
    the same inside backward      recomputed if it outlives the block's forward
    made between, before backward logits, and the gradients that the loss keeps
    made in backward              gradients on their way through a layer
    a parameter's ``grad``        a gradient from there on
    made by a bucket              a bucket
    in a collective, in a send    communication; pipeline
    resized by FSDP2              a gathered layer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from evomesh.optim.buckets import GradientBucket, ParameterBucket
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.spec import local_shard
from evomesh.plan.memory_timeline import MemoryChange, MemoryPart
from evomesh.train.storage_watch import StorageWatch, storage_of

WEIGHTS, MASTERS, MOMENTS, GRADIENTS, BATCH = (
    "weights",
    "masters",
    "moments",
    "gradients",
    "batch and sums of losses",
)
KEPT, RECOMPUTED, LOSS, BACKWARD, TEMPORARY = (
    "kept activations",
    "recomputed activations",
    "logits and gradient of the head",
    "gradients of a layer",
    "temporaries",
)
GATHERED, BUCKETS, COMMUNICATION, PIPELINE = (
    "gathered layers",
    "buckets",
    "communication buffers",
    "pipeline buffers",
)
# From the bottom of the stack.
KINDS = (
    WEIGHTS,
    MASTERS,
    MOMENTS,
    GRADIENTS,
    BATCH,
    GATHERED,
    KEPT,
    RECOMPUTED,
    PIPELINE,
    LOSS,
    BACKWARD,
    BUCKETS,
    COMMUNICATION,
    TEMPORARY,
)
# A later use says more about these than the place where they were made.
_GENERAL = {TEMPORARY, BACKWARD, LOSS}
# Outside of forward and backward: before the first part the batch and the sums of its losses.
_MADE_IN = {"": BATCH, "loss": LOSS}
_BUCKET_METHODS = (
    (GradientBucket, "launch"),
    (GradientBucket, "finish"),
    (ParameterBucket, "launch"),
    (ParameterBucket, "finish"),
)


@dataclass(eq=False)
class ForwardPass:
    """A forward of a model, or of a block that is recomputed; ``end`` is set when it is over."""

    module: nn.Module
    kind: str
    end: int | None = None


@dataclass(eq=False)
class StorageLife:
    """A storage of one size and kind, from position ``begin`` up to ``end``; None: it is alive."""

    nbytes: int
    kind: str
    begin: int
    made_in: ForwardPass | None = None
    end: int | None = None

    @property
    def final_kind(self) -> str:
        """Kind, now that it is known how long it lived."""
        if self.made_in is None or self.kind not in (TEMPORARY, COMMUNICATION):
            return self.kind
        forward_end = self.made_in.end
        if forward_end is None:
            return self.kind
        outlived_it = self.end is None or self.end > forward_end
        return self.made_in.kind if outlived_it else self.kind

    def changes(self) -> Iterator[MemoryChange]:
        """Yield its birth, and its end where it has one."""
        kind = self.final_kind
        yield MemoryChange(self.begin, kind, self.nbytes)
        if self.end is not None:
            yield MemoryChange(self.end, kind, -self.nbytes)


PartBegin = tuple[str, int]  # name, position


def _position(change: MemoryChange) -> int:
    return change.position


class StorageLives(StorageWatch):
    """Writes down the lives of all storages on one device.

    Args:
        device: the type of the device that is traced.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self._models: set[nn.Module] = set()
        self._with_loss: set[nn.Module] = set()
        self._position = 0
        self._alive: dict[int, StorageLife] = {}  # by address
        self._ended: list[StorageLife] = []
        self._gathered: set[int] = set()  # addresses of what FSDP2 resizes
        self._forward: ForwardPass | None = None
        self._in_bucket = False
        self._unseen = False
        self._backward_task = -1
        self._part = ""
        self._parts: list[PartBegin] = []

    def watch_models(
        self, models: Sequence[nn.Module], with_loss: Sequence[nn.Module]
    ) -> None:
        """Take what ``models`` make in forward for activations, and what follows those ``with_loss`` for the loss."""
        self._models = set(models)
        self._with_loss = set(with_loss)

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor is for that exists already."""
        storage = storage_of(tensor)
        if storage is not None:
            key = self.watch(storage)
            self._end_life(key)
            self._begin_life(key, storage.nbytes(), kind)

    def restart(self) -> None:
        """Forget what is over; what is alive begins here."""
        self._position = 1
        self._ended = []
        self._parts = []
        self._part = ""
        for life in self._alive.values():
            life.kind = life.final_kind
            life.made_in = None
            life.begin = 0

    def begin_part(self, name: str) -> None:
        """Begin a part of the step."""
        self._part = name
        self._parts.append((name, self._position))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Write down the lives of storages in the ``with`` block."""
        with ExitStack() as stack:
            for owner, name in _BUCKET_METHODS:
                method = getattr(owner, name)
                marked = self._marking_buckets(method)
                stack.enter_context(patch.object(owner, name, marked))
            stack.enter_context(super().watching())
            yield

    @contextmanager
    def marking_update(self, optimizer: ZeroOptimizer) -> Iterator[None]:
        """Begin a part where the optimizer begins its step."""
        step = optimizer.step

        def marked(*args: Any, **options: Any) -> Any:
            self.begin_part("update")
            return step(*args, **options)

        with patch.object(optimizer, "step", marked):
            yield

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Take no note of what is made in the ``with`` block."""
        self._unseen = True
        try:
            yield
        finally:
            self._unseen = False

    def watch_gradient(self, parameter: Tensor) -> None:
        """Take what backward leaves in ``parameter.grad`` for a gradient, as soon as it does."""
        parameter.register_post_accumulate_grad_hook(self._name_gradient)  # type: ignore[no-untyped-call]
        # Before that of the optimizer, which may give the gradient up.
        hooks: Any = parameter._post_accumulate_grad_hooks
        own = next(reversed(hooks))
        hooks.move_to_end(own, last=False)

    def _name_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        shard = local_shard(parameter.grad)
        storage = storage_of(shard)
        if storage is not None and storage._cdata in self._alive:
            self._relabel(storage._cdata, GRADIENTS)

    def changes(self) -> list[MemoryChange]:
        """Return all that came and went, in order."""
        lives = [*self._ended, *self._alive.values()]
        found: list[MemoryChange] = []
        for life in lives:
            found += life.changes()
        return sorted(found, key=_position)

    def parts(self) -> tuple[MemoryPart, ...]:
        """Return the parts of the step that are not empty."""
        found = []
        end = self._position
        for name, begin in reversed(self._parts):
            if end > begin:
                part = MemoryPart(name, begin, end)
                found.append(part)
            end = begin
        found.reverse()
        return tuple(found)

    # What a watch hears of.

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._note_backward()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d":
            is_transfer = "send" in func.__name__ or "recv" in func.__name__
            self._mark_message(args, PIPELINE if is_transfer else COMMUNICATION)
        return result

    def made(self, tensor: Tensor, operator: Any) -> None:
        storage = storage_of(tensor)
        if self._unseen or storage is None or tensor.device.type != self._device:
            return
        key = self.watch(storage)
        self._end_life(key)
        self._begin_life(key, storage.nbytes(), self._kind_here())

    def resized(self, storage: torch.UntypedStorage) -> None:
        key = self.watch(storage)
        self._gathered.add(key)
        self._end_life(key)
        self._begin_life(key, storage.nbytes(), GATHERED)

    def freed(self, key: int) -> None:
        self._gathered.discard(key)
        self._end_life(key)

    def _begin_life(self, key: int, nbytes: int, kind: str) -> None:
        made_in = None if key in self._gathered else self._forward
        self._alive[key] = StorageLife(nbytes, kind, self._position, made_in)
        self._position += 1

    def _end_life(self, key: int) -> None:
        life = self._alive.pop(key, None)
        if life is not None:
            life.end = self._position
            self._ended.append(life)
            self._position += 1

    def _relabel(self, key: int, kind: str) -> None:
        """Let a storage be something else from here on."""
        life = self._alive[key]
        life.end = self._position
        self._ended.append(life)
        self._alive[key] = StorageLife(life.nbytes, kind, self._position)

    def _mark_message(self, args: tuple[Any, ...], kind: str) -> None:
        """Let the storages in a collective be what they are sent from and received into."""
        for leaf in tree_leaves(args):
            storage = storage_of(leaf) if isinstance(leaf, Tensor) else None
            life = None if storage is None else self._alive.get(storage._cdata)
            if life is not None and life.kind in _GENERAL:
                life.kind = kind

    # Where the step is.

    def _kind_here(self) -> str:
        """Return what a storage is for that is made now."""
        if self._in_bucket:
            return BUCKETS
        if self._forward is not None:
            return TEMPORARY
        if self._backward_task != -1:
            return BACKWARD
        return _MADE_IN.get(self._part, TEMPORARY)

    def _note_backward(self) -> None:
        """Begin a part where backward of another micro-batch begins."""
        task = torch._C._current_graph_task_id()
        if task != self._backward_task:
            self._backward_task = task
            if task != -1:
                self.begin_part("backward")

    def entered(self, module: nn.Module) -> None:
        if self._forward is not None:
            return
        if torch._C._current_graph_task_id() != -1:
            self._forward = ForwardPass(module, RECOMPUTED)
        elif module in self._models:
            self._forward = ForwardPass(module, KEPT)
            self.begin_part("forward")

    def left(self, module: nn.Module) -> None:
        passing = self._forward
        if passing is None or passing.module is not module:
            return
        passing.end = self._position
        self._forward = None
        if passing.kind == RECOMPUTED:
            return
        has_loss = module in self._with_loss
        self.begin_part("loss" if has_loss else "transfer")

    def _marking_buckets(self, method: Any) -> Any:
        """Return a method of a bucket that takes what it makes for buckets."""

        def marked(bucket: Any, *args: Any) -> Any:
            was_in_bucket = self._in_bucket
            self._in_bucket = True
            try:
                return method(bucket, *args)
            finally:
                self._in_bucket = was_in_bucket

        return marked
