"""``X.bin.json``: how a token file was made, written by ``evomesh tokenize``; absent for files of other tools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from evomesh.data.token_files.folders import TokenFile
from evomesh.errors import UserError


def fingerprint_path(bin_path: str | Path) -> Path:
    """Return the path of a token file's fingerprint."""
    return Path(f"{bin_path}.json")


def read_fingerprint(bin_path: str | Path) -> dict[str, Any] | None:
    """Read the fingerprint beside a token file; None when there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    path = fingerprint_path(bin_path)
    if not path.exists():
        return None
    try:
        record = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        found = f"not JSON ({error})"
    else:
        if isinstance(record, dict):
            return record
        found = "not a JSON object"
    raise UserError(
        found, where=str(path), fix="delete it or tokenize again", code="EVO-DATA-004"
    )


def check_vocabulary(files: Sequence[TokenFile], vocab_size: int) -> None:
    """Refuse a file whose recorded largest id is outside the vocabulary; files without a record are checked when read.

    Raises:
        UserError: names file, line and id.
    """
    for file in files:
        record = read_fingerprint(file.path)
        if record and record.get("max_id", -1) >= vocab_size:
            raise UserError(
                f"token id {record['max_id']} is outside the model's vocabulary",
                where=f"{file.path} line {record.get('max_id_line', '?')}",
                expected=f"ids below model.vocab_size={vocab_size}",
                fix=f"set model.vocab_size to at least {record.get('vocab_size', record['max_id'] + 1)}, "
                "or tokenize with the model's tokenizer",
                code="EVO-DATA-006",
            )


def check_same_tokenizer(files: Sequence[TokenFile], allow: bool) -> None:
    """Refuse files that were made with different tokenizers, unless ``data.allow_tokenizer_mismatch``.

    Raises:
        UserError: names two files and their tokenizers.
    """
    seen: dict[str, TokenFile] = {}
    for file in files:
        record = read_fingerprint(file.path)
        if record and "tokenizer_hash" in record:
            seen.setdefault(record["tokenizer_hash"], file)
    if len(seen) > 1 and not allow:
        (one, first), (two, second) = list(seen.items())[:2]
        raise UserError(
            f"two tokenizers made these files: {first.path} with {one[:12]}, {second.path} with {two[:12]}",
            where="data.train_folder and data.valid_folder",
            expected="one tokenizer",
            fix="tokenize one of them again, or set data.allow_tokenizer_mismatch=True",
            code="EVO-DATA-019",
        )


def files_of_other_tokenizer(
    paths: Iterable[Path], tokenizer_hash: str
) -> dict[Path, str]:
    """Return the token files that another tokenizer made, with what their records call it.

    Files without a record, such as those of other tools, are not among them.

    Raises:
        UserError: a record is not a JSON object.
    """
    found = {}
    for path in paths:
        record = read_fingerprint(path) or {}
        made_with = str(record.get("tokenizer_hash", tokenizer_hash))
        if made_with != tokenizer_hash:
            name = str(record.get("tokenizer", "tokenizer"))
            found[path] = f"{name} {made_with[:12]}"
    return found


def other_tokenizer_warning(
    paths: Iterable[Path], tokenizer_hash: str, tokenizer_name: str
) -> str | None:
    """Return one sentence on the token files that another tokenizer made; None without such files.

    Args:
        tokenizer_name: of the tokenizer in use, as the user wrote it.

    Raises:
        UserError: a record is not a JSON object.
    """
    found = files_of_other_tokenizer(paths, tokenizer_hash)
    if not found:
        return None
    first, made_with = next(iter(found.items()))
    more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
    return (
        f"{first}{more}: made with another tokenizer ({made_with}) than {tokenizer_name} "
        f"({tokenizer_hash[:12]}), so the same id stands for different texts"
    )
