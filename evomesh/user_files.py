"""Read small text files that a user names, or that are in a folder of theirs.

Whatever is wrong with such a file becomes one message: missing, unreadable, a pipe or a
device, too large, in another encoding, or not JSON, brackets nested beyond Python's limit
included.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from evomesh.errors import UserError
from evomesh.outside_errors import fix_for

MAX_BYTES = 256 << 20
# ``--key-file <(command)`` and ``/dev/stdin``: pipes that the shell has connected.
SHELL_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def read_text(file: Path, where: str = "", expected: str = "") -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Args:
        where: what named the file, such as an option; "": the file itself.
        expected: what the file should hold.

    Raises:
        UserError: it cannot be read, is not a regular file, is too large, or is not UTF-8.
    """
    place = where or str(file)
    name = f"{file} " if where else ""
    try:
        unfit = _unfit(file)
        if unfit:
            raise UserError(
                f"{name}{unfit}",
                where=place,
                expected=expected or "a small text file",
                code="EVO-SYS-001",
            )
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{name}cannot be read: {reason}",
            where=place,
            expected=expected,
            fix=fix_for(error.errno),
            code="EVO-SYS-001",
        ) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{name}is not UTF-8: byte 0x{byte:02x} at position {error.start}",
            where=place,
            expected=expected or "text in UTF-8",
            fix=f"convert it: iconv -f ENCODING -t UTF-8 {file}",
            code="EVO-SYS-006",
        ) from None


def _unfit(file: Path) -> str:
    """Return why a file is not to be read, "" if it may be.

    A named pipe would wait for a writer forever, and a device may never end.
    """
    status = file.stat()
    if status.st_size > MAX_BYTES:
        return f"has {status.st_size:,} bytes, more than {MAX_BYTES:,}"
    is_file_or_folder = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    if is_file_or_folder or str(file).startswith(SHELL_PIPES):
        return ""
    kind = "a named pipe" if stat.S_ISFIFO(status.st_mode) else "a device or socket"
    return f"is {kind}, not a regular file"


def read_json(file: Path, where: str = "", expected: str = "") -> Any:
    """Return the value in a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    text = read_text(file, where, expected)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        name = f"{file}: " if where else ""
        raise UserError(
            f"{name}not JSON ({error})",
            where=where or str(file),
            expected=expected,
            code="EVO-SYS-007",
        ) from None
