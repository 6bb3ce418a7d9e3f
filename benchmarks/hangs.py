"""Hangs named rightly by the watchdog, and false alarms in normal steps.

Run: python benchmarks/hangs.py [--cases 14] [--silence 3] [--normal-steps 10000] [--compiled]

Each case is a training run of 2 or 3 ranks in which one, chosen at random, hangs in one of the ways of
tests/support/hang_faults.py. It counts as right if exactly one rank writes one sentence, which names the rank and what
it does, and all ranks end with 75, or are killed if they cannot. The normal run validates and saves.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.hang_faults import WORDS
from tests.support.interpreter import Finished, Interpreter
from tests.support.runs import write_run

ENDLESS = 'data["total_steps"] = 1000000\n'
LAYOUTS = {
    "data": "",
    "tensor": "parallel = dict(tensor=2)\n",
    "pipeline": "parallel = dict(pipeline=2)\n",
    "interleaved": "model.update(num_layers=4, num_chunks=2)\nparallel = dict(pipeline=2)\n",
    "fsdp": "parallel = dict(zero1=dict(size=-1, fsdp=True))\n",
    "weight": 'parallel = dict(tensor=dict(size=2, mode="isp"), weight=2)\n',
}


@dataclass(frozen=True)
class HangCase:
    """One run of some ranks in which one hangs in a step."""

    kind: str
    layout: str
    ranks: int
    culprit: int
    step: int

    @staticmethod
    def drawn(kind: str, draw: random.Random) -> HangCase:
        """Draw the layout, the rank and the step."""
        layout = draw.choice(list(LAYOUTS))
        ranks = draw.choice((2, 3)) if layout == "data" else 2
        culprit = draw.randrange(ranks)
        if kind == "stopped while it starts the watcher":
            culprit = 0  # which is the one that does
        return HangCase(kind, layout, ranks, culprit, draw.randrange(5, 60))

    def __str__(self) -> str:
        return f"{self.kind}, {self.layout}, rank {self.culprit} of {self.ranks}, step {self.step}"

    def config(self, silence: float) -> str:
        """Return the lines that are added to a small run's config."""
        limits = f"dict(silence={silence}, long_phase={silence})"
        saves_every = 100_000
        if self.kind == "file system":
            saves_every = self.step + 1
        return (
            f"{ENDLESS}{LAYOUTS[self.layout]}"
            f"monitor = dict(watchdog={limits})\n"
            f"ckpt['checkpoint_every'] = {saves_every}\n"
            "from tests.support.hang_faults import plant\n"
            f"plant({self.kind!r}, rank={self.culprit}, step={self.step})\n"
        )

    def problem(self, finished: Sequence[Finished]) -> str:
        """Return "" if the rank was named rightly, by one rank, and all ended as they should."""
        output = "".join(one.stdout + one.stderr for one in finished)
        is_named = f"rank {self.culprit} on " in output and WORDS[self.kind] in output
        is_once = output.count("ending with exit code 75") == 1
        codes = [one.returncode for one in finished]
        others = [code for rank, code in enumerate(codes) if rank != self.culprit]
        has_ended = set(others) == {75} and codes[self.culprit] in (75, -9)
        if is_named and is_once and has_ended:
            return ""
        return f"{self}: {codes}\n{output[-2500:]}"


def run_case(interpreter: Interpreter, case: HangCase, silence: float) -> str:
    """Let one rank hang and return "" if it was named rightly, else what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), case.config(silence))
        command = ["evomesh", "train", "config.py"]
        started = interpreter.start_ranks(command, case.ranks, cwd=folder)
        try:
            finished = [rank.wait(60) for rank in started]
        except AssertionError as error:
            for rank in started:
                rank.kill()
            return f"{case}: {error}"
    return case.problem(finished)


def normal_steps(
    interpreter: Interpreter, steps: int, silence: float, is_compiled: bool
) -> tuple[int, float]:
    """Return the false alarms in a run with validation and saves, and its seconds."""
    extra = (
        f"data.update(total_steps={steps}, valid_every=50)\nckpt.update(checkpoint_every=100, keep_last=2)\n"
        f"monitor = dict(watchdog=dict(silence={silence}))\n"
        f"model['compile'] = {is_compiled}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), extra)
        begun = time.monotonic()
        ranks = interpreter.start_ranks(
            ["evomesh", "train", "config.py"], 2, cwd=folder
        )
        codes = [rank.wait(3600).returncode for rank in ranks]
    return sum(code != 0 for code in codes), time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=14)
    parser.add_argument("--silence", type=float, default=3.0)
    parser.add_argument("--normal-steps", type=int, default=10_000)
    parser.add_argument(
        "--compiled", action="store_true", help="compile the model of the normal run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(WORDS))
    args = parser.parse_args()
    draw = random.Random(args.seed)
    interpreter = Interpreter()
    right: Counter[str] = Counter()
    wrong = []
    for case in range(args.cases):
        kind = args.kinds[case % len(args.kinds)]
        found = run_case(interpreter, HangCase.drawn(kind, draw), args.silence)
        right[kind] += not found
        wrong += [found] if found else []
    interpreter.close()
    print("\n".join(wrong), file=sys.stderr)
    for kind, count in right.items():
        print(f"{kind:24s} {count} named rightly")
    if args.cases:
        share = right.total() / args.cases
        print(f"{right.total()} of {args.cases} hangs named rightly ({share:.1%})")
    if args.normal_steps:
        alarms, seconds = normal_steps(
            Interpreter(), args.normal_steps, args.silence, args.compiled
        )
        print(f"{alarms} false alarms in {args.normal_steps} steps ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
