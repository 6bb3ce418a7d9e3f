"""Read text files in other encodings than UTF-8: they are recoded before anything parses them."""

from __future__ import annotations

import codecs
import io
from typing import IO, Any

from evomesh.errors import UserError

UTF8 = "utf-8"
BLOCK_BYTES = 1 << 18
# Tried in this order on bytes that are not UTF-8; Latin-1 would fit any bytes.
LIKELY = ("gb18030", "big5", "shift_jis", "euc_kr")
UTF16_FIX = "name the encoding: --encoding utf-16 (in a config: data.encoding='utf-16')"
OTHER_FORMATS = {  # by their first bytes: what it is, and how to fix it
    b"\x1f\x8b": ("compressed with gzip", "give it a name that ends with .gz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "give it a name that ends with .zst"),
    codecs.BOM_UTF16_LE: ("in UTF-16", UTF16_FIX),
    codecs.BOM_UTF16_BE: ("in UTF-16", UTF16_FIX),
}


def check_encoding(name: str, where: str) -> str:
    """Return the encoding's usual name.

    Args:
        where: the option or key that names it.

    Raises:
        UserError: Python does not know it as an encoding of text.
    """
    try:
        usual_name = codecs.lookup(name).name
        "".encode(name)  # refuses codecs that are not for text, such as hex
    except (LookupError, UnicodeError, ValueError):
        raise UserError(
            f"no encoding {name!r}",
            where=where,
            expected="a name that Python knows, such as utf-8, gb18030, big5, shift_jis, utf-16 or latin-1",
            code="EVO-DATA-011",
        ) from None
    return usual_name


def recode(stream: IO[bytes], encoding: str, path: str) -> IO[bytes]:
    """Return the stream in UTF-8.

    Args:
        path: for the message about bytes that the encoding does not have.
    """
    if encoding == UTF8:
        return stream
    return io.BufferedReader(_RecodedStream(stream, encoding, path), BLOCK_BYTES)


class _RecodedStream(io.RawIOBase):
    def __init__(self, stream: IO[bytes], encoding: str, path: str) -> None:
        self._stream = stream
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._path = path
        self._lines = 0  # line ends before the next block
        self._ready = b""
        self._at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        # A block may end inside its only character: then there is nothing ready yet.
        while not self._ready and not self._at_end:
            block = self._stream.read(BLOCK_BYTES)
            self._at_end = not block
            text = self._decode(block)
            self._ready = text.encode(UTF8, "surrogatepass")
        part = self._ready[: len(buffer)]
        size = len(part)
        buffer[:size] = part
        self._ready = self._ready[size:]
        return size

    def _decode(self, block: bytes) -> str:
        try:
            text = self._decoder.decode(block, final=self._at_end)
        except UnicodeDecodeError as error:
            # The bytes before it are good: their line ends give the line number.
            good = error.object[: error.start].decode(self._encoding, "replace")
            line = self._lines + good.count("\n") + 1
            raise UserError(
                f"byte 0x{error.object[error.start]:02x} is not {self._encoding}",
                where=f"{self._path} line {line}",
                fix="name the file's encoding with --encoding (in a config: data.encoding)",
                code="EVO-DATA-011",
            ) from None
        self._lines += text.count("\n")
        return text


def not_utf8(text: bytes, error: UnicodeDecodeError, where: str) -> UserError:
    """Return the error for bytes that are not UTF-8; its fix names the encoding that they look like.

    Args:
        text: the bytes around the error, such as its line.
    """
    found = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
    likely = _guess(text)
    if likely:
        fix = f"the text looks like {likely}: --encoding {likely} (in a config: data.encoding={likely!r})"
    else:
        fix = "name the encoding: --encoding NAME (in a config: data.encoding), or correct the line"
    for start, (kind, fix_of_kind) in OTHER_FORMATS.items():
        if text.startswith(start):
            found += f": the file is {kind}"
            fix = fix_of_kind
    return UserError(
        found, where=where, expected="text in UTF-8", fix=fix, code="EVO-DATA-011"
    )


def _guess(text: bytes) -> str:
    """Return the encoding that text looks like, "" if none fits."""
    for name in LIKELY:
        try:
            decoded = text.decode(name)
        except UnicodeDecodeError:
            continue
        # A stray byte of UTF-8 text may fit too: its neighbors are then not letters.
        foreign = [char for char in decoded if not char.isascii()]
        if foreign and all(char.isprintable() for char in foreign):
            return name
    return ""
