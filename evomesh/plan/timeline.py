"""Timeline of one rank: what its streams do in a traced step, in the order in which the host launches it.

The traced code runs on the meta device, where nothing takes time. What it computes and
sends is written down as events, and the events that order its streams beside them:

    host launches      Kernel on "compute" ... Transfer on the "tp" communicator ... Kernel that reads what arrived
    written down       Kernel(compute)         Transfer(tp)                          Wait(compute), Kernel(compute)

FSDP2 orders its streams by torch's stream interface, for which ``RecordedStreams``
stands. Other code waits for a collective where it first uses what arrives, and so does
the timeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from evomesh.parallel.grid import Grid
from evomesh.parallel.traffic import CollectiveCall, describe_call, group_names

COMPUTE = "compute"


class KernelKind(Enum):
    """Kind of a kernel, which says what bounds it."""

    MATRIX = "matrix products"
    ATTENTION = "attention"
    MEMORY = "elementwise"  # and reductions, copies, lookups


@dataclass(frozen=True)
class Kernel:
    """A computation.

    Attributes:
        flops: floating-point operations of products; 0 for what only moves data.
        nbytes: bytes of the tensors that it reads and writes.
        size: smallest dimension of a product, tokens of a sequence in attention; 0 for others.
        operator: its name in torch, without the overload.
        dtype: of the first tensor of floating-point numbers; "" without one.
    """

    stream: str
    kind: KernelKind
    flops: int
    nbytes: int
    size: int = 0
    operator: str = ""
    dtype: str = ""

    @property
    def work(self) -> int:
        """Return what its time depends on: operations of products, bytes of others."""
        return self.flops or self.nbytes


@dataclass(frozen=True)
class Transfer:
    """A collective, send or receive; ``mark`` is its end, ``after`` are the ends of transfers whose data it sends."""

    stream: str
    call: CollectiveCall
    mark: int
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mark:
    """A point of a stream: what was launched on it before."""

    stream: str
    mark: int


@dataclass(frozen=True)
class Wait:
    """A stream does not go past this point before ``mark``."""

    stream: str
    mark: int


Event = Kernel | Transfer | Mark | Wait


@dataclass
class Timeline:
    """Events of one rank in the order of launch, in sections with names."""

    events: list[Event] = field(default_factory=list)
    sections: list[tuple[str, int]] = field(default_factory=list)
    marks: int = 0

    def begin(self, name: str) -> None:
        """Begin a section: ``name`` and the index of its first event."""
        self.sections.append((name, len(self.events)))

    def part(self, prefix: str) -> list[Event]:
        """Return the events of all sections whose name begins with ``prefix``."""
        # From behind: a section ends where the one after it begins.
        chosen: list[Event] = []
        end = len(self.events)
        for name, start in reversed(self.sections):
            if name.startswith(prefix):
                section = self.events[start:end]
                chosen = section + chosen
            end = start
        return chosen

    def restart(self) -> None:
        """Forget all events; marks keep their numbers."""
        self.events.clear()
        self.sections.clear()

    def new_mark(self) -> int:
        self.marks += 1
        return self.marks


class RecordedStream:
    """Stands for a stream of FSDP2: what it waits for is written into a timeline."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self._timeline = timeline
        self.name = name

    def record_event(self, event: RecordedEvent | None = None) -> RecordedEvent:
        event = event or RecordedEvent(self._timeline, self)
        event.record(self)
        return event

    def wait_event(self, event: RecordedEvent) -> None:
        if event.mark is not None:
            self._timeline.events.append(Wait(self.name, event.mark))

    def wait_stream(self, stream: RecordedStream) -> None:
        self.wait_event(stream.record_event())


class RecordedEvent:
    """Stands for an event of a stream."""

    def __init__(self, timeline: Timeline, stream: RecordedStream) -> None:
        self._timeline = timeline
        self._stream = stream
        self.mark: int | None = None

    def record(self, stream: RecordedStream | None = None) -> RecordedEvent:
        stream = stream or self._stream
        self.mark = self._timeline.new_mark()
        self._timeline.events.append(Mark(stream.name, self.mark))
        return self

    def synchronize(self) -> None:
        """Do nothing: the host waits for no device here."""


