"""Bits per byte over time: the demo's recipe against a plain transformers Llama with AdamW and cosine.

Run: python benchmarks/learning.py --data DEMO_FOLDER [--minutes 5] [--seeds 3] [--threads 2] [--output learning.jsonl]
     [--recipes evomesh "evomesh, half the time" "optimizer.type=adamw" ...] [--pace SECONDS [--jobs 2]]

Both train for a fixed time on the token files of tools/demo_data.py, on as many threads, with equally many parameters,
and are scored on the same held-out text in segments of the same length. The baseline trains on documents laid end to
end and cut into rows, with the demo's number of tokens in a step; its learning rate is the best of three, each tried
with seed 0 for a fraction of the time (--search). Rates follow the time that has passed, so that every schedule ends
with the time. The clock stops while the held-out text is scored.

A recipe is a name of RECIPES, or settings of configs/demo.py separated by spaces. Runs that the output file holds are
not done again. With --pace each recipe is first timed for so many seconds on all threads, by turns with the baseline,
which wants an idle machine; a step of the long runs then counts as the median time of a step there. So these may share
a busy machine, --jobs at a time with their share of the threads, without a change of their figures. Prints tables in
Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.learning_sides import EvomeshSide, Recipe, Side, TransformersSide

BASELINE = "transformers, AdamW, cosine"
BASELINE_RATES = (5e-4, 1e-3, 2e-3)
# The first steps of a side allocate its memory.
UNTIMED_STEPS = 5


RECIPES = {
    "evomesh": Recipe(),
    "evomesh, half the time": Recipe(time_share=0.5),
    "AdamW": Recipe(("optimizer.type=adamw",)),
    "AdamW, half the time": Recipe(("optimizer.type=adamw",), time_share=0.5),
    "3 iterations": Recipe(("optimizer.ns_steps=3",)),
    "rate 4e-3": Recipe(("adam.lr=4e-3",)),
    "linear to 0": Recipe(("lr_scheduler.type=linear", "lr_scheduler.eta_min=0")),
    "WSD": Recipe(
        (
            "lr_scheduler.type=wsd",
            "lr_scheduler.decay_ratio=0.4",
            "lr_scheduler.decay_type=1-sqrt",
            "lr_scheduler.eta_min=0",
        )
    ),
    "512 tokens a step": Recipe(("data.micro_bsz=1",)),
    "2048 tokens a step": Recipe(("data.micro_bsz=4",)),
    "512 to 2048 tokens a step": Recipe(
        ("data.micro_bsz=1",),
        phases=((0.3, ("data.micro_bsz=2",)), (0.7, ("data.micro_bsz=4",))),
    ),
    "segments of 128, then 512": Recipe(
        phases=(
            (0.0, ("data.seq_len=128", "data.micro_bsz=8")),
            (0.5, ("data.seq_len=512", "data.micro_bsz=2")),
        ),
    ),
    "bfloat16": Recipe(("model.dtype=torch.bfloat16",)),
    "norms of queries and keys": Recipe(("model_type=QWEN3",)),
    "one matrix for embedding and head": Recipe(("model.tie_word_embeddings=True",)),
    "embedding begins at 0.005": Recipe(("model.embedding_init_std=0.005",)),
}


@dataclass(frozen=True)
class Job:
    """A run: everything that its figures depend on.

    Attributes:
        lr: the baseline's learning rate; None: the recipe's own.
        points: how often the held-out text is scored.
        pace: the seconds that a step counts as; None: those that it takes.
    """

    recipe: str
    lr: float | None
    seed: int
    seconds: float
    threads: int
    points: int
    pace: float | None = None


class Clock:
    """Counts the seconds of training: those of a watch, or a fixed number for each step."""

    def __init__(self, pace: float | None) -> None:
        self.pace = pace
        self.steps = 0
        self.start = time.perf_counter()

    def seconds(self) -> float:
        if self.pace is not None:
            return self.steps * self.pace
        return time.perf_counter() - self.start

    def leave_out(self, since: float) -> None:
        """Leave out what has happened since a reading of `time.perf_counter`."""
        self.start += time.perf_counter() - since


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name, or that of settings separated by spaces."""
    if name in RECIPES:
        return RECIPES[name]
    if "=" not in name:
        raise SystemExit(
            f"no recipe {name!r}: one of {', '.join(RECIPES)}, or KEY=VALUE"
        )
    return Recipe(tuple(name.split()))


