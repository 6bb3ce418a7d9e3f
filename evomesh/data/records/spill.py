"""Copy a stream to a temporary file, for readers that must seek in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from evomesh.errors import UserError
from evomesh.outside_errors import fix_for

COPY_BYTES = 1 << 20


@contextmanager
def spilled(source: IO[bytes], size: int, where: str) -> Iterator[IO[bytes]]:
    """Yield the first ``size`` bytes of a stream as a file; it has no name, so nothing of it outlives the process.

    Raises:
        UserError: the temporary folder cannot hold it.
    """
    try:
        folder = tempfile.gettempdir()
        copy = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed below
    except OSError as error:
        raise _cannot_spill(error, where, "a temporary folder", 0) from None
    with copy:
        written = 0
        # Errors of reading pass: the caller knows what the stream is.
        while chunk := source.read(min(COPY_BYTES, size - written)):
            try:
                copy.write(chunk)
                copy.flush()
            except OSError as error:
                raise _cannot_spill(error, where, folder, written) from None
            written += len(chunk)
        copy.seek(0)
        yield cast(IO[bytes], copy)


def _cannot_spill(error: OSError, where: str, folder: str, written: int) -> UserError:
    reason = error.strerror or str(error)
    return UserError(
        f"cannot unpack it to {folder}: {reason} (after {written:,} bytes)",
        where=where,
        expected="room for the unpacked file in the temporary folder",
        fix=f"export TMPDIR=FOLDER with more room, or unpack the file yourself; {fix_for(error.errno)}",
        code="EVO-DATA-026",
    )
