"""The parts of `gpu.py`: each prints rows of its table, and nothing else that begins with a bar.

Run: PYTHONPATH=. python benchmarks/gpu_parts.py PART
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu import HEADS, PARTS, ROOT, table_line
from gpu_step import SHAPES, Case, measure, packaged_kernels, product_rate

from evomesh.layers.compiler import missing_for_compiling

if TYPE_CHECKING:
    from benchmarks.generate import Options

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = "bfloat16" if ON_CUDA else "float32"
# On the CPU it would take minutes and say nothing about a GPU.
CAN_COMPILE = ON_CUDA and not missing_for_compiling()


@dataclass(frozen=True)
class Row:
    """A line of the table; ``ratio`` belongs to ``result`` and ``reference``."""

    case: str
    result: str
    reference: str = ""
    ratio: str = ""


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this Python with ``arguments``, and collect what it prints."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# ---------------------------------------------------------------------------- tests


def tests() -> Iterator[Row]:
    """A row for each file, so that one that hangs leaves those of the others."""
    for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        name = file.relative_to(ROOT).as_posix()
        yield from tests_of(name)


def tests_of(name: str) -> Iterator[Row]:
    done = run("-m", "pytest", name, "-rfE", "-p", "no:cacheprovider")
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            yield Row(line.split(" ")[1], f"FAILED: {line.partition(' - ')[2][:120]}")
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout)
    summary = ", ".join(counts[-3:]) or done.stdout[-200:].replace("\n", " ")
    yield Row(name, summary if done.returncode == 0 else f"FAILED: {summary}")


# -------------------------------------------------------------------------- layouts

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": dict(zero1=dict(size=2)),
    "zero1.fsdp": dict(zero1=dict(size=2, fsdp=True)),
    "mtp": dict(tensor=dict(size=2, mode="mtp")),
    "msp": dict(tensor=dict(size=2, mode="msp")),
    "fsp": dict(tensor=dict(size=2, mode="fsp")),
    "isp": dict(
        tensor=dict(size=2, mode="isp"),
        weight=dict(size=2, overlap=True),
        zero1=dict(size=1),
    ),
    "pipeline": dict(pipeline=dict(size=2)),
    "pipeline, interleaved": dict(pipeline=dict(size=2, interleaved_overlap=True)),
}
# Rounding of partial sums. A wrong gradient is off by several percent at least.
LAYOUT_TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}
LAYOUT_STEPS = 6


def layout_config(parallel: dict[str, Any], data_ranks: int) -> str:
    """The text of a config of four layers, which trains on the same global batch whatever the layout."""
    width, tokens = (1024, 2048) if ON_CUDA else (64, 128)
    model = dict(
        num_layers=4,
        hidden_size=width,
        num_attention_heads=8,
        num_kv_attention_heads=4,
        vocab_size=8192 if ON_CUDA else 512,
        mlp_ratio=8 / 3,
        no_bias=True,
        dtype=f"torch.{DTYPE}",
        compile=CAN_COMPILE,
    )
    if "interleaved_overlap" in parallel.get("pipeline", {}):
        model["num_chunks"] = 2
    data = dict(
        seq_len=tokens,
        micro_bsz=1,
        micro_num=4 // data_ranks,
        total_steps=LAYOUT_STEPS,
        train_folder=None,
        valid_every=0,
    )
    blocks = dict(
        JOB_NAME="layout",
        model_type="LLAMA2",
        model=model,
        data=data,
        ckpt=dict(enable_save_ckpt=False),
        parallel=parallel,
    )
    return "\n".join(f"{key} = {value!r}" for key, value in blocks.items()) + "\n"


def layout_metrics(
    parallel: dict[str, Any], ranks: int
) -> list[dict[str, float]] | str:
    """The metrics of each step, or the last lines of what the run said when it failed."""
    shares_batch = ranks > 1 and set(parallel) == {"zero1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = layout_config(parallel, 2 if shares_batch else 1)
        (folder / "layout.py").write_text(text)
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        launcher = torchrun if ranks > 1 else []
        done = run(*launcher, "-m", "evomesh", "train", "layout.py", folder=folder)
        if done.returncode:
            return done.stdout[-600:]
        [metrics] = folder.glob("RUN/*/*/metrics.jsonl")
        return [json.loads(line) for line in metrics.read_text().splitlines()]


def worst_difference(
    key: str, found: list[dict[str, float]], expected: list[dict[str, float]]
) -> float:
    pairs = zip(found, expected, strict=True)
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs)


def layouts() -> Iterator[Row]:
    alone = layout_metrics({}, ranks=1)
    if isinstance(alone, str):
        print(alone)
        yield Row("one process", "FAILED, see the screen")
        return
    blocks = "compiled" if CAN_COMPILE else "eager"
    yield Row(
        f"one process, {blocks}",
        f"loss {alone[-1]['loss']:.4f} after {LAYOUT_STEPS} steps",
    )
    limit = LAYOUT_TOLERANCE[DTYPE]
    for name, parallel in LAYOUTS.items():
        case = f"{name}, two ranks, {blocks}"
        found = layout_metrics(parallel, ranks=2)
        if isinstance(found, str):
            print(found)
            yield Row(case, "FAILED, see the screen")
            continue
        loss, norm = (
            worst_difference(key, found, alone) for key in ("loss", "grad_norm")
        )
        verdict = "equal" if max(loss, norm) <= limit else "FAILED"
        yield Row(
            case,
            f"{verdict}: loss off by {loss:.1e}, gradient norm by {norm:.1e}",
            f"one process, {DTYPE}: {limit:g}",
        )


# ---------------------------------------------------------------------------- steps


def step_cases() -> Iterator[tuple[Case, bool]]:
    """Each with whether its blocks are compiled; the first are the ones to know when the time is short."""

    def case(
        name: str, tokens: int, recompute: float = 0.0, micro_num: int = 4
    ) -> Case:
        return Case(name, tokens, micro_num, recompute, False, DTYPE, DEVICE)

    if not ON_CUDA:
        yield case("10M", 256), False
        yield case("10M", 1024, recompute=1.0), False
        return
    yield case("1.3B", 4096), True
    # The model of KempnerForge's table, of which one GPU holds half the layers with float32 masters.
    yield case("8B, half its layers", 4096, recompute=1.0), True
    yield case("1.3B", 4096, recompute=1.0), True
    yield case("1.3B", 4096), False
    yield replace(case("1.3B", 4096), packed=True), True
    yield case("7B-width", 4096), True
    yield case("7B-width", 4096, recompute=1.0), True
    yield case("7B-width", 4096), False
    yield case("1.3B", 32768, recompute=1.0, micro_num=1), True
    # Beside the rows above with torch's own.
    for kernel in packaged_kernels(DEVICE):
        yield replace(case("1.3B", 4096), kernel=kernel), True
        long = case("1.3B", 32768, recompute=1.0, micro_num=1)
        yield replace(long, kernel=kernel), True


def steps() -> Iterator[Row]:
    rate = product_rate(DEVICE, getattr(torch, DTYPE))
    for case, is_compiled in step_cases():
        blocks = "compiled" if is_compiled else "eager"
        packs = f"{case.micro_num} x {case.tokens}" + (
            ", packed" if case.packed else ""
        )
        title = f"{case.title}, {packs}, recompute {case.recompute:g}, {blocks}"
        try:
            found = measure(case, 6, is_compiled)
        except torch.OutOfMemoryError:
            yield Row(title, "out of memory")
        else:
            # The clock falls while a GPU warms up: a step is compared with the best product so far.
            rate = max(rate, product_rate(DEVICE, getattr(torch, DTYPE)))
            speed = case.micro_num * case.tokens / found.seconds
            flops = case.model_flops() / found.seconds
            memory = f", {found.memory / 2**30:.1f} GiB" if found.memory else ""
            yield Row(
                title,
                f"{speed:,.0f} tokens/s, {flops / 1e12:.3g} TFLOP/s{memory}",
                f"product {rate / 1e12:.3g} TFLOP/s",
                f"{flops / rate:.2f}",
            )
        gc.collect()
        if ON_CUDA:
            torch.compiler.reset()
            torch.cuda.empty_cache()


# -------------------------------------------------------------------------- profile


def profile() -> Iterator[Row]:
    """The table that `evomesh train --profile` prints."""
    name, tokens = ("1.3B", 4096) if ON_CUDA else ("10M", 256)
    shape = SHAPES[name]
    model = dict(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab,
        mlp_ratio=shape.mlp / shape.hidden,
        multiple_of=1,
        no_bias=True,
        dtype=f"torch.{DTYPE}",
    )
    data = dict(
        seq_len=tokens, micro_bsz=1, micro_num=4, total_steps=10, train_folder=None
    )
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "profile.py"
        config.write_text(
            f"JOB_NAME = 'profile'\nmodel_type = 'LLAMA2'\nmodel = {model!r}\ndata = {data!r}\n"
            "ckpt = dict(enable_save_ckpt=False)\n"
        )
        done = run(
            "-m", "evomesh", "train", config.name, "--profile", folder=config.parent
        )
        tables = list(config.parent.glob("RUN/*/*/traces/*.txt"))
        if done.returncode or not tables:
            print(done.stdout[-1500:])
            yield Row(name, "FAILED, see the screen")
            return
        for line in tables[0].read_text().splitlines():
            found = re.fullmatch(r"(.+?) +([0-9.]+) +([0-9.]+%)", line)
            if found:
                kind, milliseconds, share = found.groups()
                yield Row(
                    f"{name}, {tokens} tokens: {kind}",
                    f"{milliseconds} ms a step",
                    "the step",
                    share,
                )


# ------------------------------------------------------------- generation and serving


def generation() -> Iterator[Row]:
    # As a package: the checkout has its own generate.py.
    from benchmarks import generate

    options = generate.Options(
        shape="1.3B" if ON_CUDA else "10M",
        batches=(1, 8, 32) if ON_CUDA else (1, 4),
        prompt=128,
        new=128 if ON_CUDA else 16,
        rounds=3,
        threads=torch.get_num_threads(),
        device=DEVICE.type,
        dtype=DTYPE,
    )
    for batch in generate.compare(options):
        yield Row(
            f"{options.shape}, {batch.size} prompts of {options.prompt}, {options.new} new, {DTYPE}",
            f"{batch.ours:,.0f} tokens/s",
            f"transformers {batch.theirs:,.0f}",
            f"{batch.ratio:.2f}",
        )
    yield from pages(replace(options, prompt=512) if ON_CUDA else options)


def pages(options: Options) -> Iterator[Row]:
    """Keys and values in rows, in pages, and in pages with a captured graph."""
    from benchmarks import paged

    for found in paged.compare(options):
        case = f"{options.shape}, {found.size} sequences of up to {options.prompt}, {DTYPE}: {found.way}"
        if found.reason:
            yield Row(case, f"not possible: {found.reason}")
            continue
        yield Row(
            case,
            f"{found.speed:,.0f} tokens/s, {found.same} answers as in rows",
            "rows",
            f"{found.ratio:.2f}",
        )


def serving() -> Iterator[Row]:
    from benchmarks import serve

    model = (
        serve.RandomModel(hidden=2048, layers=24, vocab=32000, dtype=DTYPE)
        if ON_CUDA
        else serve.RandomModel(hidden=256, layers=2, vocab=1000, dtype=DTYPE)
    )
    for turn in serve.compare(
        model, clients=8, tokens=128 if ON_CUDA else 16, rounds=3
    ):
        yield Row(
            f"{model.layers} layers of {model.hidden}, {turn.clients} clients",
            f"{turn.many:,.0f} tokens/s, first after {turn.wait_many * 1000:.0f} ms",
            f"1 client {turn.one:,.0f}, first after {turn.wait_one * 1000:.0f} ms",
            f"{turn.many / turn.one:.2f}",
        )


ROWS: dict[str, Callable[[], Iterator[Row]]] = dict(
    zip(PARTS, (tests, layouts, steps, profile, generation, serving), strict=True)
)


def main() -> None:
    part = sys.argv[1]
    for row in ROWS[part]():
        cells = (part, row.case, row.result, row.reference, row.ratio)
        assert len(cells) == len(HEADS)
        print(table_line(*cells), flush=True)


if __name__ == "__main__":
    main()
