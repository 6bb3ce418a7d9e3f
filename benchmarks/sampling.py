"""Milliseconds to choose one token with top-p at a large vocabulary, beside a sort of the whole vocabulary.

Run: python benchmarks/sampling.py [--vocab 103168] [--top-p 0.9] [--rounds 50] [--threads 1]

The two take turns on the same logits, and the tokens that each of them keeps are compared. Logits are normal with the
standard deviation of --spread; language models have between 2 and 4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import TokenSampler, candidates


def sorted_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return the ids that top-p keeps, most probable first, by sorting all logits."""
    order = logits.double().sort(descending=True, stable=True)
    probability = order.values.softmax(-1)
    before = probability.cumsum(-1) - probability
    return order.indices[before < top_p]


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=103168)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--spread", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampling = SamplingParams(top_p=args.top_p)
    sampler = TokenSampler(sampling, (0, 0))
    print(
        f"vocabulary {args.vocab}, top-p {args.top_p}, {args.threads} threads, medians of {args.rounds}"
    )
    for spread in args.spread:
        ours: list[float] = []
        reference: list[float] = []
        for number in range(args.rounds):
            logits = (
                torch.randn(args.vocab, generator=torch.Generator().manual_seed(number))
                * spread
            )
            ours.append(milliseconds(lambda logits=logits: sampler.next_token(logits)))
            reference.append(
                milliseconds(lambda logits=logits: sorted_nucleus(logits, args.top_p))
            )
        kept, _ = candidates(logits.double(), sampling)
        wanted = sorted_nucleus(logits, args.top_p)
        same = (
            "the same"
            if torch.equal(kept.sort().values, wanted.sort().values)
            else "DIFFERENT"
        )
        ratio = statistics.median(
            slow / fast for fast, slow in zip(ours, reference, strict=True)
        )
        print(
            f"  spread {spread}: {statistics.median(ours):.2f} ms, sort {statistics.median(reference):.2f} ms, "
            f"ratio {ratio:.1f}; {len(kept)} tokens kept, {same}"
        )


if __name__ == "__main__":
    main()
