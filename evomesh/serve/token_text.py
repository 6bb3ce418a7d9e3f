"""The text and the exact bytes of single tokens, for tokenizers of any kind.

A token may be a part of a character. Byte-level BPE names each byte by a printable
character; sentencepiece names the bytes of characters that it does not know <0x00> to
<0xFF>.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from evomesh.data.tokenizer import Tokenizer

BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenText:
    r"""A token as clients see it.

    Attributes:
        text: its text; for a token with a part of a character ``bytes:\xe2\x80``, as OpenAI's completions write it;
            for one without text its name.
        content: the bytes that it contributes to a text.
    """

    text: str
    content: bytes


class TokenTexts:
    """The texts of a tokenizer's tokens, each worked out once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_of_symbol = _byte_level_alphabet()
        self._known: dict[int, TokenText] = {}

    def of(self, token_id: int) -> TokenText:
        """Return the text of a token as it is inside a longer text, with the space before a word if it has one."""
        if token_id not in self._known:
            self._known[token_id] = self._work_out(token_id)
        return self._known[token_id]

    def _work_out(self, token_id: int) -> TokenText:
        content = self._content(token_id)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
        return TokenText(text or self._tokenizer.token_name(token_id), content)

    def _bytes_of_symbols(self, name: str) -> bytes | None:
        """Return the bytes that a name's symbols stand for; None if one stands for no byte."""
        values = [self._byte_of_symbol.get(symbol) for symbol in name]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(name) else None

    def _content(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        name = tokenizer.token_name(token_id)
        alone = tokenizer.decode([token_id])
        # 1. A byte token of sentencepiece, such as "<0x0A>"; but a token may also have
        #    this as its text.
        byte = BYTE_NAME.fullmatch(name)
        if byte is not None and alone != name:
            return bytes.fromhex(byte[1])

        # 2. A name in which each symbol stands for a byte, as in byte-level BPE. A name
        #    that means something else does not give the token's text.
        content = self._bytes_of_symbols(name)
        if content is not None and content.decode(errors="replace") == alone:
            return content

        # 3. Any other token. The beginning of a text may lose a space, so take the
        #    second of two.
        pair = [token_id, token_id]
        twice = tokenizer.decode(pair)
        second = twice[len(alone) :]
        return second.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each symbol of byte-level BPE: printable bytes are themselves, the rest follow from U+0100.

    https://github.com/openai/gpt-2, src/encoder.py
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for number, byte in enumerate(others):
        alphabet[chr(0x100 + number)] = byte
    return alphabet
