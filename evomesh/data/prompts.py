"""Read tokenized prompts: the documents of every folder of token files; each folder is a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.token_files.fingerprint import check_vocabulary
from evomesh.data.token_files.folders import (
    TokenFile,
    check_folder,
    find_files,
    group_sets,
)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A document used as a prompt.

    Attributes:
        ids: its tokens.
        file: name of its file, relative to the folder.
        line: line number in the file, from 1.
    """

    ids: list[int]
    file: str
    line: int


def find_tasks(folder: str, key: str, vocab_size: int) -> dict[str, list[TokenFile]]:
    """Return the token files of each task, which is named after their folder, or its path if two folders share a name.

    Args:
        key: the config key that names the folder, for messages.

    Raises:
        UserError: there is no folder, no token file in it, or a file has ids outside the vocabulary.
    """
    root = check_folder(folder, key)
    files = find_files(root, key)
    check_vocabulary(files, vocab_size)
    return group_sets(files, root.resolve().name)


def read_prompts(files: Sequence[TokenFile], vocab_size: int) -> list[TokenizedPrompt]:
    """Read all documents of a task, in file order; masked tokens (negative ids) are treated like any other.

    Raises:
        UserError: a file is damaged; names file, row and byte.
    """
    prompts = []
    for file in files:
        dataset = BinDataset(file.path, name=file.name, vocab_size=vocab_size)
        for row in range(len(dataset)):
            tokens = dataset.read(np.array([row]))
            prompt = TokenizedPrompt(
                ids=np.abs(tokens).tolist(),
                file=file.name,
                line=row + 1,
            )
            prompts.append(prompt)
    return prompts
