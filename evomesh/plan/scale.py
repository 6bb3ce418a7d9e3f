"""Growth of a run's costs with the number of its ranks: start, checkpoints, pipeline, stragglers, failures.

The layout of the config stays, and only data parallelism grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomesh.config.layout import AxisSizes, check_world, run_sizes
from evomesh.config.schema import Config
from evomesh.config.size import tokens_per_step
from evomesh.errors import UserError
from evomesh.parallel.build import axis_members, pipeline_ends
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.start_up import StartCounts, simulate_start
from evomesh.plan.checkpoint_scale import CheckpointScale, checkpoint_scale
from evomesh.plan.failures import FailureModel, seconds_between_failures
from evomesh.plan.pipeline_time import StageSeconds, pipeline_seconds
from evomesh.plan.step_time import action_order
from evomesh.plan.stragglers import StepJitter

# To the store on rank 0: of the main thread, the heartbeat and its guard.
CONNECTIONS = 3
# Of a stage, where only their ratio counts: backward has twice the products.
_STAGE = StageSeconds(forward=1.0, backward=2.0)


@dataclass(frozen=True)
class ScaleAssumptions:
    """Assumptions that no config has.

    Attributes:
        jitter: of the time of a rank for a step.
        device_hours: mean time between failures of one device.
        save_rate: bytes a second at which training waits for a rank's part of a checkpoint.
        restart: seconds from a failure until training continues.
        tokens: of a step, for the bubble at a constant batch; None: those of each world.
    """

    jitter: StepJitter
    device_hours: float
    save_rate: float
    restart: float
    tokens: int | None = None


@dataclass(frozen=True)
class WorldScale:
    """Costs of a run of one size.

    Attributes:
        groups: process groups of all ranks.
        groups_of_rank: those that a rank is in, at most.
        start: what the last rank asks of the store.
        bubble: share of a step in which a stage waits for others, of a pipeline with equal stages.
        constant_bubble: the same with the tokens of a step held constant; None where they do not divide.
        slowest: expected time of the slowest rank for a step, over that of one rank.
    """

    ranks: int
    data_parallel: int
    tokens: int
    groups: int
    groups_of_rank: int
    start: StartCounts
    checkpoint: CheckpointScale
    bubble: float
    constant_bubble: float | None
    slowest: float
    failures: FailureModel

    @property
    def lost_share(self) -> float:
        """Share of the run's time lost to failures and checkpoints, at the best interval."""
        return self.failures.lost_share(self.failures.daly)


def fitting_sizes(config: Config, sizes: Sequence[int]) -> list[int]:
    """Return the numbers of ranks that the layout divides.

    Raises:
        UserError: none; the first one's reason.
    """
    fitting = []
    first: UserError | None = None
    for ranks in sizes:
        try:
            check_world(config, ranks)
        except UserError as error:
            first = first or error
            continue
        fitting.append(ranks)
    if not fitting and first is not None:
        raise first
    return fitting


def world_scale(
    config: Config, world_size: int, assumptions: ScaleAssumptions
) -> WorldScale:
    """Predict the costs of a run of one size.

    Raises:
        UserError: the layout does not fit.
    """
    check_world(config, world_size)
    sizes = run_sizes(config, world_size)
    world = world_ranks(sizes, world_size)
    checkpoint = checkpoint_scale(config, world_size, world.grids)
    last = world_size - 1
    start = simulate_start(config.parallel, world_size, last)
    failures = FailureModel(
        between=seconds_between_failures(assumptions.device_hours, world_size),
        stall=checkpoint.largest_file / assumptions.save_rate,
        restart=assumptions.restart,
    )
    return WorldScale(
        ranks=world_size,
        data_parallel=sizes.dp,
        tokens=tokens_per_step(config, sizes.dp),
        groups=world.groups,
        groups_of_rank=world.groups_of_rank,
        start=start,
        checkpoint=checkpoint,
        bubble=bubble_share(config, world_size, config.data.micro_num),
        constant_bubble=_constant_bubble(config, world_size, assumptions.tokens),
        slowest=assumptions.jitter.slowest_of(world_size),
        failures=failures,
    )


@dataclass(frozen=True)
class WorldRanks:
    """All ranks of a world, and how many process groups they make.

    Attributes:
        groups: of all ranks; axes with the same ranks share one.
        groups_of_rank: the most that one rank is in.
    """

    grids: list[Grid]
    groups: int
    groups_of_rank: int


def world_ranks(sizes: AxisSizes, world_size: int) -> WorldRanks:
    """Compute the axes through every rank, as ``build_grid`` does for one."""
    grids = []
    groups = set()
    most = 0
    for rank in range(world_size):
        members_of = axis_members(sizes, rank)
        members_of["ends"] = pipeline_ends(sizes, rank)
        axes = {}
        own = set()
        for name, members in members_of.items():
            size = len(members)
            axes[name] = Axis(name, size, members.index(rank))
            if size > 1:
                # Arithmetic sequences: these three numbers tell them apart.
                group = members[0], members[-1], size
                own.add(group)
        grid = Grid(**axes)
        grids.append(grid)
        groups |= own
        most = max(most, len(own))
    return WorldRanks(grids, len(groups), most)


def bubble_share(config: Config, world_size: int, micro_batches: int) -> float:
    """Return the share of a step in which a stage waits for others, in a pipeline of equal stages."""
    pipeline = config.parallel.pipeline.size
    if pipeline == 1:
        return 0.0
    data = config.data.model_copy(
        update={"micro_num": micro_batches},
    )
    changed = config.model_copy(
        update={"data": data},
    )
    order = action_order(changed, world_size)
    count = pipeline * config.model.num_chunks
    stages = [_STAGE] * count
    seconds = pipeline_seconds(order, stages, hop=0.0)
    busy = 0.0
    for action in order[0]:
        busy += _STAGE.of(action.kind)
    return 1 - busy / seconds


def _constant_bubble(
    config: Config, world_size: int, tokens: int | None
) -> float | None:
    """Return the bubble where a step has ``tokens`` in a world of every size."""
    data_parallel = run_sizes(config, world_size).dp
    of_micro_batch = config.data.packed_length * data_parallel
    if tokens is None:
        return None
    micro_batches, rest = divmod(tokens, of_micro_batch)
    if micro_batches == 0 or rest:
        return None
    try:
        return bubble_share(config, world_size, micro_batches)
    except ValueError:
        return None  # the schedule needs another number of micro-batches
