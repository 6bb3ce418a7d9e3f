"""Make the demo's dataset from text that comes with every Python.

    python tools/demo_data.py FOLDER

The text is the standard library's source (type `code`) and the language reference in `pydoc_data` (type `en`). Writes
FOLDER/tokenizer (byte-level BPE with a chat template), FOLDER/raw/{train,valid}/{code,en}.jsonl and the token files
FOLDER/{train,valid}/{code,en}/stdlib.bin. One module in twenty and one topic in eight are held out, chosen by a hash of
the name.

The docstrings become conversations for the chat: FOLDER/raw/chat/{train,valid}.jsonl and the token files
FOLDER/chat/{train,valid}/docstrings/stdlib.bin. One name in ten is held out.

A complete folder that was made from the same text stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from demo_chat import Question, read_questions
from demo_chat import __file__ as demo_chat_file

VOCAB_SIZE = 4096
HELD_OUT_EVERY = {"code": 20, "en": 8}  # one document in this many is held out
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


def write_raw_questions(folder: Path, questions: list[Question]) -> list[Path]:
    """Write the conversations of each split as jsonl; return the files."""
    files = []
    for split, is_held_out in (("train", False), ("valid", True)):
        chosen = [one for one in questions if one.is_held_out == is_held_out]
        lines = [json.dumps(question.conversation) for question in chosen]
        file = folder / "raw" / "chat" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files.append(file)
    return files


def tokenize(file: Path, output: Path, tokenizer: Path, *options: str) -> None:
    """Write a token file of a jsonl file."""
    paths = [str(file), "--output", str(output), "--tokenizer", str(tokenizer)]
    run("tokenize", *paths, "--eos", *options)


def run(*arguments: str) -> None:
    """Run an evomesh command."""
    subprocess.run([sys.executable, "-m", "evomesh", *arguments], check=True)


def make_dataset(
    folder: Path, documents: list[Document], questions: list[Question]
) -> None:
    """Write raw text, tokenizer and token files of documents and questions."""
    raw_files = write_raw(folder, documents)
    tokenizer = folder / "tokenizer"
    shutil.rmtree(tokenizer, ignore_errors=True)  # of other text
    train_texts = [str(file) for file in raw_files if file.parent.name == "train"]
    options = ["--vocab-size", str(VOCAB_SIZE), "--chat", "chatml"]
    run("tokenizer", "train", *train_texts, "--output", str(tokenizer), *options)
    for file in raw_files:
        output = folder / file.parent.name / file.stem / "stdlib.bin"
        tokenize(file, output, tokenizer)
    for file in write_raw_questions(folder, questions):
        output = folder / "chat" / file.stem / "docstrings" / "stdlib.bin"
        messages = ["--format", "messages", "--chat-template", "tokenizer"]
        tokenize(file, output, tokenizer, *messages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder

    # The folder is complete if it has the hash of these programs and of the text that it would be made from.
    documents = list(read_documents())
    all_text = "".join(document.text for document in documents)
    questions = read_questions()
    programs = b"".join(Path(file).read_bytes() for file in (__file__, demo_chat_file))
    source_text = all_text + repr(questions)
    source_hash = hashlib.sha256(programs + source_text.encode()).hexdigest()
    hash_file = folder / "source.sha256"
    if hash_file.exists() and hash_file.read_text() == source_hash:
        print(f"{folder}: already made from the same text")
        return

    size = f"{len(documents)} documents, {len(all_text) / 1e6:.1f} million characters"
    print(f"{folder}: {size}; {len(questions):,} questions", flush=True)
    make_dataset(folder, documents, questions)
    hash_file.write_text(source_hash)


if __name__ == "__main__":
    main()
