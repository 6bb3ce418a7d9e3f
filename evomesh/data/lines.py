"""One line of a token file, ``{"tokens": [1, 2, 3]}``: fast reading, and saying what is wrong with a bad one."""

from __future__ import annotations

import json
from itertools import repeat
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
MAX_ID = 2**31 - 1  # ids travel as int64, but no vocabulary is larger

_HEAD, _TAIL = b'{"tokens": [', b"]}\n"
_NUMBERS = b"0123456789,- "
_FRAME = (_HEAD + _TAIL).translate(None, _NUMBERS)  # what a line holds beside numbers
_FRAME_ONLY = _FRAME.replace(b"]", b"")
_GAPS = (b",,", b"[,", b",]", b"-,", b"-]", b"--")  # a place without digits, spaces taken out
_COMMAS = bytes.maketrans(b"]", b",")  # "1, 2], 3]" of two lines to "1, 2, 3,"


class BadLine(Exception):
    """What is wrong with a line, in one sentence; ``byte`` is relative to the line's start where one is known."""

    def __init__(self, found: str, expected: str = "", byte: int | None = None) -> None:
        super().__init__(found)
        self.found, self.expected, self.byte = found, expected, byte


def format_lines(documents: list[list[int]]) -> bytes:
    """Documents as lines in the documents' form: a space after comma and colon, newline at the end of each."""
    numbers = orjson.dumps(documents)[2:-2].replace(b"],[", _TAIL + _HEAD).replace(b",", b", ")
    return _HEAD + numbers + _TAIL


def parse_plain(lines: list[bytes], lengths: list[int]) -> Tokens | None:
    """All tokens of lines in exactly the documents' form, with as many tokens as ``lengths`` says.

    None when any line is otherwise: then ``parse_line`` finds out what it holds. Joined lines cost a few C calls for
    all of them, and NumPy's text reader is twice as fast as a JSON parser that makes a Python int of every token.
    """
    if list(map(bytes.count, lines, repeat(b","))) != [length - 1 for length in lengths]:
        return None
    text = b"".join(lines)
    whole = text.startswith(_HEAD) and text.endswith(_TAIL) and text.count(_TAIL + _HEAD) == len(lines) - 1
    if not whole or (b"-" in text and b"- " in text) or text.translate(None, _NUMBERS) != _FRAME * len(lines):
        return None
    try:
        tokens = np.fromstring(text.translate(_COMMAS, _FRAME_ONLY)[:-1], dtype=np.int64, sep=",")
    except ValueError:
        return None
    if np.count_nonzero(tokens) < len(tokens):  # NumPy reads a missing number as 0
        closed_up = text.translate(None, b" ")
        if any(gap in closed_up for gap in _GAPS):
            return None
    return tokens if len(tokens) == sum(lengths) and largest_id(tokens) <= MAX_ID else None


def largest_id(tokens: Tokens) -> int:
    """The largest id without its sign, 0 of no tokens."""
    return max(int(tokens.max()), -int(tokens.min())) if len(tokens) else 0


def parse_line(line: bytes) -> list[int]:
    """The tokens of one line, every rule checked.

    Raises:
        BadLine: the line is not such an object.
    """
    if b"\x00" in line:
        raise BadLine("the line holds NUL bytes (a write that never reached the disk?)", byte=line.index(b"\x00"))
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"byte 0x{line[error.start]:02x} is not UTF-8", byte=error.start) from None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise _not_json(line) from None
    if not isinstance(record, dict):
        raise BadLine(f"the line is a JSON {_kind(record)}", 'an object {"tokens": [ids]}')
    if "tokens" not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise BadLine(f"the line has no key tokens (keys found: {keys})", 'an object {"tokens": [ids]}')
    tokens = record["tokens"]
    if not isinstance(tokens, list):
        raise BadLine(f"tokens is a {_kind(tokens)}", "a list of integers")
    for position, token in enumerate(tokens):
        if type(token) is not int or abs(token) > MAX_ID:
            raise BadLine(f"token {position} is {json.dumps(token)}", f"an integer of at most {MAX_ID}")
    return tokens


def _not_json(line: bytes) -> BadLine:
    try:
        json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return BadLine(f"the line is not JSON ({error.msg})", 'an object {"tokens": [ids]}', error.pos)
    except BadLine as bad:
        bad.byte = line.find(bad.found.split()[0].encode())
        return bad
    return BadLine("the line is not JSON", 'an object {"tokens": [ids]}')


def _refuse_constant(name: str) -> Any:
    raise BadLine(f"{name} is no JSON value", "integers only")


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
