"""Published speeds beside those that ``evomesh plan`` predicts, as a table.

A row is predicted for the program that was measured. InternEvo updates each parameter on
one rank of the zero1 axis and broadcasts it from there, where this program gathers many
at once: the bytes are the same, but each broadcast goes through the whole ring.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evomesh.config.loader import load_config
from evomesh.config.schema import Config
from evomesh.plan.device import Device, load_device
from evomesh.plan.layout_choice import choice_of
from evomesh.plan.layout_predictor import PartsPredictor
from evomesh.plan.layout_sizes import LayoutSizes
from evomesh.plan.simulate import AxisPlacement
from evomesh.plan.trace import built_rank

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class PublishedRow:
    """One published speed, in tokens per second and GPU.

    Attributes:
        is_calibrated: the efficiencies were chosen by it.
        broadcasts: each parameter is updated by one rank, and broadcast.
    """

    source: str
    name: str
    gpus: int
    config: Config
    device: Device
    published: float
    is_calibrated: bool
    broadcasts: bool

    def predict(self) -> float:
        """Predict its tokens per second and GPU as a search does, from traces of a few layers."""
        predictor = PartsPredictor(self.config, self.gpus, self.device)
        layout = choice_of(self.config, self.gpus)
        step = predictor.step_time(layout)
        seconds = step.seconds
        if self.broadcasts:
            sizes = predictor.sizes(layout)
            seconds += self._broadcast_delay(sizes)
        return step.tokens / seconds / step.ranks

    def _broadcast_delay(self, sizes: LayoutSizes) -> float:
        """Return how much longer broadcasts from each rank with parameters take than one gather."""
        zero = sizes.placements()["zero"]
        with built_rank(self.config, self.gpus, 0) as (_, stages, _):
            parameters = len(stages.parameters())
        owners = min(parameters, zero.ranks)
        return owners * ring_seconds(self.device, zero)


def ring_seconds(device: Device, place: AxisPlacement) -> float:
    """Return how long a byte takes through a ring that enters each node once."""
    links = device.links
    between_nodes = place.nodes - 1
    inside = place.ranks - place.nodes
    hops = between_nodes * links.network_latency
    hops += inside * links.node_latency
    return hops / 1e6


def published_rows() -> Iterator[PublishedRow]:
    """Yield the rows of published_steps.toml."""
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    for source, table in tables.items():
        name = table["device"]
        is_file = name.endswith(".toml")
        device = load_device(str(ROOT / name) if is_file else name)
        path = str(ROOT / table["config"])
        for row in table["rows"]:
            overrides = [*table.get("set", []), *row["set"]]
            overrides.append("hybrid_zero_optimizer.overlap_sync_grad=True")
            yield PublishedRow(
                source=source,
                name=row["name"],
                gpus=row["gpus"],
                config=load_config(path, overrides).config,
                device=device,
                published=row["published"],
                is_calibrated=row.get("calibrated", False),
                broadcasts=table.get("broadcasts", False),
            )


def main() -> None:
    print("| source | layout | GPUs | published | predicted | difference | used |")
    print("|---|---|--:|--:|--:|--:|---|")
    errors = []
    for row in published_rows():
        predicted = row.predict()
        difference = predicted / row.published - 1
        if not row.is_calibrated:
            errors.append(abs(difference))
        note = "to calibrate" if row.is_calibrated else ""
        cells = [
            row.source,
            row.name,
            str(row.gpus),
            f"{row.published:,.0f}",
            f"{predicted:,.0f}",
            f"{difference:+.1%}",
            note,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    median = statistics.median(errors)
    print(f"\nmedian of the {len(errors)} rows not used to calibrate: {median:.1%}")


if __name__ == "__main__":
    main()
