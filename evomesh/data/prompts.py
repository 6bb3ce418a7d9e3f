"""Tokenised prompts: the documents of every folder with token files, one task a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomesh.data.packing.validation import group_sets
from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.token_files.fingerprint import check_vocabulary
from evomesh.data.token_files.folders import TokenFile, check_folder, find_files


@dataclass(frozen=True)
class TokenizedPrompt:
    """A document, the file it stands in (relative to its folder) and its line there, from 1."""

    ids: list[int]
    file: str
    line: int


def find_tasks(folder: str, key: str, vocab_size: int) -> dict[str, list[TokenFile]]:
    """Token files by task: their folder's name, or its path where two folders share a name.

    Args:
        key: the config key that named the folder, for messages.
    Raises:
        UserError: no folder, no token file in it, or one with ids the model does not know.
    """
    root = check_folder(folder, key)
    files = find_files(root, key)
    check_vocabulary(files, vocab_size)
    sets = group_sets(files, root.resolve().name)
    return {name: sets[name] for name in sorted(sets)}


def read_prompts(files: Sequence[TokenFile], vocab_size: int) -> list[TokenizedPrompt]:
    """All documents of a task, in file order. Inputs that are no training targets (negative ids) count as others do.

    Raises:
        UserError: a broken file: names file, row and byte.
    """
    prompts = []
    for file in files:
        dataset = BinDataset(file.path, name=file.name, vocab_size=vocab_size)
        for row in range(len(dataset)):
            ids = np.abs(dataset.read(np.array([row]))).tolist() if dataset.lengths[row] else []
            prompts.append(TokenizedPrompt(ids, file.name, row + 1))
    return prompts
