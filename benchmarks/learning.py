"""Bits per byte over time: the demo's recipe against a plain transformers Llama with AdamW and cosine.

Run: python benchmarks/learning.py --data DEMO_FOLDER [--minutes 5] [--seeds 3] [--threads 2] [--output learning.jsonl]
     [--recipes evomesh "evomesh, half the time" "optimizer.type=adamw" ...] [--clock wall|cpu] [--jobs 1]

Both train for a fixed time on the token files of tools/demo_data.py, on as many threads, with equally many parameters,
and are scored on the same held-out text in segments of the same length. The baseline trains on documents laid end to
end and cut into rows, with the demo's number of tokens in a step; its learning rate is the best of three, each tried
with seed 0 for a fraction of the time (--search). Rates follow the time that has passed, so that every schedule ends
with the time. The clock stops while the held-out text is scored.

A recipe is a name of RECIPES, or settings of configs/demo.py separated by spaces. Runs that the output file holds are
not done again. --clock cpu counts the process's CPU time, divided by the threads: for a busy machine, on which --jobs
runs at a time may share the cores. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy

from evomesh.config.loader import load_config
from evomesh.config.lr_scheduler import LrConfig
from evomesh.config.schema import AdamConfig, Config, LossConfig
from evomesh.data.build import ValidationSet, build_train_data, build_valid_data
from evomesh.optim.scaler import LossScaler
from evomesh.optim.schedule import learning_rate
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.allocator import keep_freed_memory
from evomesh.train.stages import build_stages
from evomesh.train.step import train_step
from evomesh.train.validate import validate

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
BASELINE = "transformers, AdamW, cosine"
BASELINE_RATES = (5e-4, 1e-3, 2e-3)
# The steps of a schedule whose run ends with the time, however many it really has.
SCHEDULE_STEPS = 10_000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """What differs from the demo's config, and the share of the time that it gets.

    Attributes:
        phases: more settings from a share of the run on, such as another length of the segments.
    """

    settings: tuple[str, ...] = ()
    time_share: float = 1.0
    phases: tuple[tuple[float, tuple[str, ...]], ...] = ()


def muon(*settings: str) -> Recipe:
    """Return a recipe with Muon, whose learning rate is AdamW's, and more settings."""
    return Recipe(("optimizer.type=muon", *settings))


MUON = muon().settings
RECIPES = {
    "evomesh": Recipe(),
    "evomesh, half the time": Recipe(time_share=0.5),
    "Muon": muon(),
    "Muon, half the time": Recipe(MUON, time_share=0.5),
    "Muon of 3 iterations": muon("optimizer.ns_steps=3"),
    "Muon, rate 4e-3": muon("adam.lr=4e-3"),
    "Muon, linear to 0": muon("lr_scheduler.type=linear", "lr_scheduler.eta_min=0"),
    "Muon, WSD": muon(
        "lr_scheduler.type=wsd",
        "lr_scheduler.decay_ratio=0.4",
        "lr_scheduler.decay_type=1-sqrt",
        "lr_scheduler.eta_min=0",
    ),
    "Muon, 512 tokens a step": muon("data.micro_bsz=1"),
    "Muon, 2048 tokens a step": muon("data.micro_bsz=4"),
    "Muon, 512 to 2048 tokens a step": Recipe(
        (*MUON, "data.micro_bsz=1"),
        phases=((0.3, ("data.micro_bsz=2",)), (0.7, ("data.micro_bsz=4",))),
    ),
    "Muon, segments of 128, then 512": Recipe(
        MUON,
        phases=(
            (0.0, ("data.seq_len=128", "data.micro_bsz=8")),
            (0.5, ("data.seq_len=512", "data.micro_bsz=2")),
        ),
    ),
    "Muon, bfloat16": muon("model.dtype=torch.bfloat16"),
    "Muon, norms of queries and keys": muon("model_type=QWEN3"),
    "Muon, one matrix for embedding and head": muon("model.tie_word_embeddings=True"),
    "Muon, embedding begins at 0.005": muon("model.embedding_init_std=0.005"),
}


@dataclass(frozen=True)
class Job:
    """A run: everything that its figures depend on."""

    recipe: str
    lr: float | None  # the baseline's; None: the recipe's own
    seed: int
    seconds: float
    threads: int
    clock: str
    points: int  # of the curve


