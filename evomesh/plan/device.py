"""Device files: what a device and the links between devices can do, from data sheets or measured (``measure.py``)."""

from __future__ import annotations

import tomllib
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from evomesh.errors import UserError
from evomesh.plan.measured_rates import (
    ANY,
    FileTable,
    Host,
    MessageRate,
    OperatorRate,
    nearest_messages,
    operator_seconds,
)
from evomesh.user_files import read_text

if TYPE_CHECKING:
    from evomesh.plan.timeline import Kernel

_GIGA = 1e9
_TERA = 1e12
_MICRO = 1e-6
# Of an all-reduce of n ranks each byte travels twice.
_TRIPS = {"all_reduce": 2.0}


class Rates(FileTable):
    """Rates of one device: TFLOP/s of dense products by dtype, and GB/s of its memory."""

    bfloat16: float = Field(gt=0)
    float16: float = Field(gt=0)
    float32: float = Field(gt=0)
    memory: float = Field(gt=0)


class Links(FileTable):
    """GB/s of one device in one direction, and microseconds of one hop."""

    node: float = Field(gt=0)
    network: float = Field(gt=0)
    node_latency: float = Field(ge=0)
    network_latency: float = Field(ge=0)


class Efficiencies(FileTable):
    """Shares of the data sheet's rates that are reached, by kind of operation.

    The defaults are calibrated on InternEvo's 8-GPU measurements, see docs/plan.md.
    """

    matrix: float = Field(0.74, gt=0, le=1)
    attention: float = Field(0.6, gt=0, le=1)
    memory: float = Field(1.0, gt=0, le=1)
    link: float = Field(0.8, gt=0, le=1)


class Device(FileTable):
    """A kind of device and how its nodes are connected.

    Attributes:
        kind: whose code paths a rank takes.
        memory_gib: the least that torch reports of such a device; less than on its data sheet, whose GB are smaller
            and of which the driver keeps a part.
        launch: microseconds that the shortest kernel takes.
        host: processors on which the ranks themselves compute; None for GPUs.
        operators, messages: measured rates, which go before those of the data sheet.
        processes: of the world that is predicted, on one node; see ``in_world``.
    """

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    memory_gib: float = Field(gt=0)
    gpus_per_node: int = Field(gt=0)
    launch: float = Field(4.0, ge=0)
    rates: Rates
    links: Links
    efficiencies: Efficiencies = Efficiencies()
    host: Host | None = None
    operators: tuple[OperatorRate, ...] = ()
    messages: tuple[MessageRate, ...] = ()
    processes: int = Field(1, exclude=True)

    def in_world(self, world_size: int) -> Device:
        """Return the device as it is with so many ranks, which may have to share its cores."""
        on_node = min(world_size, self.gpus_per_node)
        return self.model_copy(update={"processes": on_node})

    @property
    def memory_of_rank(self) -> float:
        """Return the GiB that one rank has: those of its GPU, or its share of the machine's."""
        if self.host is None:
            return self.memory_gib
        return self.memory_gib / self.processes

    @property
    def turns(self) -> float:
        """Return how many times longer a computation takes where all ranks of a node compute."""
        return 1.0 if self.host is None else self.host.turns(self.processes)

    @property
    def hidden(self) -> float:
        """Return the share of a transfer that passes while its rank computes."""
        return 1.0 if self.host is None else self.host.hidden

    @cached_property
    def _curves(self) -> dict[tuple[str, str], list[OperatorRate]]:
        curves: dict[tuple[str, str], list[OperatorRate]] = {}
        in_order = sorted(self.operators, key=lambda curve: curve.size)
        for curve in in_order:
            key = curve.name, curve.dtype
            curves.setdefault(key, []).append(curve)
        return curves

    def measured_seconds(self, kernel: Kernel) -> float | None:
        """Return the time of a kernel alone on a core, by what was measured; None where nothing like it was."""
        of_kind = f"{kernel.kind.value} {ANY}"
        alternatives = [
            (kernel.operator, kernel.dtype),
            (kernel.operator, "float32"),
            (of_kind, kernel.dtype),
            (of_kind, "float32"),
        ]
        for key in alternatives:
            found = self._curves.get(key)
            if found is not None:
                return operator_seconds(
                    found,
                    kernel.size,
                    kernel.work,
                )
        return None

    def product_seconds(self, flops: int, dtype: str, share: float) -> float:
        """Return the time of ``flops`` at ``share`` of the rate for ``dtype``."""
        rate: float = getattr(self.rates, dtype)
        return flops / (rate * _TERA * share)

    def memory_seconds(self, nbytes: int) -> float:
        """Return the time in which memory moves ``nbytes``."""
        rate = self.rates.memory * _GIGA * self.efficiencies.memory
        return nbytes / rate

    @property
    def launch_seconds(self) -> float:
        return self.launch * _MICRO

    def transfer_seconds(
        self, operation: str, nbytes: int, ranks: int, nodes: int
    ) -> float:
        """Return the time of a collective, as a ring of its ranks takes it, or of a send.

        Args:
            nbytes: of one copy of the whole value.
            nodes: on which the ranks are, in equal parts.
        """
        measured = [rate for rate in self.messages if rate.operation == operation]
        if measured and nodes == 1 and ranks > 1:
            rate = nearest_messages(measured, ranks, self.processes)
            return rate.message_seconds(nbytes)
        # In a ring each rank passes on all parts but one. A ring over several nodes
        # crosses their borders by as many ports as it has ranks in a node.
        links = self.links
        bandwidth = links.node
        latency = links.node_latency
        if nodes > 1:
            ports = max(ranks // nodes, 1)
            through_ports = ports * links.network
            bandwidth = min(bandwidth, through_ports)
            latency = links.network_latency
        bytes_a_second = bandwidth * _GIGA * self.efficiencies.link
        hop = latency * _MICRO
        if operation in ("send", "recv"):
            return nbytes / bytes_a_second + hop
        trips = _TRIPS.get(operation, 1.0)
        passed_on = nbytes * (ranks - 1) / ranks
        # The parts of a ring are pipelined: the hops of a tree are what delays them.
        others = max(ranks - 1, 1)
        hops = others.bit_length()
        one_trip = passed_on / bytes_a_second + hops * hop
        return trips * one_trip


def device_names() -> list[str]:
    """Return the names of the devices that come with the package."""
    folder = files("evomesh.plan") / "devices"
    names = []
    for file in folder.iterdir():
        if file.name.endswith(".toml"):
            names.append(file.name.removesuffix(".toml").upper())
    return sorted(names)


def load_device(name: str) -> Device:
    """Return a device of the package by its name, or the one that a TOML file describes.

    Raises:
        UserError: no such name or file, or a file that describes no device.
    """
    known = device_names()
    if name.upper() in known:
        resource = files("evomesh.plan") / "devices" / f"{name.lower()}.toml"
        return _parse(resource.read_text(encoding="utf-8"), name)
    if not name.endswith(".toml"):
        raise UserError(
            f"no device {name}",
            where="--device",
            expected=f"one of {', '.join(known)}, or a .toml file",
            code="EVO-PLAN-001",
        )
    text = read_text(Path(name), "--device")
    return _parse(text, name)


def _parse(text: str, name: str) -> Device:
    try:
        table: dict[str, Any] = tomllib.loads(text)
        return Device.model_validate(table)
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"{name} is not TOML: {error}",
            where="--device",
            expected="a device file",
            code="EVO-PLAN-001",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{name}: {key}: {first['msg']}",
            where="--device",
            expected="a device file like those of evomesh/plan/devices",
            code="EVO-PLAN-001",
        ) from error
