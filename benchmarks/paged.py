"""Tokens per second of greedy decoding with keys and values in rows, in pages, and in pages with a captured graph.

Run: python benchmarks/paged.py [--shape 1.3B] [--batch 1 8 32] [--prompt 512] [--new 256] [--rounds 3]
     [--device cuda] [--dtype bfloat16]

The prompts differ in length, from half of --prompt to all of it. The three take turns in one process on the same
weights, and the figure to quote is the median of the ratios of adjacent turns. Reading the prompts is not counted. A
way that is not possible here says why.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.generate import SHAPES, Options, native
from evomesh.generate.engine import GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.generate.paged_attention import (
    attend_to_pages,
    fault_of_kernel,
    reason_against_pages,
)
from evomesh.generate.paged_decoding import (
    CAPTURED_AFTER,
    PagedDecoding,
    PagedSettings,
    RowDecoding,
)
from evomesh.generate.step_graph import GraphCapture, run_eagerly
from evomesh.models.language_model import LanguageModel

Decoding = RowDecoding | PagedDecoding
WARM_UP = CAPTURED_AFTER + 2


@dataclass(frozen=True)
class Compared:
    """Attributes:
    way: "rows", "pages" or "pages, graph".
    size: sequences at a time.
    speed: tokens per second; 0 where it is not possible.
    ratio: median over rounds of the rows' seconds by its own.
    same: answers that are equal to those of rows.
    reason: why it is not possible.
    """

    way: str
    size: int
    speed: float = 0.0
    ratio: float = 0.0
    same: int = 0
    reason: str = ""


def ways(
    model: LanguageModel, slots: int, length: int
) -> dict[str, Callable[[], Decoding]]:
    device = next(model.parameters()).device

    def paged(graph: bool) -> Decoding:
        capture = GraphCapture() if graph else run_eagerly
        settings = PagedSettings(attend_to_pages, capture)
        return PagedDecoding(model, slots, length, device, settings)

    return {
        "rows": lambda: RowDecoding(model, slots, length, device),
        "pages": lambda: paged(graph=False),
        "pages, graph": lambda: paged(graph=True),
    }


def decode(
    model: LanguageModel,
    prompts: list[list[int]],
    new: int,
    length: int,
    decoding: Decoding,
) -> tuple[float, list[list[int]]]:
    """Seconds of the steps after the first ones, and all tokens."""
    engine = GenerationEngine(
        model, slots=len(prompts), context_length=length, paged="off"
    )
    engine.decoding = decoding
    engine.prefill_tokens = sum(map(len, prompts))
    sampling = SamplingParams(do_sample=False, max_new_tokens=new + WARM_UP)
    for prompt in prompts:
        engine.add(prompt, sampling, (0, 0))
    answers: list[list[int]] = [[] for _ in prompts]
    start = 0.0
    steps = 0
    while engine.active:
        if steps == WARM_UP:
            start = time.perf_counter()
        # Its tokens are on the host, and so the device is done.
        for token in engine.step():
            answers[token.request].append(token.id)
        steps += 1
    return time.perf_counter() - start, answers


def compare(options: Options) -> Iterator[Compared]:
    model = native(options)
    device = next(model.parameters()).device
    reason = reason_against_pages(model, device) or fault_of_kernel(
        attend_to_pages, model, device
    )
    length = options.prompt + options.new + WARM_UP
    for size in options.batches:
        prompts = [
            prompt[: options.prompt - number * options.prompt // (2 * size)]
            for number, prompt in enumerate(options.prompts[:size])
        ]
        makers = ways(model, size, length)
        if reason:
            makers = {"rows": makers["rows"]}
        seconds: dict[str, list[float]] = {way: [] for way in makers}
        answers: dict[str, list[list[int]]] = {}
        for _ in range(options.rounds):
            for way, make in makers.items():
                spent, answers[way] = decode(
                    model, prompts, options.new, length, make()
                )
                seconds[way].append(spent)
        for way, spent_times in seconds.items():
            pairs = zip(seconds["rows"], spent_times, strict=True)
            yield Compared(
                way,
                size,
                speed=size * options.new / statistics.median(spent_times),
                ratio=statistics.median(rows / own for rows, own in pairs),
                same=sum(
                    a == b for a, b in zip(answers[way], answers["rows"], strict=True)
                ),
            )
        if reason:
            yield Compared("pages", size, reason=reason)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1.3B")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = Options(
        args.shape,
        tuple(args.batch),
        args.prompt,
        args.new,
        args.rounds,
        args.threads,
        args.device,
        args.dtype,
    )
    for found in compare(options):
        if found.reason:
            print(f"  {found.size} sequences, {found.way}: {found.reason}")
            continue
        print(
            f"  {found.size} sequences, {found.way}: {found.speed:,.1f} tokens/s, {found.ratio:.2f} of rows; "
            f"the same tokens in {found.same} of {found.size} answers"
        )


if __name__ == "__main__":
    main()