class Side(Protocol):
    """A model in training."""

    def step(self, progress: float) -> int:
        """Take one step, and return its number of tokens; ``progress`` is the share of the time that has passed."""
        ...

    def bits(self) -> dict[str, float]:
        """Return the bits per byte of each held-out set."""
        ...


class EvomeshSide:
    """Model, data and steps as `evomesh train` has them."""

    def __init__(self, recipe: Recipe, seed: int, data: str) -> None:
        keep_freed_memory()  # as `evomesh train` does
        self.phases = [(0.0, ()), *recipe.phases]
        self.shared = [
            *(f"data.{kind}_folder={data}/{kind}" for kind in ("train", "valid")),
            f"data.total_steps={SCHEDULE_STEPS}",
            f"data.seed={seed}",
            *recipe.settings,
        ]
        self.config = config = load_config(str(DEMO), self.shared).config
        self.grid = Grid()
        self.stages = build_stages(config, self.grid, MODES["mtp"], CPU)
        self.stages.initialize(seed, self.grid)
        self.optimizer = ZeroOptimizer(
            self.stages.parameters().items(),
            config.adam,
            config.hybrid_zero_optimizer,
            self.grid,
            self.stages.module,
            config.optimizer,
        )
        self.scaler = LossScaler(config.grad_scaler, config.model.dtype)
        self.sets = build_valid_data(config.data, config.model.vocab_size)
        self.phase = -1

    def step(self, progress: float) -> int:
        due = sum(start <= progress for start, _ in self.phases) - 1
        if due != self.phase:
            self.phase = due
            sets = [*self.shared, *self.phases[due][1]]
            self.config = load_config(str(DEMO), sets).config
            vocab_size = self.config.model.vocab_size
            self.stream = build_train_data(self.config.data, vocab_size).stream()
        config = self.config
        batch = next(self.stream)
        train_step(
            batch,
            schedule=self.stages.schedule,
            optimizer=self.optimizer,
            scaler=self.scaler,
            grid=self.grid,
            loss_config=LossConfig(),
            data_types=["code", "en"],
            lr=rate(progress, config.lr_scheduler, config.adam),
            beta2=config.adam.adam_beta2,
        )
        return batch.tokens.numel()

    def bits(self) -> dict[str, float]:
        with self.optimizer.evaluated_weights():
            figures = validate(self.stages, self.sets, self.grid, CPU)
        return {one.name: figures[f"val/{one.name}_bpb"] for one in self.sets}


