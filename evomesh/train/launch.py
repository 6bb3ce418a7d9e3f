"""Start of a process: from the launcher's environment variables to this rank's grid and device."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import numpy as np
import torch
from rich.console import Console

from evomesh.config.layout import check_world, run_parallel, run_sizes, zero_note
from evomesh.config.schema import Config
from evomesh.monitor.log import ALL_RANKS, setup_logging
from evomesh.monitor.run_folder import start_of_new_folder
from evomesh.parallel.build import build_grid
from evomesh.parallel.device import device_of_rank
from evomesh.parallel.exchange import default_exchange
from evomesh.parallel.grid import Grid
from evomesh.parallel.hang_watch import HangWatch
from evomesh.parallel.modes import MODES, TensorMode
from evomesh.parallel.peer_watch import PeerWatch
from evomesh.parallel.process_group import first_ranks_number, join_world, leave_world
from evomesh.parallel.rank_process import RankProcess
from evomesh.parallel.rendezvous import second_connection
from evomesh.train.agreement import config_facts, require_agreement
from evomesh.train.allocator import use_expandable_segments
from evomesh.train.busy_machine import others_at_work
from evomesh.train.determinism import enable_determinism
from evomesh.train.job import explain_to_peers
from evomesh.train.launchers import ProcessInfo, detect, idle_tasks
from evomesh.train.signals import StopRequest
from evomesh.watchdog.diagnosis import HangLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """A rank's knowledge of itself and the run.

    Attributes:
        grid: the process groups of this rank.
        device: the device this rank computes on.
        mode: how activations and weights are sharded over the tensor axis.
        started: when the run started; the same on every rank.
        local_rank: number of this rank on its host.
    """

    grid: Grid
    device: torch.device
    mode: TensorMode
    rank: int
    world_size: int
    started: datetime
    local_rank: int = 0


@contextmanager
def launch(
    config: Config,
    launcher: str = "auto",
    *,
    port: int = 8888,
    before_end: Callable[[str], None] | None = None,
    before_hang_ends: Callable[[str], None] | None = None,
    console: Console | None = None,
) -> Iterator[RunContext]:
    """Join the other ranks, if there are any, and leave them at the end of the context.

    Args:
        console: where the log is shown; standard output by default.
        before_end: called with a sentence, on another thread, before this process is ended because a rank is gone.
        before_hang_ends: called likewise because a rank is stuck, on the one rank that logs it.

    Raises:
        UserError: the launcher's variables are missing or wrong, or the layout does not fit the number of processes;
            both are checked before the ranks meet. Or the ranks cannot meet, or differ in config or code. An error
            inside the context is raised on every rank, as the sentence that names the first rank that had one.
    """
    # 1. What this process can check alone.
    process = detect(os.environ, launcher, port)
    is_first = process.rank == 0
    setup_logging(shows=is_first, console=console)  # until the run folder is known
    warnings = check_world(config, process.world_size)
    warnings += idle_tasks(os.environ, process)
    device = _prepare_device(config, process)
    warnings += others_at_work(device)

    # 2. Meet the others. From here on an error of one rank ends all of them.
    request = StopRequest.installed()
    watch = join_world(
        device,
        process.address,
        lambda: request is not None and request.signal is not None,
        config.parallel.collective_timeout,
    )
    hang_watch = _watch_for_hangs(config, process, watch, before_hang_ends)
    try:
        if watch is not None:
            watch.before_end = before_end
            _agree_before_the_start(config, watch, request)
        if is_first:
            _log_layout(config, process, warnings)
        yield _start_run(config, process, device)
    except BaseException as error:
        if watch is None:
            hang_watch.close()
            raise
        reported = explain_to_peers(error, watch)
        hang_watch.close()
        if reported is error:
            raise
        raise reported from error

    # 3. All went well: nobody leaves while another still needs it.
    hang_watch.close()
    _leave(device, watch)


def _leave(device: torch.device, watch: PeerWatch | None) -> None:
    """Leave the other ranks; the command line on a CPU ends in its groups.

    gloo aborts a process (``state_ <= CONNECTED`` in its pair.cc) that destroys a group
    in the moment in which it notices that a peer has done so, and all ranks come here
    together. ``evomesh.cli.run`` ends a process that is still in a group at once.
    """
    is_command_line = StopRequest.installed() is not None
    if device.type != "cpu" or not is_command_line:
        leave_world()
    if watch is not None:
        watch.sign_off()


def _prepare_device(config: Config, process: ProcessInfo) -> torch.device:
    """Return this rank's device, with torch set up as the config asks."""
    use_expandable_segments()
    device = device_of_rank(process.local_rank)
    torch.backends.cudnn.benchmark = config.run.cudnn_benchmark
    torch.backends.cudnn.deterministic = config.run.cudnn_deterministic
    if config.run.deterministic:
        enable_determinism()
    return device


