"""Make the demo's dataset alone, from text that every Python ships, as `evomesh demo` and `make train` do.

    python tools/demo_data.py FOLDER

Writes FOLDER/tokenizer (byte-level BPE with a chat template), FOLDER/raw/{train,valid}/{code,en}.jsonl and their token
files FOLDER/{train,valid}/{code,en}/stdlib.bin; and for the chat FOLDER/raw/chat/{train,valid}.jsonl and the token
files FOLDER/chat/{train,valid}/docstrings/stdlib.bin. What the texts are is in evomesh/demo/texts.py.

A complete folder that was made from the same text stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evomesh.cli.demo import make_dataset
from evomesh.cli.run import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make_dataset(options.folder)


if __name__ == "__main__":
    run(main)