class TransformersSide:
    """A stock Llama of the demo's shape on rows of tokens, with torch's AdamW."""

    def __init__(self, lr: float, seed: int, data: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sets = [f"data.{kind}_folder={data}/{kind}" for kind in ("train", "valid")]
        config = load_config(str(DEMO), sets).config
        self.sets = build_valid_data(config.data, config.model.vocab_size)
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(LlamaConfig(**llama_shape(config))).train()
        self.adam = AdamConfig(lr=lr)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=lr,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        self.schedule = LrConfig(
            type="cosine", warmup_ratio=0.05, eta_min=0.1 * lr, init_steps=0
        )
        self.batches = row_batches(
            Path(data) / "train", config.data.seq_len, config.data.micro_bsz, seed
        )

    def step(self, progress: float) -> int:
        rows = next(self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(progress, self.schedule, self.adam)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return rows.numel()

    @torch.no_grad()
    def bits(self) -> dict[str, float]:
        self.model.eval()
        bits = {one.name: self._bits_of(one) for one in self.sets}
        self.model.train()
        return bits

    def _bits_of(self, valid: ValidationSet) -> float:
        """Return the bits per byte of a held-out set, each segment of it by itself."""
        nats = 0.0
        for batch in valid.batches(0, 1):
            for row, bounds in enumerate(batch.cu_seqlens.tolist()):
                for start, stop in pairwise(bounds):
                    if start == stop:
                        continue
                    part = slice(start, stop)
                    logits = self.model(input_ids=batch.tokens[row : row + 1, part])
                    labels = batch.labels[row, part]
                    loss = cross_entropy(logits.logits[0], labels, reduction="sum")
                    nats += loss.item()
        assert valid.text_bytes is not None
        return nats / math.log(2) / valid.text_bytes


def llama_shape(config: Config) -> dict[str, int | float | bool | str]:
    """Return the LlamaConfig of the model of a config."""
    model = config.model
    return dict(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.layer_norm_epsilon,
        max_position_embeddings=config.data.seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )


def row_batches(
    folder: Path, length: int, rows: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield batches of rows of all texts, joined once and split evenly; each pass has its own order."""
    documents: list[list[int]] = []
    for path in sorted(folder.rglob("*.bin")):
        documents += [json.loads(line)["tokens"] for line in path.open()]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    tokens = torch.tensor([token for index in order for token in documents[index]])
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    while True:
        shuffled = whole[torch.randperm(len(whole), generator=generator)]
        for start in range(0, len(shuffled) - rows + 1, rows):
            yield shuffled[start : start + rows]


def rate(progress: float, schedule: LrConfig, adam: AdamConfig) -> float:
    """Return the learning rate after a share of the time."""
    step = int(progress * SCHEDULE_STEPS)
    return learning_rate(step, schedule, adam, SCHEDULE_STEPS)


class Clock:
    """Counts seconds of work; ``paused`` leaves out what happens in it."""

    def __init__(self, kind: str, threads: int) -> None:
        self.read: Callable[[], float] = time.perf_counter
        self.scale = 1.0
        if kind == "cpu":
            self.read = time.process_time
            self.scale = 1 / threads
        self.start = self.read()

    def seconds(self) -> float:
        return (self.read() - self.start) * self.scale

    def leave_out(self, since: float) -> None:
        """Leave out what has happened since a reading of ``read``."""
        self.start += self.read() - since


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
    clock = Clock(job.clock, job.threads)
    steps = tokens = 0
    curve: list[dict[str, object]] = []
    while len(curve) < job.points:
        seconds = clock.seconds()
        if seconds >= job.seconds * (len(curve) + 1) / job.points:
            since = clock.read()
            figures = {"seconds": seconds, "steps": steps, "tokens": tokens}
            curve.append({**figures, "bits": side.bits()})
            clock.leave_out(since)
            continue
        tokens += side.step(min(seconds / job.seconds, 1.0))
        steps += 1
    return {**asdict(job), "curve": curve}


class Results:
    """The runs of the output file, one a line."""

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
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        last = bits_at(row, -1)
        lr = f" lr {row['lr']}" if row["lr"] else ""
        print(f"{row['recipe']}{lr}, seed {row['seed']}: {last:.4f}", flush=True)


def bits_at(row: dict[str, object], point: int) -> float:
    """Return the bits per byte at a point of a run's curve, the mean over the held-out sets."""
    curve = row["curve"]
    assert isinstance(curve, list)
    return statistics.fmean(curve[point]["bits"].values())


def tokens_at_end(row: dict[str, object]) -> int:
    curve = row["curve"]
    assert isinstance(curve, list)
    return int(curve[-1]["tokens"])


def jobs_of(name: str, args: argparse.Namespace, lr: float | None = None) -> list[Job]:
    """Return the runs of a recipe, one for each seed."""
    share = 1.0 if lr is not None else find_recipe(name).time_share
    seconds = 60 * args.minutes * share
    seeds = range(args.seeds)
    run = (args.threads, args.clock, args.points)
    return [Job(name, lr, seed, seconds, *run) for seed in seeds]


def best_rate(results: Results, args: argparse.Namespace) -> float:
    """Return the baseline's best learning rate after a fraction of the time, and print all."""
    seconds = 60 * args.minutes * args.search
    # Only the end is of interest.
    run = (args.threads, args.clock, 1)
    jobs = [Job(BASELINE, lr, 0, seconds, *run) for lr in BASELINE_RATES]
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
        tokens = statistics.fmean(tokens_at_end(row) for row in rows)
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
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("learning.jsonl"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    # Read by each run when it loads torch.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `evomesh train` does
    results = Results(args.output, args.data, args.jobs)
    rows_of: dict[str, list[dict[str, object]]] = {}
    if args.search:
        lr = best_rate(results, args)
        rows_of[f"{BASELINE} {lr:g}"] = results.complete(jobs_of(BASELINE, args, lr))
    baseline = list(rows_of.values())
    jobs = [job for name in args.recipes for job in jobs_of(name, args)]
    results.complete(jobs)  # all together, so that --jobs of them run at a time
    for name in args.recipes:
        rows_of[name] = results.complete(jobs_of(name, args))
    print_table(rows_of, 60 * args.minutes)
    if baseline:
        print_crossing(rows_of, baseline[0])


if __name__ == "__main__":
    main()
