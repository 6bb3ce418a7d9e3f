"""Read the elements of one JSON list in constant memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import IO, Any

import ijson
import numpy as np

from evomesh.data.records import limits
from evomesh.data.records.encodings import not_utf8
from evomesh.errors import UserError

UTF8_BOM = codecs.BOM_UTF8
BLOCK_BYTES = 1 << 16
# Strings, in which brackets mean nothing. A block may end inside one: that last string is
# the group. The possessive repeats (*+) keep the time proportional to the block.
STRING = re.compile(
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|("[^"\\]*+(?:\\.[^"\\]*+)*+\\?\Z)', re.DOTALL
)
STRUCTURE = b"[{]},"
NOT_STRUCTURE = bytes(set(range(256)) - set(STRUCTURE))
# What each byte adds to the depth. Outside its strings {"a":[1],"b" is { [ ] , whose
# steps are 1 1 -1 0, and a list at depth 0 is at the depths 1 2 1 1 after them.
STEP_OF_BYTE = np.zeros(256, np.int64)
STEP_OF_BYTE[list(b"[{")] = 1
STEP_OF_BYTE[list(b"]}")] = -1
STEP_OF_BYTE.flags.writeable = False


def read_elements(stream: IO[bytes], path: str) -> Iterator[Any]:
    """Yield the elements of a list.

    Raises:
        UserError: the file is not a list, not JSON or not UTF-8, or an element is too long or too deep.
    """
    start = _first_content(stream, path)
    if not start.startswith(b"["):
        first = start[:1].decode("utf-8", "replace")
        raise UserError(
            f"the file starts with {first!r}",
            where=path,
            expected="a list of records; if the file has one record per line, name it .jsonl",
            code="EVO-DATA-009",
        )
    guarded = _GuardedStream(start, stream, path)
    try:
        for value in ijson.items(guarded, "item", use_float=True):
            yield value
            guarded.start_record()
    except (ijson.JSONError, ValueError) as error:
        # Python's own limit of digits is a ValueError.
        raise UserError(
            f"not JSON ({error})",
            where=guarded.where,
            expected="a list of records",
            fix="correct the record, or write the file again",
            code="EVO-DATA-009",
        ) from None


def _first_content(stream: IO[bytes], path: str) -> bytes:
    """Return the first bytes that are not white space, without a byte order mark; b"" if there are none."""
    skipped = 0
    content = stream.read(BLOCK_BYTES).removeprefix(UTF8_BOM)
    block = content
    while block and not content.strip():
        skipped += len(block)
        if skipped > limits.MAX_RECORD_BYTES:
            raise limits.record_too_long(path)
        block = stream.read(BLOCK_BYTES)
        content = block
    return content.lstrip()


class _GuardedStream:
    """The bytes of a list, checked on their way to the parser, which would build any element whole."""

    def __init__(self, start: bytes, stream: IO[bytes], path: str) -> None:
        self._start = start
        self._stream = stream
        self._path = path
        self._complete = 0  # elements that the parser has returned
        self._seen = 0  # elements of which the end was read
        self._record_bytes = 0  # read since the parser returned the last one
        self._depth = -1  # the list itself does not count
        self._open_string = b""  # how a block that begins inside a string is to be read
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def where(self) -> str:
        """Return where the parser is."""
        return f"{self._path} record {self._complete + 1}"

    @property
    def _where_read(self) -> str:
        """Return where the stream was read to, up to a block further."""
        return f"{self._path} record {self._seen + 1}"

    def start_record(self) -> None:
        """Note that an element is complete."""
        self._complete += 1
        self._record_bytes = 0

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        block = self._start or self._stream.read(size)
        self._start = b""
        self._record_bytes += len(block)
        if self._record_bytes > limits.MAX_RECORD_BYTES:
            raise limits.record_too_long(self.where)
        self._check_encoding(block)
        self._check_depth(block)
        return block

    def _check_encoding(self, block: bytes) -> None:
        try:
            self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            self._check_depth(block[: error.start])  # counts the elements before it
            raise not_utf8(block, error, self._where_read) from None

    def _check_depth(self, block: bytes) -> None:
        """Follow the nesting through a block, and count the elements that end in it."""
        outside = self._strip_strings(block)
        structure = outside.translate(None, NOT_STRUCTURE)
        if not structure:
            return
        signs = np.frombuffer(structure, np.uint8)
        steps = STEP_OF_BYTE[signs]
        depths = self._depth + np.cumsum(steps)

        # A comma of the list itself ends an element.
        is_comma = signs == ord(",")
        ended = np.cumsum(is_comma & (depths == 0))
        is_too_deep = depths > limits.MAX_NESTING
        if is_too_deep.any():
            first = is_too_deep.argmax()
            self._seen += int(ended[first])
            raise limits.record_too_deep(self._where_read)
        self._depth = int(depths[-1])
        self._seen += int(ended[-1])

    def _strip_strings(self, block: bytes) -> bytes:
        """Return a block without its strings; the one that it ends inside is continued by the next block."""
        text = self._open_string + block
        outside = STRING.sub(rb"\1", text)
        outside, quote, inside = outside.partition(b'"')
        # After an odd number of backslashes, the next byte is escaped: a quote there does
        # not end the string.
        without_backslashes = inside.rstrip(b"\\")
        num_backslashes = len(inside) - len(without_backslashes)
        self._open_string = quote
        if num_backslashes % 2 == 1:
            self._open_string += b"\\"
        return outside
