"""Make the demo's dataset from text that comes with every Python.

    python tools/demo_data.py FOLDER

The text is the standard library's source (type `code`) and the language reference in `pydoc_data` (type `en`). Writes
FOLDER/tokenizer.json (byte-level BPE), FOLDER/raw/{train,valid}/{code,en}.jsonl and the token files
FOLDER/{train,valid}/{code,en}/stdlib.bin. One module in twenty and one topic in eight are held out, chosen by a hash of
the name. A complete folder that was made from the same text stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
HELD_OUT_EVERY = {"code": 20, "en": 8}  # one document in this many is held out
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2
PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "concurrent/futures",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml/dom",
    "xml/etree",
    "xml/sax",
)


class Document(NamedTuple):
    """A text of the dataset: its type, its name and the text itself."""

    type: str
    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        number = int.from_bytes(digest[:4], "big")
        return number % HELD_OUT_EVERY[self.type] == 0


def read_documents() -> Iterator[Document]:
    """Yield the standard library's modules and the topics of Python's built-in help."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        for path in sorted((library / package).glob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document("code", f"{package}/{path.name}", text)
    for name in sorted(topics):
        yield Document("en", name, topics[name])


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Train a byte-level BPE on texts and save it."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def write_raw(folder: Path, documents: list[Document]) -> list[Path]:
    """Write a jsonl file for each split and type; return the files."""
    lines_of_file: dict[Path, list[str]] = {}
    for document in documents:
        split = "valid" if document.is_held_out else "train"
        path = folder / "raw" / split / f"{document.type}.jsonl"
        line = json.dumps({"text": document.text})
        lines_of_file.setdefault(path, []).append(line)
    for path, lines in lines_of_file.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sorted(lines_of_file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder

    # The folder is complete if it has the hash of this program and of the text that it would be made from.
    documents = list(read_documents())
    all_text = "".join(document.text for document in documents)
    source_hash = hashlib.sha256(
        Path(__file__).read_bytes() + all_text.encode()
    ).hexdigest()
    hash_file = folder / "source.sha256"
    if hash_file.exists() and hash_file.read_text() == source_hash:
        print(f"{folder}: already made from the same text")
        return

    print(
        f"{folder}: {len(documents)} documents, {len(all_text) / 1e6:.1f} million characters"
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(
        [document.text for document in documents if not document.is_held_out], tokenizer
    )
    print(f"{tokenizer}: byte-level BPE of {VOCAB_SIZE} tokens")
    for raw in write_raw(folder, documents):
        output = folder / raw.parent.name / raw.stem / "stdlib.bin"
        command = [
            sys.executable,
            "-m",
            "evomesh",
            "tokenize",
            str(raw),
            "--output",
            str(output),
        ]
        subprocess.run([*command, "--tokenizer", str(tokenizer), "--eos"], check=True)
    hash_file.write_text(source_hash)


if __name__ == "__main__":
    main()
