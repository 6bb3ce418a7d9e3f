"""Finding token files: ``folder/<type>/.../*.bin`` in an order that is the same on every file system."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from evomesh.errors import UserError
from evomesh.storage.atomic_file import write_atomically

TREE = (
    "folder/TYPE/.../NAME.bin with NAME.bin.meta beside it (TYPE: cn, en, code, ja, ar, kaoshi or any name)"
)


@dataclass(frozen=True)
class TokenFile:
    """Path as opened, and relative to its folder with forward slashes (its name in reports and order files)."""

    path: Path
    name: str

    @property
    def type(self) -> str:
        return PurePosixPath(self.name).parts[0]


def walk(folder: Path, suffix: str) -> Iterator[TokenFile]:
    """Files below ``folder`` ending in ``suffix``, following links; a folder's files come before its folders, by name.

    A folder that is reached again through a link inside itself is not entered again.
    """

    def enter(directory: Path, prefix: str, above: frozenset[str]) -> Iterator[TokenFile]:
        real = os.path.realpath(directory)
        if real in above:
            return
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_file() and entry.name.endswith(suffix):
                yield TokenFile(Path(entry.path), prefix + entry.name)
        for entry in entries:
            if entry.is_dir():
                yield from enter(Path(entry.path), f"{prefix}{entry.name}/", above | {real})

    yield from enter(folder, "", frozenset())


def check_folder(folder: str | Path, key: str) -> Path:
    """``folder`` as a path that can be listed.

    Raises:
        UserError: it is missing, not a folder, or may not be read.
    """
    path = Path(folder).expanduser()
    try:
        os.listdir(path)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {path}: {error.strerror} (as user {getpass.getuser()})",
            where=key,
            expected=TREE,
        ) from None
    return path


def find_files(folder: Path, key: str, order_path: str | None = None) -> list[TokenFile]:
    """Token files of a folder, in walk order or in that of an order file.

    Raises:
        UserError: there is none, a meta lacks its token file, or order file and folder differ.
    """
    files = list(walk(folder, ".bin"))
    bins = {file.name for file in files}
    for meta in walk(folder, ".bin.meta"):
        if meta.name.removesuffix(".meta") not in bins:
            raise UserError(
                "the meta has no token file beside it",
                where=str(meta.path),
                expected=str(meta.path).removesuffix(".meta"),
                fix="restore the .bin, or delete the .meta",
            )
    if not files:
        found = sorted(os.listdir(folder))
        listing = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise UserError(
            f"no .bin file below {folder} (it holds: {listing or 'nothing'})",
            where=key,
            expected=TREE,
            fix=f"tokenise text into it: evomesh tokenize TEXT --output {folder}/en/data.bin --tokenizer T",
        )
    return files if order_path is None else _reorder(files, folder, Path(order_path).expanduser())


def _reorder(files: list[TokenFile], folder: Path, order_path: Path) -> list[TokenFile]:
    by_name = {file.name: file for file in files}
    names = read_order(order_path)
    missing = [name for name in names if name not in by_name]
    extra = sorted(set(by_name) - set(names))
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    if missing or extra or twice:
        lines = [f"  listed, not in {folder}: {name}" for name in missing]
        lines += [f"  in {folder}, not listed: {name}" for name in extra]
        lines += [f"  listed twice: {name}" for name in twice]
        raise UserError(
            "the order file and the folder do not hold the same files\n" + "\n".join(lines),
            where=str(order_path),
            fix=f"write it anew: evomesh data order {folder} --output {order_path}",
        )
    return [by_name[name] for name in names]


def read_order(path: Path) -> list[str]:
    """Names of an order file: one relative path a line, blank lines and line-end kinds ignored.

    Raises:
        UserError: it cannot be read.
    """
    file = path / "data_order.txt" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the order file: {error.strerror}", where=str(path)) from None
    return [PurePosixPath(line.rstrip("\r")).as_posix() for line in lines if line.strip()]


def assign_types(files: list[TokenFile], folder: Path) -> list[str]:
    """Type names, sorted, whose places are the type ids: the folders right below ``folder`` that hold token files.

    Raises:
        UserError: a file lies right in ``folder``, or below a second folder that is also the name of a type.
    """
    rule = f"the first folder below {folder} is the type"
    for file in files:
        if "/" not in file.name:
            raise UserError(
                "the token file lies directly in the data folder, so it has no type",
                where=str(file.path),
                expected=TREE,
                fix=f"move it (and its .meta) into a folder such as {folder}/en/",
            )
    types = sorted({file.type for file in files})
    for file in files:
        inner = [part for part in PurePosixPath(file.name).parts[1:-1] if part in types]
        if inner:
            raise UserError(
                f"the path names two types, {file.type} and {inner[0]}; it would be read as {file.type}",
                where=str(file.path),
                expected=rule,
                fix=f"rename the inner folder {inner[0]}",
            )
    return types


def write_order(folder: str | Path, output: Path, suffix: str = ".bin") -> int:
    """Write the walk's order, one path relative to ``folder`` a line; returns the number of files.

    Raises:
        UserError: no such file below the folder.
    """
    names = [file.name for file in walk(check_folder(folder, "data folder"), suffix)]
    if not names:
        raise UserError(f"no file ending in {suffix!r} below {folder}", where="data folder")
    with write_atomically(output) as file:
        file.writelines(f"{name}\n".encode() for name in names)
    return len(names)
