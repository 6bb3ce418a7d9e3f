"""Count what a rank of a data-parallel run asks of the others: sockets, host collectives, messages to the store.

    python benchmarks/world.py [--ranks 8 64] [--simulated 64 1024]

The first table starts so many processes on this machine, each of which trains a tiny model with the code of ``evomesh
train``, and counts in each. Collectives of the host carry objects and JSON; all others carry tensors, which are on the
device if there is one. The second table runs the start of one rank whose others are simulated, and traces its step on a
device in a world of torch's fake backend. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from evomesh import load_config, run_training
from evomesh.config.loader import LoadedConfig
from evomesh.monitor.metrics import StepRecord
from evomesh.parallel.start_up import simulate_start
from evomesh.plan.trace import trace
from evomesh.train.report import RunReporter
from tests.support.interpreter import Finished, Interpreter
from tests.support.world_counts import counting_world

STEPS = 3
WAIT_S = 900
CONFIG = f"""
JOB_NAME = "world"
model_type = "LLAMA2"
model = dict(
    num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=64, multiple_of=8, dtype="torch.float32",
)
data = dict(seq_len=16, micro_bsz=1, micro_num=1, total_steps={STEPS}, train_folder=None)
lr_scheduler = dict(total_steps={STEPS})
parallel = dict(zero1=dict(size=8))
ckpt = dict(enable_save_ckpt=False)
run_dir = "run"
"""

Counts = dict[str, int]


def train_and_count(path: str) -> None:
    """Train as one rank, and print its counts after each step."""
    with counting_world() as counts:
        write = RunReporter.write

        def write_and_count(reporter: RunReporter, record: StepRecord) -> None:
            write(reporter, record)
            print("counts", json.dumps(counts.now()), flush=True)

        with patch.object(RunReporter, "write", write_and_count):
            run_training(load_config(path))


def counts_of_rank(finished: Finished) -> list[Counts]:
    """Return the counts that one rank printed, a row for each step."""
    rows = []
    for line in finished.stdout.splitlines():
        if line.startswith("counts "):
            row = json.loads(line.removeprefix("counts "))
            rows.append(row)
    return rows


def run_world(ranks: int, path: Path) -> list[list[Counts]]:
    """Train with so many processes, and return the counts of each."""
    with closing(Interpreter()) as interpreter:
        command = partial(train_and_count, str(path))
        started = interpreter.start_ranks(command, ranks, cwd=path.parent)
        finished = [rank.wait(WAIT_S) for rank in started]
    failed = [one for one in finished if one.returncode]
    if failed:
        raise SystemExit(failed[0].stdout[-2000:] + failed[0].stderr[-2000:])
    return [counts_of_rank(one) for one in finished]


def measured(loaded: LoadedConfig, sizes: Sequence[int]) -> Table:
    """Return the table of worlds of processes. Of each count the highest of all ranks but 0, and rank 0's."""
    columns = ("sockets", "store: start", "a step", "host: start", "a step")
    table = Table("ranks", *columns, title="processes: most of a rank (rank 0)")
    for ranks in sizes:
        by_rank = run_world(ranks, Path(loaded.path))
        cells = []
        for kind in ("sockets", "store", "host"):
            at_start = [rows[0][kind] for rows in by_rank]
            cells.append(f"{max(at_start[1:])} ({at_start[0]})")
            in_step = [rows[-1][kind] - rows[-2][kind] for rows in by_rank]
            if kind != "sockets":
                cells.append(f"{max(in_step[1:])} ({in_step[0]})")
        table.add_row(str(ranks), *cells)
    return table


def simulated(loaded: LoadedConfig, sizes: Sequence[int]) -> Table:
    """Return the table of single ranks whose others are simulated."""
    columns = ("store: groups made", "heartbeats, a second", "tensors: a step")
    table = Table("ranks", *columns, title="the last rank, its others simulated")
    for ranks in sizes:
        counts = simulate_start(loaded.config.parallel, ranks, ranks - 1)
        in_step = len(trace(loaded.config, ranks).traffic.calls)
        row = (ranks, counts.messages, counts.heartbeats, in_step)
        table.add_row(*map(str, row))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--simulated", type=int, nargs="+", default=[64, 1024])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.py")
        path.write_text(CONFIG)
        loaded = load_config(path)
        console = Console()
        console.print(simulated(loaded, options.simulated))
        console.print(measured(loaded, options.ranks))


if __name__ == "__main__":
    main()
