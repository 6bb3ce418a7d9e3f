"""Reading .gz and .zst as streams, with an error where one ends too early."""

from __future__ import annotations

import gzip
import io
from typing import IO, Any, cast

import zstandard

CHUNK = 1 << 14  # packed bytes handed to zstandard at once: bounds what comes out of well-packed ones
BUFFER = 1 << 20


def unpacked(raw: IO[bytes], packer: str) -> IO[bytes]:
    """The bytes of ``raw``, packed with ``packer``: "gz", "zst" or "" (as they are)."""
    if packer == "gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if packer == "zst":
        return io.BufferedReader(_ZstandardStream(raw), BUFFER)
    return raw


class _ZstandardStream(io.RawIOBase):
    """Frame after frame. The library's own stream reader takes a file that is cut off for one that ends there."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._library = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer)
        while not self._ready:
            if self._frame is not None and not self._frame.eof:
                packed = self._raw.read(CHUNK)
                if not packed:
                    raise EOFError("the file ends in the middle of a zstandard frame")
            else:
                packed = (self._frame.unused_data if self._frame else b"") or self._raw.read(CHUNK)
                if not packed:
                    return 0
                self._frame = self._library.decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
