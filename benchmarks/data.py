"""Opening a dataset and reading it: time, memory and tokens per second against the number of documents.

python benchmarks/data.py [--counts 10000,100000,1000000,10000000] [--folder DIR]

The floor of opening is one shuffle, one gather and one cumulative sum of as many numbers, measured in the same run.
Times are processor seconds of one core, so that another program's load does not change them much. The last column
is what a JSON parser alone reaches on the same lines.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

# Tokens of a document: many short ones show what a document costs, long ones what a
# token costs.
SHORT, LONG = (16, 512)
LONG_UP_TO = 100_000  # documents of LONG tokens beyond this would only fill the disk
SEQ_LEN = 4096
READ_SECONDS = 3.0


def write(path: Path, count: int, tokens: int) -> None:
    """A dataset of ``count`` documents of about ``tokens`` tokens, made from a few hundred different lines."""
    rng = np.random.RandomState(0)
    lengths = rng.randint(tokens // 2, tokens * 3 // 2, 512)
    lines = [
        f'{{"tokens": {rng.randint(1, 50000, length).tolist()}}}\n'.encode()
        for length in lengths
    ]
    picks = rng.randint(0, len(lines), count)
    sizes = np.array([len(line) for line in lines])[picks]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, count, 100_000):
            file.write(
                b"".join([lines[pick] for pick in picks[start : start + 100_000]])
            )
    with Path(f"{path}.meta").open("wb") as file:
        np.save(file, np.stack([np.cumsum(sizes) - sizes, lengths[picks]], axis=1))


def status(name: str) -> float:
    """A figure of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(folder: Path) -> None:
    """In a fresh process: open ``folder``, then read packs one after the other; prints one row."""
    from evomesh.config.data import DataConfig
    from evomesh.data.packing.corpus import open_corpus
    from evomesh.data.packing.sampler import PackSampler, SamplerPosition

    (path,) = folder.glob("en/*.bin")
    lengths = np.load(f"{path}.meta")[:, 1]
    floors = []
    for _ in range(3):
        start = time.process_time()
        order = np.arange(len(lengths), dtype=np.int32)
        np.random.RandomState(1024).shuffle(order)
        np.cumsum(lengths[order])
        floors.append(time.process_time() - start)
    del lengths, order
    config = DataConfig(seq_len=SEQ_LEN, train_folder=str(folder))
    anonymous = status("RssAnon")
    times = []
    for _ in range(3):
        start = time.process_time()
        corpus = open_corpus(config, 50000)
        times.append(time.process_time() - start)
    kept = status("RssAnon") - anonymous
    documents, tokens = corpus.report[0]["documents"], corpus.report[0]["tokens"]
    sampler = PackSampler(corpus.num_packs, 1024, 1)
    position, read = SamplerPosition(), 0
    start = time.process_time()
    while time.process_time() - start < READ_SECONDS:
        packs, position = sampler.take(position)
        corpus.read(int(packs[0]))
        read += SEQ_LEN
    speed = read / (time.process_time() - start) / 1e6
    with path.open("rb") as file:
        lines = file.readlines(20_000_000)
    begin = time.process_time()
    parsed = sum(len(orjson.loads(line)["tokens"]) for line in lines)
    parser = parsed / (time.process_time() - begin) / 1e6
    print(
        f"{documents:>11,} {tokens / documents:>8.0f} {min(times):>9.3f} {min(floors):>9.3f} "
        f"{min(times) / min(floors):>7.2f} {kept:>9.0f} {status('VmHWM'):>9.0f} {speed:>14.1f} {parser:>8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", default="10000,100000,1000000,10000000")
    parser.add_argument(
        "--folder", help="where the datasets are made [a temporary folder]"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure))
        return
    print(
        "  documents tokens/d    open s   floor s   ratio  kept MB   peak MB  Mtokens/s/core   parser",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in map(int, options.counts.split(",")):
            for tokens in (SHORT, LONG) if count <= LONG_UP_TO else (SHORT,):
                data = Path(folder) / f"{count}_{tokens}"
                write(data / "en" / "x.bin", count, tokens)
                subprocess.run(
                    [sys.executable, __file__, "--measure", str(data)], check=True
                )
                for path in data.glob("en/*"):
                    path.unlink()


if __name__ == "__main__":
    main()
