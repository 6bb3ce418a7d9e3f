"""Published speeds beside those that ``evomesh plan`` predicts, as a table."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evomesh.config.loader import load_config
from evomesh.config.schema import Config
from evomesh.plan.device import Device, load_device
from evomesh.plan.layout_choice import choice_of
from evomesh.plan.layout_predictor import PartsPredictor
from evomesh.plan.step_time import StepTime

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class PublishedRow:
    """One published speed, in tokens per second and GPU.

    Attributes:
        is_calibrated: the efficiencies were chosen by it.
    """

    source: str
    name: str
    gpus: int
    config: Config
    device: Device
    published: float
    is_calibrated: bool

    def predict(self) -> StepTime:
        """Predict its step as a search does, from traces of a few layers."""
        predictor = PartsPredictor(self.config, self.gpus, self.device)
        layout = choice_of(self.config, self.gpus)
        return predictor.step_time(layout)


def published_rows() -> Iterator[PublishedRow]:
    """Yield the rows of published_steps.toml."""
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    for source, table in tables.items():
        device = load_device(table["device"])
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
            )


def main() -> None:
    print("| source | layout | GPUs | published | predicted | difference | used |")
    print("|---|---|--:|--:|--:|--:|---|")
    for row in published_rows():
        predicted = row.predict().tokens_per_second
        difference = predicted / row.published - 1
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


if __name__ == "__main__":
    main()
