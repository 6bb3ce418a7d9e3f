"""Find token files: ``folder/<type>/.../*.bin`` in an order that is the same on every file system."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from evomesh.config.folders import FolderPlace
from evomesh.config.user import expand_home, user_name
from evomesh.errors import UserError
from evomesh.outside_errors import fix_for
from evomesh.storage.atomic_file import write_atomically
from evomesh.user_files import read_text

TREE = "folder/TYPE/.../NAME.bin with NAME.bin.meta beside it (TYPE: cn, en, code, ja, ar, kaoshi or any name)"


@dataclass(frozen=True)
class TokenFile:
    """A token file.

    Attributes:
        path: as opened.
        name: relative to the data folder, with forward slashes; used in reports and order files.
    """

    path: Path
    name: str

    @property
    def folder(self) -> PurePosixPath:
        """Folder of its name; "." directly in the data folder."""
        return PurePosixPath(self.name).parent

    @property
    def type(self) -> str:
        """Type of its documents: the first folder of its name."""
        return PurePosixPath(self.name).parts[0]


def walk(folder: Path, suffix: str) -> Iterator[TokenFile]:
    """Yield the files below ``folder`` ending in ``suffix``: a folder's files before its folders, both by name.

    Links are followed, but a folder that is reached again through a link inside itself
    is not entered again.
    """
    yield from _walk(folder, "", suffix, frozenset())


def _walk(
    directory: Path, prefix: str, suffix: str, parents: frozenset[str]
) -> Iterator[TokenFile]:
    """Walk one folder.

    Args:
        prefix: path of the folder relative to the root, with a slash at its end.
        parents: real paths of the folders on the way to it.
    """
    real_path = os.path.realpath(directory)
    if real_path in parents:
        return
    parents |= {real_path}
    # InternEvo sorts the files of a folder, but enters folders as the file system lists
    # them, so that the order of the data differs between machines. Here both are sorted.
    entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if entry.is_file() and path.name.endswith(suffix):
            yield TokenFile(path, prefix + path.name)
    for entry in entries:
        if entry.is_dir():
            inner_prefix = f"{prefix}{entry.name}/"
            yield from _walk(Path(entry.path), inner_prefix, suffix, parents)


def find_bins(path: str) -> list[TokenFile]:
    """Return the token file at a path, or all below a folder, in walk order.

    Raises:
        UserError: there is nothing at the path, no token file, or no permission to read it.
    """
    root = expand_home(path)
    if root.is_dir():
        check_folder(root, "PATH")
        files = list(walk(root, ".bin"))
        if not files:
            raise UserError(
                "no .bin file below the folder",
                where=str(root),
                expected=TREE,
                code="EVO-DATA-002",
            )
        return files
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise UserError(
            f"cannot read it: {error.strerror}",
            where=str(root),
            expected="a .bin file, or a folder with such files",
            fix=fix_for(error.errno),
            code="EVO-DATA-001",
        ) from None
    # A pipe would block forever, and every file is read twice.
    if not stat.S_ISREG(mode) or root.suffix != ".bin":
        raise UserError(
            "not a token file",
            where=str(root),
            expected="a regular file whose name ends in .bin, or a folder with such files",
            fix="tokenize text into one: evomesh tokenize TEXT --output DIR/TYPE/NAME.bin --tokenizer T",
            code="EVO-DATA-008",
        )
    if not os.access(root, os.R_OK):
        raise UserError(
            "cannot read it: Permission denied",
            where=str(root),
            fix=fix_for(errno.EACCES),
            code="EVO-DATA-001",
        )
    return [TokenFile(root, str(root))]


def group_sets(
    files: Sequence[TokenFile], root_name: str
) -> dict[str, list[TokenFile]]:
    """Group files by set: one per folder, named after it, or by its path if two folders share a name.

    Args:
        root_name: name of the set of files that are in no folder.
    """
    folders = {file.folder for file in files}
    folders_with_name = Counter(folder.name for folder in folders)

    # The files a/web/1.bin, b/web/2.bin and b/code/3.bin are the sets "a/web", "b/web"
    # and "code".
    sets: dict[str, list[TokenFile]] = {}
    for file in files:
        folder = file.folder
        if folder == PurePosixPath():
            name = root_name
        elif folders_with_name[folder.name] == 1:
            name = folder.name
        else:
            name = folder.as_posix()
        sets.setdefault(name, []).append(file)
    return dict(sorted(sets.items()))


def check_folder(folder: str | Path, key: str, expected: str = TREE) -> Path:
    """Return ``folder`` as a path, after checking that it can be listed.

    Args:
        expected: what the folder should hold, for the message.
    Raises:
        UserError: it is missing, not a folder, in an object store, or not readable.
    """
    if FolderPlace.of(str(folder)).bucket:
        raise UserError(
            f"found {folder}, but data is read from a disk",
            where=key,
            expected=expected,
            fix="copy the files to each machine before the run, or mount the bucket",
            code="EVO-DATA-001",
        )
    path = expand_home(folder)
    try:
        os.listdir(path)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {path}: {error.strerror} (as user {user_name()})",
            where=key,
            expected=expected,
            fix=_fix_of_variable(path),
            code="EVO-DATA-001",
        ) from None
    return path


def _fix_of_variable(path: Path) -> str:
    """Return what to write for a path like $DATA/train, "" for any other."""
    name = re.search(r"\$\{?(\w+)", str(path))
    if name is None:
        return ""
    return (
        f"variables of the shell mean nothing in a path: write os.environ[{name[1]!r}]"
    )


def find_files(
    folder: Path, key: str, order_path: str | None = None
) -> list[TokenFile]:
    """Return the token files of a folder, in walk order or in the order of an order file.

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
                code="EVO-DATA-003",
            )
    if not files:
        entries = sorted(os.listdir(folder))
        listing = ", ".join(entries[:8]) or "nothing"
        if len(entries) > 8:
            listing += f" and {len(entries) - 8} more"
        raise UserError(
            f"no .bin file below {folder} (it contains: {listing})",
            where=key,
            expected=TREE,
            fix=f"tokenize text into it: evomesh tokenize TEXT --output {folder}/en/data.bin --tokenizer T",
            code="EVO-DATA-002",
        )
    return (
        files
        if order_path is None
        else _reorder(files, folder, expand_home(order_path))
    )


