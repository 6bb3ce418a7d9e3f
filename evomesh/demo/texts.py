"""The demo's texts: the standard library's source and Python's built-in help, and conversations made of docstrings.

The source is of the type `code`, the language reference in `pydoc_data` of the type `en`. One module in twenty and one
topic in eight are held out, chosen by a hash of the name; of the conversations one name in ten.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from evomesh.demo import questions as questions_module
from evomesh.demo.questions import Question, read_questions

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


class DemoDocument(NamedTuple):
    """A text of the dataset: its type, its name and the text itself."""

    type: str
    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        number = int.from_bytes(digest[:4], "big")
        return number % HELD_OUT_EVERY[self.type] == 0


class DemoTexts(NamedTuple):
    """All that a dataset is made from."""

    documents: list[DemoDocument]
    questions: list[Question]

    @property
    def source_hash(self) -> str:
        """The hash of the texts and of the programs that read them."""
        files = (__file__, questions_module.__file__)
        programs = b"".join(Path(file).read_bytes() for file in files)
        texts = "".join(document.text for document in self.documents)
        source = texts + repr(self.questions)
        return hashlib.sha256(programs + source.encode()).hexdigest()

    @property
    def size(self) -> str:
        """Return how much text there is, in words."""
        characters = sum(len(document.text) for document in self.documents)
        return (
            f"{len(self.documents)} documents, {characters / 1e6:.1f} million characters; "
            f"{len(self.questions):,} questions"
        )


def read_texts() -> DemoTexts:
    """Return the texts that this Python ships."""
    return DemoTexts(list(_read_documents()), read_questions())


def _read_documents() -> Iterator[DemoDocument]:
    """Yield the standard library's modules and the topics of Python's built-in help."""
    stdlib = sysconfig.get_path("stdlib")
    library = Path(stdlib)
    for package in PACKAGES:
        folder = library / package
        for path in sorted(folder.glob("*.py")):
            name = f"{package}/{path.name}"
            text = path.read_text(encoding="utf-8", errors="replace")
            yield DemoDocument("code", name, text)
    for name in sorted(topics):
        yield DemoDocument("en", name, topics[name])


def write_documents(folder: Path, documents: Sequence[DemoDocument]) -> list[Path]:
    """Write folder/SPLIT/TYPE.jsonl for each split and type; return the files."""
    records_of_file: defaultdict[Path, list[Any]] = defaultdict(list)
    for document in documents:
        split = "train"
        if document.is_held_out:
            split = "valid"
        path = folder / split / f"{document.type}.jsonl"
        record = {"text": document.text}
        records_of_file[path].append(record)
    for path, records in records_of_file.items():
        _write_lines(path, records)
    return sorted(records_of_file)


def write_questions(folder: Path, questions: Sequence[Question]) -> list[Path]:
    """Write the conversations of each split as folder/SPLIT.jsonl; return the files."""
    files = []
    held_out = {"train": False, "valid": True}
    for split, is_held_out in held_out.items():
        conversations = []
        for question in questions:
            if question.is_held_out == is_held_out:
                conversations.append(question.conversation)
        file = folder / f"{split}.jsonl"
        _write_lines(file, conversations)
        files.append(file)
    return files


def _write_lines(path: Path, records: Sequence[Any]) -> None:
    """Write one line of JSON per record."""
    lines = [json.dumps(record) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
