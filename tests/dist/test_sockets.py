"""Sockets of a rank and its messages to the store, which a world of a thousand ranks multiplies."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import pytest

from evomesh.config.schema import Config, ParallelConfig, Zero1Config
from evomesh.parallel.exchange import default_exchange
from evomesh.parallel.start_up import simulate_start
from evomesh.train.launch import launch
from tests.support.interpreter import Interpreter
from tests.support.world_counts import open_sockets


def count_sockets() -> None:
    """Make the groups of a data-parallel run: default, data axis, and two of checkpoints."""
    with launch(Config()) as context, ExitStack() as stack:
        exchanges = [stack.enter_context(closing(default_exchange())) for _ in range(2)]
        sockets = open_sockets()
        for exchange in exchanges:
            # The groups work, and nobody leaves before the count.
            exchange.broadcast(exchange.gather(context.rank))
        print("sockets", context.rank, sockets)


def sockets_of_last_rank(interpreter: Interpreter, ranks: int, lazy: str | None) -> int:
    running = interpreter.start_ranks(
        count_sockets, ranks, env={"TORCH_GLOO_LAZY_INIT": lazy}
    )
    finished = [one.wait(60) for one in running]
    assert [one.returncode for one in finished] == [0] * ranks, "\n".join(
        one.stderr for one in finished
    )
    match = re.search(rf"sockets {ranks - 1} (\d+)", finished[-1].stdout)
    assert match, finished[-1].stdout
    return int(match[1])


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc"
)
def test_groups_do_not_connect_every_two_ranks(interpreter: Interpreter) -> None:
    """Two more ranks would add a connection to each of them in each of the four groups, eight in all.

    What the ranks send each other before the count travels along a tree, whose edges may differ.
    """
    few, many = (sockets_of_last_rank(interpreter, ranks, None) for ranks in (2, 4))
    assert many - few <= 2


def start_in_simulated_worlds() -> None:
    parallel = ParallelConfig(zero1=Zero1Config(size=8))
    counts = [
        asdict(simulate_start(parallel, ranks, rank))
        for ranks in (16, 1024)
        for rank in (0, ranks - 1)
    ]
    print(json.dumps(counts))


def test_a_rank_asks_the_store_as_often_in_a_world_of_a_thousand(
    interpreter: Interpreter,
) -> None:
    finished = interpreter.run(start_in_simulated_worlds)
    counts = json.loads(finished.stdout.splitlines()[-1])
    assert len(counts) == 4
    for kind in ("messages", "heartbeats"):
        assert len({count[kind] for count in counts}) == 1
    # Three messages introduce the rank, three read what the others wrote of themselves,
    # two are of the roll call; each group has its address, and some have a barrier.
    assert 8 < counts[0]["messages"] < 20
    assert counts[0]["heartbeats"] == 4
