"""Read .gz and .zst files as streams, raising an error where one is truncated or unpacks too far."""

from __future__ import annotations

import gzip
import io
from typing import IO, Any, cast

import zstandard

from evomesh.data.records.limits import UnpackLimitError, unpack_limit

# Bytes passed to zstandard at once: bounds the output of highly compressed files.
COMPRESSED_CHUNK = 1 << 10
BUFFER_SIZE = 1 << 20


def decompress(raw: IO[bytes], compression: str, packed_bytes: int) -> IO[bytes]:
    """Return a stream of the decompressed bytes of ``raw``.

    Args:
        compression: "gz", "zst" or "" (none).
        packed_bytes: size of the compressed file, which limits what it may unpack to.

    Raises:
        UnpackLimitError: on reading past that limit.
    """
    unpacked: io.RawIOBase
    if compression == "gz":
        unpacked = cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))
    elif compression == "zst":
        unpacked = _ZstandardStream(raw)
    else:
        return raw
    limited = _LimitedStream(unpacked, unpack_limit(packed_bytes))
    return io.BufferedReader(limited, BUFFER_SIZE)


class _LimitedStream(io.RawIOBase):
    """A stream that may be read up to a number of bytes."""

    def __init__(self, stream: io.RawIOBase, limit: int) -> None:
        self._stream = stream
        self._left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._stream.readinto(buffer) or 0
        self._left -= count
        if self._left < 0:
            raise UnpackLimitError
        return count


class _ZstandardStream(io.RawIOBase):
    """Decompressed bytes of a zstandard file, frame after frame.

    The library's own stream reader cannot tell a truncated file from one that ends
    there.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = memoryview(b"")  # decompressed bytes that were not yet read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer)
        while not self._ready:
            if not self._decompress_chunk():
                return 0
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress_chunk(self) -> bool:
        """Decompress the next chunk into ``_ready``; return False at the end of the file."""
        inside_frame = self._frame is not None and not self._frame.eof
        # A finished frame may have been given bytes of the next one.
        unused = (
            self._frame.unused_data
            if self._frame is not None and self._frame.eof
            else b""
        )
        chunk = unused or self._raw.read(COMPRESSED_CHUNK)
        if not chunk:
            if inside_frame:
                raise EOFError("the file ends in the middle of a zstandard frame")
            return False
        if self._frame is None or not inside_frame:
            self._frame = self._decompressor.decompressobj()
        self._ready = memoryview(self._frame.decompress(chunk))
        return True