def _reorder(files: list[TokenFile], folder: Path, order_path: Path) -> list[TokenFile]:
    """Return the files in the order of an order file, which must list each of them once."""
    by_name = {file.name: file for file in files}
    listed = read_order(order_path)
    repeated = Counter(listed) - Counter(set(listed))
    problems = [
        f"  listed, not in {folder}: {name}" for name in listed if name not in by_name
    ]
    problems += [
        f"  in {folder}, not listed: {name}" for name in sorted(by_name.keys() - listed)
    ]
    problems += [f"  listed twice: {name}" for name in sorted(repeated)]
    if problems:
        header = "the order file and the folder do not have the same files"
        raise UserError(
            "\n".join([header, *problems]),
            where=str(order_path),
            fix=f"rewrite it: evomesh data order {folder} --output {order_path}",
            code="EVO-DATA-025",
        )
    return [by_name[name] for name in listed]


def read_order(path: Path) -> list[str]:
    """Read the names of an order file: one relative path per line; blank lines and Windows line ends are ignored.

    Raises:
        UserError: it cannot be read.
    """
    file = path / "data_order.txt" if path.is_dir() else path
    expected = "an order file: one relative path per line"
    lines = read_text(file, expected=expected).splitlines()
    return [
        PurePosixPath(line.rstrip("\r")).as_posix() for line in lines if line.strip()
    ]


def assign_types(files: list[TokenFile], folder: Path) -> list[str]:
    """Return the sorted type names, whose indexes are the type ids: the folders directly below ``folder``.

    Raises:
        UserError: a file is directly in ``folder``, or below a second folder that is also the name of a type.
    """
    rule = f"the first folder below {folder} is the type"
    for file in files:
        if "/" not in file.name:
            raise UserError(
                "the token file is directly in the data folder, so it has no type",
                where=str(file.path),
                expected=TREE,
                fix=f"move it (and its .meta) into a folder such as {folder}/en/",
                code="EVO-DATA-021",
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
                code="EVO-DATA-021",
            )
    return types


def match_key(file: str, keys: Iterable[str], where: str) -> str | None:
    """Return the key that is part of a file's name, None if there is none.

    Args:
        where: the config key, for the message.

    Raises:
        UserError: several keys are.
    """
    matches = [key for key in keys if key in file]
    if len(matches) > 1:
        raise UserError(
            f"{file} matches several keys: {', '.join(matches)}",
            where=where,
            expected="at most one key that is part of the path",
            code="EVO-DATA-022",
        )
    return matches[0] if matches else None


def write_order(folder: str | Path, output: Path, suffix: str = ".bin") -> int:
    """Write the order of ``walk``, one path relative to ``folder`` per line; return the number of files.

    Raises:
        UserError: there is no such file below the folder.
    """
    root = check_folder(folder, "data folder")
    names = [file.name for file in walk(root, suffix)]
    if not names:
        raise UserError(
            f"no file ending in {suffix!r} below {folder}",
            where="data folder",
            code="EVO-DATA-002",
        )
    with write_atomically(output) as file:
        file.writelines(f"{name}\n".encode() for name in names)
    return len(names)