def run_job(job: Job, data: str) -> dict[str, object]:
    """Train for the time of a job and return its curve: seconds, steps, tokens, bits per byte of each set."""
    torch.set_num_threads(job.threads)
    side: Side
    if job.lr is not None:
        side = TransformersSide(job.lr, job.seed, data)
    else:
        side = EvomeshSide(find_recipe(job.recipe), job.seed, data)
    clock = Clock(job.pace)
    tokens = 0
    curve: list[dict[str, object]] = []
    while len(curve) < job.points:
        seconds = clock.seconds()
        if seconds >= job.seconds * (len(curve) + 1) / job.points:
            since = time.perf_counter()
            figures = {"seconds": seconds, "steps": clock.steps, "tokens": tokens}
            curve.append({**figures, "bits": side.bits()})
            clock.leave_out(since)
            continue
        tokens += side.step(min(seconds / job.seconds, 1.0))
        clock.steps += 1
    return {**asdict(job), "curve": curve}


@dataclass(frozen=True)
class Pace:
    """The median seconds of a step of a recipe, and of the baseline's between them."""

    recipe: str
    threads: int
    seconds: float
    baseline_seconds: float


def measure_pace(recipe: str, threads: int, seconds: float, data: str) -> Pace:
    """Time steps of a recipe and of the baseline by turns, over all phases of the recipe."""
    torch.set_num_threads(threads)
    baseline: Side = TransformersSide(BASELINE_RATES[0], 0, data)
    side: Side = baseline
    if recipe != BASELINE:
        side = EvomeshSide(find_recipe(recipe), 0, data)
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while (progress := (time.perf_counter() - start) / seconds) < 1:
        times.append((_timed_step(side, progress), _timed_step(baseline, progress)))
    settled = times[UNTIMED_STEPS:]
    ours, theirs = (statistics.median(column) for column in zip(*settled, strict=True))
    return Pace(recipe, threads, ours, theirs)


def _timed_step(side: Side, progress: float) -> float:
    start = time.perf_counter()
    side.step(progress)
    return time.perf_counter() - start


