"""Check that a token file can be read at all, before anything looks at its lines."""

from __future__ import annotations

import stat
from pathlib import Path

from evomesh.errors import UserError

# First bytes of compressed files. Offsets of the meta count plain bytes, so that a
# compressed token file cannot be read by number.
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
}


class UnreadableFileError(UserError):
    """The system does not let a token file be read, which says nothing about its content."""


def check_file(path: Path) -> int:
    """Return the size in bytes of a token file, after checking that it exists and is neither empty nor compressed.

    Raises:
        UnreadableFileError: the system refuses to read it.
        UserError: it is empty or compressed.
    """
    try:
        status = path.stat()
        size = status.st_size
        start = b""
        if stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
            with path.open("rb") as file:
                start = file.read(6)
    except OSError as error:
        raise UnreadableFileError(
            f"cannot read the token file: {error.strerror}",
            where=str(path),
            code="EVO-DATA-001",
        ) from None
    if size == 0:
        raise UserError(
            "the token file is empty (0 bytes)",
            where=str(path),
            fix="delete it or tokenize again",
            code="EVO-DATA-007",
        )
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            raise UserError(
                f"the token file is {kind}-compressed (it starts with bytes {magic.hex(' ')})",
                where=str(path),
                expected="plain lines",
                fix=f"decompress it first, then: evomesh data repair {path}",
                code="EVO-DATA-008",
            )
    return size
