"""One layout against one process: every rank trains its part and the whole, and the ranks find the first difference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from evomesh.config.schema import Config
from evomesh.diagnose.parity.compare import BOUNDS, Comparison, Difference, compare
from evomesh.diagnose.parity.observe import Observations, observe
from evomesh.diagnose.parity.shrink import in_one_process
from evomesh.parallel.exchange import Exchange
from evomesh.parallel.grid import Grid


@dataclass(frozen=True)
class Parity:
    """Distance of a layout from one process, the same on every rank.

    Attributes:
        dtype: in which both computed.
        bound: largest distance that passes.
        compared: number of tensors, over all ranks.
        largest: distance among these.
        first: the first tensor beyond the bound, None if all are within it.
    """

    dtype: str
    bound: float
    compared: int
    largest: float
    first: Difference | None

    @property
    def is_equal(self) -> bool:
        return self.first is None

    def describe(self) -> str:
        """Return what was compared, and the first tensor that differs, as one sentence."""
        if self.first is not None:
            return f"{self.dtype}: first to differ is {self.first.describe()} (bound {self.bound:g})"
        return f"{self.dtype}: {self.compared} tensors agree, at most {self.largest:.1e} apart (bound {self.bound:g})"


def train_alone(small: Config, grid: Grid, device: torch.device) -> Observations:
    """Train two steps in this process alone, with the packs of all ranks of ``grid``; without any communication.

    Raises:
        UserError: the model cannot be built.
    """
    return observe(in_one_process(small, grid.dp.size), Grid(), device)


def compare_with(
    whole: Observations,
    small: Config,
    grid: Grid,
    device: torch.device,
    exchange: Exchange,
) -> Parity:
    """Train two steps in the layout of ``grid`` and compare with ``whole``; every rank calls it.

    Each rank has the whole itself (``train_alone``), so that it needs no tensor of
    another rank to compare with.

    Args:
        small: a config in small (``shrink``) with the layout of ``grid``.

    Raises:
        UserError: the model cannot be built in this layout.
    """
    bound = BOUNDS[small.model.dtype]
    own = observe(small, grid, device)
    found = compare(own, whole, grid, exchange.rank, bound)
    return _of_all_ranks(exchange, small.model.dtype, found)


def compare_dtypes(config: Config) -> list[str]:
    """Return the dtypes to compare in: float64, which leaves no doubt, then the config's own."""
    return list(dict.fromkeys(["float64", config.model.dtype]))


def _of_all_ranks(exchange: Exchange, dtype: str, found: Comparison) -> Parity:
    gathered = exchange.gather(asdict(found))
    message: Any = None
    if gathered is not None:
        message = _joined(gathered)
    joined = exchange.broadcast(message)
    first = joined["first"]
    return Parity(
        dtype=dtype,
        bound=BOUNDS[dtype],
        compared=joined["compared"],
        largest=joined["largest"],
        first=None if first is None else Difference(**first),
    )


def _joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the findings of all ranks as one, with the first difference of any."""
    compared = 0
    largest = 0.0
    differences = []
    for rank in ranks:
        compared += rank["compared"]
        largest = max(largest, rank["largest"])
        fields = rank["first"]
        if fields is not None:
            difference = Difference(**fields)
            differences.append(difference)
    first = None
    if differences:
        first = asdict(min(differences))
    return {"compared": compared, "largest": largest, "first": first}
