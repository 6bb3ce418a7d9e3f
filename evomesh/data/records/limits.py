"""Limits of an input: the bytes and nesting of one record, the bytes that a small file may unpack to.

Data comes from anywhere. A quote that is never closed, a list that holds one huge element
or a megabyte that unpacks to a terabyte must end in a message, not in a machine without
memory or disk. All limits are here, far above what text needs.
"""

from __future__ import annotations

from evomesh.errors import UserError

MAX_RECORD_BYTES = 64 * 2**20  # of a line, a csv row or a JSON element
MAX_NESTING = 512  # lists and objects inside one another
# Text shrinks by a factor of 3 to 20, a log file perhaps by 100, and with gzip nothing
# by more than 1032.
MAX_UNPACK_RATIO = 250
ALWAYS_UNPACKED = 256 * 2**20  # any file may unpack to this many bytes


class UnpackLimitError(Exception):
    """A stream unpacks to more than it may; the reader knows the record and makes it a UserError."""


def unpack_limit(packed_bytes: int) -> int:
    """Return the number of bytes that a compressed file of this size may unpack to."""
    return max(ALWAYS_UNPACKED, MAX_UNPACK_RATIO * packed_bytes)


def record_too_long(where: str, fix: str = "") -> UserError:
    """Return the error for a record of more than ``MAX_RECORD_BYTES``."""
    return UserError(
        f"the record is longer than {mebibytes(MAX_RECORD_BYTES)}",
        where=where,
        expected="one document per record",
        fix=fix or "split the text into several records",
        code="EVO-DATA-013",
    )


def record_too_deep(where: str) -> UserError:
    """Return the error for JSON that is nested deeper than ``MAX_NESTING``."""
    return UserError(
        f"the record nests lists and objects more than {MAX_NESTING} deep",
        where=where,
        expected="records with text, or conversations",
        fix="remove the record: no text needs such a depth",
        code="EVO-DATA-013",
    )


def unpacks_too_far(where: str, packed_bytes: int) -> UserError:
    """Return the error for a file that unpacks to more than ``unpack_limit``."""
    limit = mebibytes(unpack_limit(packed_bytes))
    return UserError(
        f"{packed_bytes:,} bytes unpack to more than {limit}",
        where=where,
        expected=f"at most {mebibytes(ALWAYS_UNPACKED)}, or {MAX_UNPACK_RATIO} times the packed size: "
        "text shrinks by a factor of 3 to 20",
        fix="if you trust the file, unpack it yourself and name the unpacked file",
        code="EVO-DATA-013",
    )


def mebibytes(count: int) -> str:
    """Return a number of bytes as text, such as "64 MiB"."""
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count:,} bytes"
