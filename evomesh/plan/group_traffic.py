"""Groups of a layout, and what a rank sends in each of them in a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from evomesh.config.layout import run_sizes
from evomesh.config.schema import Config
from evomesh.parallel.build import axis_members
from evomesh.plan.device import Device
from evomesh.plan.step_time import (
    FIRST,
    LAST,
    UPDATE,
    RankTimeline,
    axis_placements,
)
from evomesh.plan.timeline import Event, Transfer


@dataclass(frozen=True)
class AxisGroups:
    """The groups of one axis: rank r is with those ``distance`` apart, ``size`` of them.

    Attributes:
        count: groups of the axis in the world.
        nodes: on which the ranks of the first group are.
    """

    name: str
    distance: int
    size: int
    count: int
    nodes: int


@dataclass
class GroupTraffic:
    """Calls of one operation on one axis by one rank in a step.

    Attributes:
        nbytes: of one copy of the whole values.
        seconds: in which its communicator is busy.
    """

    operation: str
    axis: str
    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


def groups_of(config: Config, world_size: int, device: Device) -> list[AxisGroups]:
    """Return the axes of a layout that have more than one rank."""
    sizes = run_sizes(config, world_size)
    places = axis_placements(config, world_size, 0, device)
    found = []
    for name, members in axis_members(sizes, 0).items():
        size = len(members)
        if size == 1:
            continue
        groups = AxisGroups(
            name=name,
            distance=members[1] - members[0],
            size=size,
            count=world_size // size,
            nodes=places[name].nodes,
        )
        found.append(groups)
    return found


def step_traffic(
    traced: RankTimeline, config: Config, world_size: int, rank: int, device: Device
) -> list[GroupTraffic]:
    """Return what a rank sends and receives in a step, by axis and operation."""
    places = axis_placements(config, world_size, rank, device)
    timeline = traced.timeline
    rows: dict[tuple[str, str], GroupTraffic] = {}

    def add(events: Iterable[Event], times: int) -> None:
        for event in events:
            if not isinstance(event, Transfer):
                continue
            call = event.call
            place = places[call.axis]
            seconds = device.transfer_seconds(
                call.operation,
                call.nbytes,
                place.ranks,
                place.nodes,
            )
            key = call.axis, call.operation
            row = rows.setdefault(
                key,
                GroupTraffic(call.operation, call.axis),
            )
            row.calls += times
            row.nbytes += times * call.nbytes
            row.seconds += times * seconds

    # All micro-batches but the last are like the first.
    others = config.data.micro_num - 1
    add(timeline.part(FIRST), others)
    add(timeline.part(LAST), 1)
    add(timeline.part(UPDATE), 1)
    in_order = sorted(rows)
    return [rows[key] for key in in_order]