class Results:
    """The runs and paces of the output file, one a line."""

    def __init__(self, path: Path, data: str, jobs: int) -> None:
        self.path = path
        self.data = data
        self.jobs = jobs
        self.rows: list[dict[str, object]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.open()]

    def of(self, job: Job) -> dict[str, object] | None:
        """Return the row of a run, None if it has not been done."""
        wanted = asdict(job).items()
        found = [row for row in self.rows if wanted <= row.items()]
        return found[0] if found else None

    def pace_of(self, recipe: str, threads: int, seconds: float) -> Pace:
        """Return the pace of a recipe, measured now unless the file holds it."""
        wanted = {"recipe": recipe, "threads": threads}.items()
        for row in self.rows:
            if "baseline_seconds" in row and wanted <= row.items():
                return Pace(**row)  # type: ignore[arg-type]
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            arguments = (recipe, threads, seconds, self.data)
            found = process.submit(measure_pace, *arguments).result()
        self._write(asdict(found))
        print(f"{recipe}: {found.seconds:.4f} s a step", flush=True)
        return found

    def complete(self, jobs: Sequence[Job]) -> list[dict[str, object]]:
        """Do the runs that are missing and return the rows of all."""
        missing = [job for job in jobs if self.of(job) is None]
        context = get_context("spawn")
        with ProcessPoolExecutor(
            self.jobs, context, max_tasks_per_child=1
        ) as processes:
            futures = [processes.submit(run_job, job, self.data) for job in missing]
            for future in as_completed(futures):
                self._add(future.result())
        rows = [self.of(job) for job in jobs]
        return [row for row in rows if row is not None]

    def _add(self, row: dict[str, object]) -> None:
        self._write(row)
        last = bits_at(row, -1)
        lr = f" lr {row['lr']}" if row["lr"] else ""
        print(f"{row['recipe']}{lr}, seed {row['seed']}: {last:.4f}", flush=True)

    def _write(self, row: dict[str, object]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def bits_at(row: dict[str, object], point: int) -> float:
    """Return the bits per byte at a point of a run's curve, the mean over the held-out sets."""
    curve = row["curve"]
    assert isinstance(curve, list)
    return statistics.fmean(curve[point]["bits"].values())


def end_of(row: dict[str, object]) -> dict[str, float]:
    """Return the seconds, steps and tokens at the end of a run."""
    curve = row["curve"]
    assert isinstance(curve, list)
    return {key: curve[-1][key] for key in ("seconds", "steps", "tokens")}


def paced(job: Job, results: Results, args: argparse.Namespace) -> Job:
    """Return a job whose steps count as long as they take on an idle machine, where --pace asks for it."""
    if not args.pace:
        return job
    reference = results.pace_of(BASELINE, args.threads, args.pace)
    pace = reference.seconds
    if job.recipe != BASELINE:
        # The machine may be faster now than it was then: only the ratio counts.
        found = results.pace_of(job.recipe, args.threads, args.pace)
        pace *= found.seconds / found.baseline_seconds
    threads = max(1, args.threads // args.jobs)
    return replace(job, threads=threads, pace=pace)


def jobs_of(
    name: str, results: Results, args: argparse.Namespace, lr: float | None = None
) -> list[Job]:
    """Return the runs of a recipe, one for each seed."""
    share = 1.0 if lr is not None else find_recipe(name).time_share
    seconds = 60 * args.minutes * share
    first = Job(name, lr, 0, seconds, args.threads, args.points)
    first = paced(first, results, args)
    return [replace(first, seed=seed) for seed in range(args.seeds)]


def best_rate(results: Results, args: argparse.Namespace) -> float:
    """Return the baseline's best learning rate after a fraction of the time, and print all."""
    seconds = 60 * args.minutes * args.search
    # Only the end is of interest; a step takes as long with each rate.
    first = Job(BASELINE, BASELINE_RATES[0], 0, seconds, args.threads, 1)
    first = paced(first, results, args)
    jobs = [replace(first, lr=lr) for lr in BASELINE_RATES]
    bits = [bits_at(row, -1) for row in results.complete(jobs)]
    print(
        f"\n| baseline's learning rate | bits per byte after {seconds:.0f} s |\n|---|---|"
    )
    for lr, value in zip(BASELINE_RATES, bits, strict=True):
        print(f"| {lr:g} | {value:.4f} |")
    return BASELINE_RATES[bits.index(min(bits))]


def print_table(rows_of: dict[str, list[dict[str, object]]], seconds: float) -> None:
    """Print bits per byte over time: means over the seeds, and their range at the end."""
    points = int(str(next(iter(rows_of.values()))[0]["points"]))
    shown = range(points)
    heads = [f"{(point + 1) / points:.0%}" for point in shown]
    print(f"\nBits per byte by share of the recipe's time; 100 % of {seconds:.0f} s\n")
    print(f"| recipe | seconds | tokens | {' | '.join(heads)} | range at the end |")
    print("|---" * (len(heads) + 4) + "|")
    for name, rows in rows_of.items():
        means = [
            statistics.fmean(bits_at(row, point) for row in rows) for point in shown
        ]
        ends = [bits_at(row, -1) for row in rows]
        tokens = statistics.fmean(end_of(row)["tokens"] for row in rows)
        figures = " | ".join(f"{mean:.4f}" for mean in means)
        spread = f"{min(ends):.4f} to {max(ends):.4f}"
        print(
            f"| {name} | {rows[0]['seconds']:.0f} | {tokens:,.0f} | {figures} | {spread} |"
        )


def print_crossing(
    rows_of: dict[str, list[dict[str, object]]], baseline: list[dict[str, object]]
) -> None:
    """Print when each recipe's mean curve first has the baseline's final value."""
    target = statistics.fmean(bits_at(row, -1) for row in baseline)
    for name, rows in rows_of.items():
        seconds, points = (float(str(rows[0][key])) for key in ("seconds", "points"))
        reached = None
        for point in range(int(points)):
            mean = statistics.fmean(bits_at(row, point) for row in rows)
            if mean <= target and reached is None:
                reached = (point + 1) / points * seconds
        when = "never" if reached is None else f"after {reached:.0f} s"
        print(f"{name}: the baseline's final {target:.4f} {when}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of tools/demo_data.py")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=5, help="of each curve")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES)[:2])
    parser.add_argument(
        "--search",
        type=float,
        default=0.2,
        help="share of the time that each of the baseline's learning rates gets; 0: no baseline",
    )
    parser.add_argument(
        "--pace",
        type=float,
        default=0.0,
        help="seconds for which each recipe is timed first; 0: every run counts its own time",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, with --pace"
    )
    parser.add_argument("--output", type=Path, default=Path("learning.jsonl"))
    args = parser.parse_args()
    if args.jobs > 1 and not args.pace:
        parser.error("--jobs above 1 makes steps slower: add --pace SECONDS")
    return args


def main() -> None:
    args = arguments()
    # Read by each run when it loads torch.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `evomesh train` does
    results = Results(args.output, args.data, args.jobs)
    rows_of: dict[str, list[dict[str, object]]] = {}
    if args.search:
        lr = best_rate(results, args)
        jobs = jobs_of(BASELINE, results, args, lr)
        rows_of[f"{BASELINE} {lr:g}"] = results.complete(jobs)
    baseline = list(rows_of.values())
    jobs_by_name = {name: jobs_of(name, results, args) for name in args.recipes}
    # All together, so that --jobs of them run at a time.
    results.complete([job for jobs in jobs_by_name.values() for job in jobs])
    for name, jobs in jobs_by_name.items():
        rows_of[name] = results.complete(jobs)
    print_table(rows_of, 60 * args.minutes)
    if baseline:
        print_crossing(rows_of, baseline[0])


if __name__ == "__main__":
    main()
