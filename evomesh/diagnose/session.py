"""The ranks of a job together, for checks: as for a run, but nobody is refused for being different."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from evomesh.config.layout import check_world, run_parallel
from evomesh.config.schema import Config
from evomesh.parallel.build import build_grid
from evomesh.parallel.device import device_of_rank
from evomesh.parallel.exchange import Exchange, default_exchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.process_group import join_world, leave_world
from evomesh.train.job import explain_to_peers
from evomesh.train.launchers import ProcessInfo, detect

LIMIT_S = 120.0  # of a collective: a check that hangs is not worth a run's patience


@dataclass(frozen=True)
class Session:
    """One rank among those that are checked together.

    Attributes:
        warnings: of the layout, such as a size that has no effect.
    """

    process: ProcessInfo
    device: torch.device
    grid: Grid
    exchange: Exchange
    warnings: list[str]

    @property
    def met_at(self) -> str:
        """Return the address where the ranks met, "" for one process."""
        return str(self.process.address) if self.process.world_size > 1 else ""


@contextmanager
def session(config: Config, launcher: str, port: int) -> Iterator[Session]:
    """Join the other ranks, and leave them at the end of the ``with`` block.

    Raises:
        UserError: the layout does not fit the number of processes, or the ranks cannot
            meet. An error inside the block ends all ranks, as in a run.
    """
    # Ranks that never come are noticed soon: a check that waits as long as a run would
    # is of no use.
    process = detect(os.environ, launcher, port)
    warnings = check_world(config, process.world_size)
    device = device_of_rank(process.local_rank)
    limit = min(config.parallel.timeout or LIMIT_S, LIMIT_S)
    parallel = run_parallel(config, process.world_size).model_copy(
        update={"timeout": limit}
    )
    watch = join_world(device, process.address, timeout=parallel.collective_timeout)
    try:
        grid = build_grid(parallel, process.world_size, process.rank)
        exchange = default_exchange()
        yield Session(process, device, grid, exchange, warnings)
        exchange.close()
    # The other ranks wait in a collective: they get the reason before this one ends.
    except BaseException as error:
        if watch is None:
            raise
        reported = explain_to_peers(error, watch)
        if reported is error:
            raise
        raise reported from error
    leave_world()
    if watch is not None:
        watch.sign_off()
