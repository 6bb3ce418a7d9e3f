"""``evomesh tokenize`` against the tokenizer library alone, and its memory against the size of the input.

python benchmarks/tokenizing.py [--megabytes 40] [--large-megabytes 2000] [--tokenizer PATH]

Text: the sources of Python's standard library, repeated. The library alone encodes the same texts in the same batches
from memory and throws the ids away. Runs alternate; the ratio is of the medians. Processor seconds count all
threads: with other programs running only their ratio means something.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 32000
ROUNDS = 5


def stdlib() -> list[str]:
    """Texts of a few kilobytes."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if "site-packages" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [text[start : start + 4000] for start in range(0, len(text), 4000)]
    return found


def texts(megabytes: float) -> Iterator[str]:
    size = 0
    for number, text in enumerate(itertools.cycle(stdlib())):
        if size > megabytes * 1e6:
            return
        size += len(text)
        yield f"{number} {text}"


def write(path: Path, megabytes: float) -> None:
    with path.open("w", encoding="utf-8") as file:
        if path.suffix == ".json":
            file.write("[")
        for number, text in enumerate(texts(megabytes)):
            line = json.dumps({"text": text}, ensure_ascii=False)
            file.write(f"{',' if number and path.suffix == '.json' else ''}{line}\n")
        if path.suffix == ".json":
            file.write("]\n")


def train_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib(), trainer)
    tokenizer.save(str(path))


def library(source: str, tokenizer_path: str) -> None:
    """The library alone, in this process; prints seconds and tokens."""
    from evomesh.data.prepare.tokenize import BATCH_CHARS
    from evomesh.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    batches: list[list[str]] = [[]]
    chars = 0
    with open(source, encoding="utf-8") as file:
        for line in file:
            batches[-1].append(json.loads(line)["text"])
            chars += len(batches[-1][-1])
            if chars >= BATCH_CHARS:
                batches.append([])
                chars = 0
    start, used = time.perf_counter(), time.process_time()
    tokens = sum(len(ids) for batch in batches for ids in tokenizer.encode_batch(batch))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    print(json.dumps({"seconds": seconds, "used": used, "tokens": tokens}))


def ours(source: str, tokenizer_path: str, output: str) -> None:
    """The whole command, in this process; prints seconds, tokens and the peak of its memory."""
    from evomesh.data.prepare.tokenize import (
        TextOptions,
        set_encoder_threads,
        tokenize_files,
    )
    from evomesh.data.records.source_files import find_source_files
    from evomesh.data.tokenizer import load_tokenizer

    set_encoder_threads(None)
    tokenizer = load_tokenizer(tokenizer_path)
    start, used = time.perf_counter(), time.process_time()
    facts = tokenize_files(
        find_source_files([source]), output, tokenizer, TextOptions(eos=False)
    )
    seconds, used = time.perf_counter() - start, time.process_time() - used
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(
        int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")
    )
    print(
        json.dumps(
            {"seconds": seconds, "used": used, "tokens": facts["tokens"], "peak": peak}
        )
    )


def call(*arguments: str) -> dict[str, float]:
    output = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found: dict[str, float] = json.loads(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--large-megabytes", type=float, default=2000)
    parser.add_argument(
        "--tokenizer", help="tokenizer.json or .model [a byte-level BPE trained here]"
    )
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        (library if options.part[0] == "library" else ours)(*options.part[1:])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = options.tokenizer or str(folder / "tokenizer.json")
        if not options.tokenizer:
            train_tokenizer(Path(tokenizer))
        source, output = folder / "x.jsonl", str(folder / "x.bin")
        write(source, options.megabytes)
        alone, whole = [], []
        for _ in range(ROUNDS):
            alone.append(call("--part", "library", str(source), tokenizer))
            whole.append(call("--part", "ours", str(source), tokenizer, output))
        for what, key in (("elapsed", "seconds"), ("processor", "used")):
            rates = [
                statistics.median(run["tokens"] / run[key] / 1e6 for run in runs)
                for runs in (alone, whole)
            ]
            print(
                f"Mtokens per {what} second: library alone {rates[0]:.2f}, evomesh tokenize {rates[1]:.2f}, "
                f"ratio {rates[1] / rates[0]:.2f}",
                flush=True,
            )
        print("input               peak memory")
        for kind, megabytes in itertools.product(
            ("jsonl", "json"), (options.megabytes, options.large_megabytes)
        ):
            source = folder / f"large.{kind}"
            write(source, megabytes)
            run = call("--part", "ours", str(source), tokenizer, output)
            print(
                f"{megabytes:>7.0f} MB {kind:<6} {run['peak']:>8.0f} MB  {run['seconds']:.1f} s",
                flush=True,
            )
            source.unlink()


if __name__ == "__main__":
    main()