def _log_layout(config: Config, process: ProcessInfo, warnings: list[str]) -> None:
    for warning in warnings:
        logger.warning(warning)
    note = zero_note(config, process.world_size)
    if note is not None:
        logger.info(note)
    sizes = run_sizes(config, process.world_size)
    logger.info(
        f"Distributed environment is initialized, data parallel size: {sizes.dp}, "
        f"pipeline parallel size: {sizes.pp}, tensor parallel size: {sizes.tp}",
        stacklevel=2,  # InternEvo's line names launch
    )


def _watch_for_hangs(
    config: Config,
    process: ProcessInfo,
    watch: PeerWatch | None,
    before_end: Callable[[str], None] | None,
) -> HangWatch:
    """Start to record what this rank does, for the watcher of its host, unless the config has it off."""
    ranks = {0: RankProcess.of_this_one()}
    if watch is not None:
        ranks = watch.processes
    hang_watch = HangWatch(
        process.rank,
        ranks,
        hang_limits(config),
        open_store=partial(second_connection, process.address),
        host_of_leader=process.host,
        before_end=before_end,
    )
    if config.monitor.watchdog.enable:
        hang_watch.start()
    return hang_watch


def hang_limits(config: Config) -> HangLimits:
    """Return when a rank of this run counts as stuck."""
    settings = config.monitor.watchdog
    return HangLimits(settings.silence, settings.steps, settings.long_phase)


def _agree_before_the_start(
    config: Config, watch: PeerWatch, request: StopRequest | None
) -> None:
    """Refuse ranks that differ, before groups are made of them."""
    if request is not None:
        request.before_end = watch.announce_and_linger
    with closing(default_exchange()) as exchange:
        require_agreement(exchange, config_facts(config))


def _start_run(
    config: Config, process: ProcessInfo, device: torch.device
) -> RunContext:
    """Build the grid, log the start lines and seed the generators."""
    rank, world_size = process.rank, process.world_size
    parallel = run_parallel(config, world_size)
    grid = build_grid(parallel, world_size, rank)
    start = start_of_new_folder(config.run, time.time())
    started = datetime.fromtimestamp(first_ranks_number(start))
    set_seed(config.run.seed, rank)
    logger.info(
        f"===========New Run {started:%b%d_%H-%M-%S} on host:{socket.gethostname()},"
        f"tp:{grid.tp.rank},pp={grid.pp.rank},dp={grid.dp.rank}===========",
        extra=ALL_RANKS,
    )
    mode = MODES[config.parallel.tensor.mode]
    return RunContext(grid, device, mode, rank, world_size, started, process.local_rank)


def set_seed(seed: int, rank: int) -> None:
    """Seed every generator, for custom models: weights and data do not draw from them.

    See invariants 9 and 10 in docs/architecture.md.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if rank == 0:
        logger.info(
            f"initialized seed on rank {rank}, numpy: {seed}, python random: {seed}, ParallelMode.DATA: {seed}, "
            f"ParallelMode.TENSOR: {seed},the default parallel seed is ParallelMode.DATA."
        )