class RecordedStreams:
    """Torch's stream interface of a device, for a rank whose streams are written into a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._current = [RecordedStream(timeline, COMPUTE)]
        self._made = 0

    @property
    def current(self) -> str:
        """Name of the current stream."""
        return self._current[-1].name

    def interface(self) -> SimpleNamespace:
        """Return what stands for a module like ``torch.cuda``."""
        module = SimpleNamespace(**vars(torch.cpu))
        module.Stream = self._new_stream
        module.Event = self._new_event
        module.stream = self._use
        module.current_stream = self._current_stream
        module.current_device = lambda: 0  # torch.cpu returns a name
        return module

    def _current_stream(self, device: object = None) -> RecordedStream:
        return self._current[-1]

    def _new_stream(self, priority: int = 0) -> RecordedStream:
        self._made += 1
        return RecordedStream(self._timeline, f"stream {self._made}")

    def _new_event(self) -> RecordedEvent:
        return RecordedEvent(self._timeline, self._current[-1])

    @contextmanager
    def _use(self, stream: RecordedStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()


class TimelineRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operator of the ``with`` block into a timeline."""

    def __init__(
        self,
        timeline: Timeline,
        streams: RecordedStreams,
        grid: Grid,
        device: str = "meta",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._timeline = timeline
        self._streams = streams
        self._device = device
        self._names = group_names(grid)
        # What arrives, by the address of its storage: the storage, so that no other gets
        # the address, and the end of the transfer.
        self._arriving: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        out = func(*args, **named)
        if func.namespace == "c10d":
            self._transfer(func, args)
        else:
            self._kernel(func, args, named, out)
        return out

    def _transfer(self, func: Any, args: tuple[Any, ...]) -> None:
        call = describe_call(func, args, self._names)
        if call is None:
            return
        tensors = _tensors(args)
        after = []
        for tensor in tensors:
            key = _key(tensor)
            if key in self._arriving:
                _, mark = self._arriving.pop(key)
                after.append(mark)
        mark = self._timeline.new_mark()
        transfer = Transfer(self._streams.current, call, mark, tuple(after))
        self._timeline.events.append(transfer)
        if call.operation == "send":
            return
        for tensor in _tensors(args[:1]):
            self._arriving[_key(tensor)] = (tensor.untyped_storage(), mark)

    def _kernel(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if not func.is_view:
            inputs = _tensors((args, kwargs))
            self._wait_for(inputs)
        stream = self._streams.current
        kernel = describe_kernel(
            func,
            args,
            kwargs,
            out,
            self._device,
            stream,
        )
        if kernel is not None:
            self._timeline.events.append(kernel)

    def _wait_for(self, inputs: Sequence[Tensor]) -> None:
        """Let the current stream wait for those inputs that are arriving."""
        for tensor in inputs:
            arriving = self._arriving.pop(_key(tensor), None)
            if arriving is None:
                continue
            _, mark = arriving
            wait = Wait(self._streams.current, mark)
            self._timeline.events.append(wait)


_aten = torch.ops.aten
# They have tensors as arguments and results, and touch none.
_FREE = {
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.detach.default,
    _aten.resize_.default,
    _aten._unsafe_view.default,
    _aten.lift_fresh.default,
}
# Of regions in a profile, and of questions such as on which device a tensor is.
_NO_KERNELS = ("profiler", "prim")
# A product (see layers/products.py) and attention of the CPU, which torch's counters do not know.
_ONEDNN_LINEAR = "_linear_pointwise"
_CPU_ATTENTION = "flash_attention_for_cpu"
# Attention by segments, whose operations torch counts only after 2.11.
_VARLEN_ATTENTION = ("_varlen_attn", "_varlen_attn_backward")


def describe_kernel(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    device: str,
    stream: str = COMPUTE,
) -> Kernel | None:
    """Return what an operator does that has returned ``out``; None for one that does nothing on ``device``."""
    if func.is_view or func.namespace in _NO_KERNELS:
        return None
    inputs = _tensors((args, kwargs))
    outputs = _tensors(out)
    is_factory = not inputs and not _fills(func)
    if is_factory or func in _FREE:
        return None
    nbytes = _bytes_on_device([*inputs, *outputs], device)
    if nbytes == 0:
        return None  # on the host
    kind, flops = _work(func, args, kwargs, out)
    return Kernel(
        stream=stream,
        kind=kind,
        flops=flops,
        nbytes=nbytes,
        size=_size_of(kind, inputs),
        operator=func.overloadpacket.__name__,
        dtype=_dtype_of([*inputs, *outputs]),
    )


def _size_of(kind: KernelKind, inputs: Sequence[Tensor]) -> int:
    if kind is KernelKind.MATRIX:
        return min(min(tensor.shape, default=1) for tensor in inputs)
    if kind is KernelKind.ATTENTION:
        # Heads and the numbers of a head follow the tokens.
        return int(inputs[0].shape[-2])
    return 0


def _dtype_of(tensors: Sequence[Tensor]) -> str:
    for tensor in tensors:
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return ""


def _bytes_on_device(tensors: Sequence[Tensor], device: str) -> int:
    """Return the bytes of tensors on a device; one that is written in place counts once."""
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if tensor.device.type == device:
            total += tensor.numel() * tensor.element_size()
    return total


def _fills(func: Any) -> bool:
    """Return whether an operator without tensors writes its result, as zeros does and empty does not."""
    return "empty" not in func.__name__


def _work(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[KernelKind, int]:
    """Return what bounds an operator, and the operations of its products."""
    name = func.overloadpacket.__name__
    if name == _ONEDNN_LINEAR:
        x, weight, *_ = _tensors(args)
        return KernelKind.MATRIX, 2 * x.numel() * weight.shape[0]
    if _CPU_ATTENTION in func.__name__:
        return KernelKind.ATTENTION, _attention_flops(func, args)
    count = flop_registry.get(func.overloadpacket)
    if count is None and name in _VARLEN_ATTENTION:
        return KernelKind.ATTENTION, _varlen_flops(func, args)
    if count is None:
        return KernelKind.MEMORY, 0
    # The counters do not know the overloads that name a dtype or a result.
    positional = []
    for value in args:
        if not isinstance(value, torch.dtype):
            positional.append(value)
    named = dict(kwargs)
    named.pop("out", None)
    named.pop("out_dtype", None)
    flops = int(count(*positional, **named, out_val=out))
    kind = KernelKind.MATRIX
    if "attention" in func.__name__ or "attn" in func.__name__:
        kind = KernelKind.ATTENTION
    return kind, flops


def _attention_flops(func: Any, args: tuple[Any, ...]) -> int:
    """Return the operations of the CPU's attention: two products in forward, five in backward."""
    query, key, *_ = _tensors(args)
    products = 2
    if "backward" in func.__name__:
        _, query, key, *_ = _tensors(args)
        products = 5
    return products * 2 * int(query.numel()) * int(key.shape[-2])


def _varlen_flops(func: Any, args: tuple[Any, ...]) -> int:
    """Return the operations of attention whose segments all count as the longest, as torch counts them on meta."""
    query, *_ = args
    products = 2
    bounds = 3  # their place, after query, key and value; the longest segment follows
    if "backward" in func.__name__:
        _, query, *_ = args
        products = 5
        bounds = 6
    segments = args[bounds].numel() - 1
    longest = args[bounds + 2]
    heads = query[0].numel()  # numbers of all heads of a token
    pairs = segments * longest**2
    return int(products * 2 * heads * pairs)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    """Return the address of what several views share."""
    address: int = tensor.untyped_storage()._cdata
    return address
