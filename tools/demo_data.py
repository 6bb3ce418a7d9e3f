"""Makes the demo's dataset from text that every Python has: the standard library's sources (type `code`) and the
language reference in `pydoc_data` (type `en`).

    python tools/demo_data.py FOLDER

writes FOLDER/tokenizer.json (byte-level BPE), FOLDER/raw/{train,valid}/{code,en}.jsonl and the tokenised
FOLDER/{train,valid}/{code,en}/stdlib.bin with .meta. One module in twenty and one topic in eight are held out,
chosen by a hash of the name. A finished folder made from the same text is left as it is.
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

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
HELD_OUT = {"code": 20, "en": 8}  # one document in this many
SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2
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

Document = tuple[str, str, str]  # type, name, text


def documents() -> Iterator[Document]:
    """The standard library's modules and the topics of Python's built-in help."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        for path in sorted((library / package).glob("*.py")):
            yield "code", f"{package}/{path.name}", path.read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield "en", name, topics[name]


def held_out(kind: str, name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT[kind] == 0


def train_tokenizer(texts: list[str], path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def write_raw(folder: Path, found: list[Document]) -> list[Path]:
    files: dict[Path, list[str]] = {}
    for kind, name, text in found:
        split = "valid" if held_out(kind, name) else "train"
        files.setdefault(folder / "raw" / split / f"{kind}.jsonl", []).append(json.dumps({"text": text}))
    for path, lines in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sorted(files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder

    found = list(documents())
    source = hashlib.sha256(
        Path(__file__).read_bytes() + "".join(text for *_, text in found).encode()
    ).hexdigest()
    done = folder / "source.sha256"
    if done.exists() and done.read_text() == source:
        print(f"{folder}: already made from the same text")
        return
    print(
        f"{folder}: {len(found)} documents, {sum(len(text) for *_, text in found) / 1e6:.1f} million characters"
    )
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(
        [text for kind, name, text in found if not held_out(kind, name)], folder / "tokenizer.json"
    )
    print(f"{folder}/tokenizer.json: byte-level BPE of {VOCAB_SIZE} tokens")
    for raw in write_raw(folder, found):
        output = folder / raw.parent.name / raw.stem / "stdlib.bin"
        command = [sys.executable, "-m", "evomesh", "tokenize", str(raw), "--output", str(output)]
        subprocess.run([*command, "--tokenizer", str(folder / "tokenizer.json"), "--eos"], check=True)
    done.write_text(source)


if __name__ == "__main__":
    main()
