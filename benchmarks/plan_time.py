"""Compare the time of a step that ``evomesh plan`` predicts for this machine with that of real steps in a table.

    evomesh plan --measure machine.toml
    python benchmarks/plan_time.py machine.toml [--only NAME ...]

Every layout trains steps of a small model in real ranks on gloo, each with one thread. The prediction knows the device
file, and none of these times. The first steps of a layout are not counted; of the others the median counts, of the
slowest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from evomesh.config.schema import Config
from evomesh.parallel.local_world import run_in_world
from evomesh.plan.device import Device, load_device
from evomesh.plan.operator_times import RepeatedStep
from evomesh.plan.step_time import StepTime, predict_step
from evomesh.train.allocator import keep_freed_memory

UNTIMED = 2
# Steps of a layout are timed for so long, but at least so many.
TIMED_S = 1.5
FEWEST = 5
MOST = 12

Section = dict[str, Any]
SMALL: Section = dict(hidden_size=256, num_attention_heads=8)
LARGE: Section = dict(
    hidden_size=512, num_attention_heads=8, vocab_size=4096, num_layers=4
)
DEEP: Section = dict(
    hidden_size=192, num_attention_heads=6, num_kv_attention_heads=3, num_layers=8
)
HALF: Section = dict(dtype="bfloat16")
LONG: Section = dict(seq_len=1024)
FSDP: Section = {"zero1": {"size": -1, "fsdp": True}}


@dataclass(frozen=True)
class TimeLayout:
    """A layout and a shape of model whose step is timed."""

    name: str
    ranks: int
    parallel: Section
    model: Section = field(default_factory=dict)
    data: Section = field(default_factory=dict)
    zero: Section = field(default_factory=dict)

    @property
    def config(self) -> Config:
        model = dict(
            model_type="LLAMA2",
            dtype="float32",
            num_layers=4,
            num_kv_attention_heads=4,
            mlp_ratio=2.5,
            multiple_of=32,
            vocab_size=2048,
            no_bias=True,
        )
        data = dict(seq_len=256, micro_bsz=1, micro_num=4)
        return Config.model_validate(
            {
                "model": model | SMALL | self.model,
                "data": data | self.data,
                "parallel": self.parallel,
                "hybrid_zero_optimizer": self.zero,
            }
        )


def tensor(size: int, mode: str, **others: Any) -> Section:
    return {"tensor": {"size": size, "mode": mode}, **others}


def pipeline(size: int, **options: Any) -> Section:
    return {"pipeline": {"size": size, **options}}


OVERLAP: Section = dict(overlap_sync_grad=True, reduce_bucket_size=2**20)
CHUNKS: Section = dict(num_layers=8, num_chunks=2)
ISP = tensor(2, "isp", weight={"size": 2})
LAYOUTS = (
    TimeLayout("zero1", 2, {}),
    TimeLayout("zero1, large", 2, {}, LARGE, dict(micro_num=2)),
    TimeLayout("zero1, bfloat16", 2, {}, HALF),
    TimeLayout("zero1, overlap", 2, {}, LARGE, dict(micro_num=2), OVERLAP),
    TimeLayout("zero1, long sequences", 2, {}, {}, LONG),
    TimeLayout("fsdp", 2, FSDP),
    TimeLayout("fsdp, large, recomputed", 2, FSDP, LARGE | dict(checkpoint=1.0)),
    TimeLayout("mtp", 2, tensor(2, "mtp")),
    TimeLayout("mtp, long sequences", 2, tensor(2, "mtp"), {}, LONG),
    TimeLayout("msp", 2, tensor(2, "msp")),
    TimeLayout("msp, large, bfloat16", 2, tensor(2, "msp"), LARGE | HALF),
    TimeLayout("fsp", 2, tensor(2, "fsp"), LARGE),
    TimeLayout("isp", 2, ISP, LARGE),
    TimeLayout("isp, long sequences", 2, ISP, {}, LONG),
    TimeLayout("1f1b", 2, pipeline(2), LARGE),
    TimeLayout("1f1b, eight micro-batches", 2, pipeline(2), DEEP, dict(micro_num=8)),
    TimeLayout("interleaved", 2, pipeline(2), DEEP | CHUNKS),
    TimeLayout("zbv", 2, pipeline(2, schedule="zbv"), DEEP | CHUNKS),
    TimeLayout("zero1 of four", 4, {}, LARGE, dict(micro_num=2)),
    TimeLayout("zero1 of two", 4, {"zero1": {"size": 2}}),
    TimeLayout("fsdp of four", 4, FSDP, LARGE),
    TimeLayout("fsdp of four, bfloat16", 4, FSDP, LARGE | HALF),
    TimeLayout("mtp of four", 4, tensor(4, "mtp"), LARGE),
    TimeLayout("msp and zero1", 4, tensor(2, "msp"), LARGE),
    TimeLayout("fsp and zero1, long", 4, tensor(2, "fsp"), {}, LONG),
    TimeLayout("isp of four", 4, tensor(4, "isp", weight={"size": 4}), LARGE),
    TimeLayout("isp and zero1", 4, ISP, LARGE),
    TimeLayout("1f1b of four", 4, pipeline(4), DEEP),
    TimeLayout("1f1b and zero1", 4, pipeline(2), LARGE),
    TimeLayout("interleaved of four", 4, pipeline(4), DEEP | CHUNKS),
    TimeLayout("zbv and zero1", 4, pipeline(2, schedule="zbv"), DEEP | CHUNKS),
    TimeLayout("msp and 1f1b", 4, tensor(2, "msp", **pipeline(2)), LARGE),
)


def time_layouts(
    rank: int, device: torch.device, layouts: Sequence[TimeLayout]
) -> list[float]:
    """Return the seconds of a step of each layout on this rank."""
    keep_freed_memory()
    found = []
    for layout in layouts:
        step = RepeatedStep(layout.config, rank, layout.ranks, device)
        seconds = [step.run() for _ in range(UNTIMED)]
        # Steps end together: the same number on every rank.
        count = torch.tensor([TIMED_S / seconds[-1]])
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MIN)
        repeats = min(max(int(count), FEWEST), MOST)
        timed = [step.run() for _ in range(repeats)]
        found.append(statistics.median(timed))
        if rank == 0:
            print(".", end="", file=sys.stderr, flush=True)
    return found


def measured(layouts: Sequence[TimeLayout]) -> Iterator[tuple[TimeLayout, float]]:
    """Yield each layout with the time of its step on the slowest rank."""
    for ranks in sorted({layout.ranks for layout in layouts}):
        same = [layout for layout in layouts if layout.ranks == ranks]
        by_rank = run_in_world(time_layouts, ranks, "cpu", same)
        for layout, *seconds in zip(same, *by_rank, strict=True):
            yield layout, max(seconds)


def kept_times(layouts: Sequence[TimeLayout], file: Path | None) -> dict[str, float]:
    """Return the measured time of each layout by its name, from a file if it is there."""
    if file is not None and file.exists():
        kept: dict[str, float] = json.loads(file.read_text())
        return kept
    times = {}
    for layout, seconds in measured(layouts):
        times[layout.name] = seconds
        if file is not None:
            file.write_text(json.dumps(times))
    return times


def predicted(layout: TimeLayout, device: Device) -> StepTime:
    return predict_step(layout.config, layout.ranks, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", help="A device file of this machine.")
    parser.add_argument(
        "--times",
        type=Path,
        metavar="FILE",
        help="Keep the measured times in a file; if it is there, predict what it has.",
    )
    parser.add_argument("--only", nargs="+", default=[one.name for one in LAYOUTS])
    options = parser.parse_args()
    device = load_device(options.device)
    chosen = [layout for layout in LAYOUTS if layout.name in options.only]
    times = kept_times(chosen, options.times)
    print("\n| layout | ranks | measured, ms | predicted, ms | error |")
    print("|---|--:|--:|--:|--:|")
    errors = []
    for layout in chosen:
        if layout.name not in times:
            continue
        seconds = times[layout.name]
        found = predicted(layout, device).seconds
        error = found / seconds - 1
        errors.append(abs(error))
        cells = (f"{seconds * 1e3:,.0f}", f"{found * 1e3:,.0f}", f"{error:+.1%}")
        print(f"| {layout.name} | {layout.ranks} | {' | '.join(cells)} |", flush=True)
    median = statistics.median(errors)
    within = sum(error <= 0.15 for error in errors)
    print(
        f"\nThe median of the absolute errors of {len(errors)} layouts is {median:.1%}, the largest {max(errors):.1%}; "
        f"{within} are within 15 %."
    )


if __name__ == "__main__":
    main()
