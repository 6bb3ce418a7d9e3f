"""One line of a token file, ``{"tokens": [1, 2, 3]}``: fast reading, and saying what is wrong with a bad one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

TokenArray = NDArray[np.int64]
IntArray = NDArray[np.integer]
MAX_ID = 2**31 - 1  # ids travel as int64, but no vocabulary is larger

_HEAD, _TAIL = b'{"tokens": [', b"]}\n"
_FRAME = len(_HEAD) + len(_TAIL)
_NUMBERS = b"0123456789,- "
_BORDER = 9999999999  # stands between two documents that are parsed together: no id is so large
_JOINT = b", %d, " % _BORDER
_GAPS = (b",,", b"-,", b"--")  # a place without digits, spaces taken out


class BadLineError(Exception):
    """What is wrong with a line, in one sentence; ``byte`` is relative to the line's start where one is known."""

    def __init__(self, found: str, expected: str = "", byte: int | None = None) -> None:
        super().__init__(found)
        self.found, self.expected, self.byte = found, expected, byte


def format_lines(documents: list[list[int]]) -> bytes:
    """Documents as lines in the documents' form: a space after comma and colon, newline at the end of each."""
    numbers = orjson.dumps(documents)[2:-2].replace(b"],[", _TAIL + _HEAD).replace(b",", b", ")
    return _HEAD + numbers + _TAIL


def parse_plain(lines: list[bytes], lengths: IntArray) -> TokenArray | None:
    """``parse_ranges`` of lines at hand."""
    ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)))
    return parse_ranges(memoryview(b"".join(lines)), np.append(0, ends[:-1]), ends, lengths)


def parse_ranges(file: memoryview, starts: IntArray, ends: IntArray, lengths: IntArray) -> TokenArray | None:
    """All tokens of lines in exactly the documents' form, one after the other.

    None when any line is otherwise: then ``parse_line`` finds out what it holds. Nothing but a view is made for each
    line, and NumPy's text reader is twice as fast as a JSON parser that makes a Python int of every token.

    Args:
        file: [bytes] what holds the lines.
        starts: [n] byte at which each line starts.
        ends: [n] byte behind its newline.
        lengths: [n] tokens that it has to have.
    """
    if (
        not len(starts)
        or int((ends - starts).min()) <= _FRAME
        or int(starts.min()) < 0
        or int(ends.max()) > len(file)
    ):
        return None
    heads, tails = _everywhere(file, len(_HEAD))[starts], _everywhere(file, len(_TAIL))[ends - len(_TAIL)]
    if not ((heads == _HEAD).all() and (tails == _TAIL).all()):
        return None
    ranges = zip((starts + len(_HEAD)).tolist(), (ends - len(_TAIL)).tolist(), strict=True)
    text = _JOINT.join([file[start:end] for start, end in ranges])
    if text.translate(None, _NUMBERS) or not text[-1:].isdigit() or (b"-" in text and b"- " in text):
        return None  # NumPy would take a comma at the end
    try:
        found: TokenArray = np.fromstring(text, dtype=np.int64, sep=",")
    except ValueError:
        return None
    borders = np.cumsum(lengths)[:-1] + np.arange(len(lengths) - 1)
    if len(found) != int(lengths.sum()) + len(borders):
        return None
    if len(borders):
        inside = np.ones(len(found), bool)
        inside[borders] = False
        found = found[inside]
    if np.count_nonzero(found) < len(found):  # NumPy reads a missing number as 0
        closed_up = b",%b," % text.translate(None, b" ")
        if any(gap in closed_up for gap in _GAPS):
            return None
    # A document of another length leaves a border that is not where it is taken out.
    return found if largest_id(found) <= MAX_ID else None


def _everywhere(file: memoryview, size: int) -> NDArray[np.bytes_]:
    """The ``size`` bytes from each byte on, without a copy."""
    return np.ndarray((len(file) - size + 1,), f"S{size}", file, strides=(1,))


def largest_id(tokens: TokenArray) -> int:
    """The largest id without its sign, 0 of no tokens."""
    return max(int(tokens.max()), -int(tokens.min())) if len(tokens) else 0


def parse_line(line: bytes) -> list[int]:
    """The tokens of one line, every rule checked.

    Raises:
        BadLine: the line is not such an object.
    """
    if b"\x00" in line:
        raise BadLineError(
            "the line holds NUL bytes (a write that never reached the disk?)", byte=line.index(b"\x00")
        )
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLineError(f"byte 0x{line[error.start]:02x} is not UTF-8", byte=error.start) from None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise _not_json(line) from None
    if not isinstance(record, dict):
        raise BadLineError(f"the line is a JSON {json_kind(record)}", 'an object {"tokens": [ids]}')
    if "tokens" not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise BadLineError(f"the line has no key tokens (keys found: {keys})", 'an object {"tokens": [ids]}')
    tokens = record["tokens"]
    if not isinstance(tokens, list):
        raise BadLineError(f"tokens is a {json_kind(tokens)}", "a list of integers")
    for position, token in enumerate(tokens):
        if type(token) is not int or abs(token) > MAX_ID:
            raise BadLineError(f"token {position} is {json.dumps(token)}", f"an integer of at most {MAX_ID}")
    return tokens


def _not_json(line: bytes) -> BadLineError:
    try:
        json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return BadLineError(f"the line is not JSON ({error.msg})", 'an object {"tokens": [ids]}', error.pos)
    except BadLineError as bad:
        bad.byte = line.find(bad.found.split()[0].encode())
        return bad
    return BadLineError("the line is not JSON", 'an object {"tokens": [ids]}')


def _refuse_constant(name: str) -> Any:
    raise BadLineError(f"{name} is no JSON value", "integers only")


def json_kind(value: object) -> str:
    """What JSON calls a value; of one that only tables have, its Python type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, int | float) else type(value).__name__)
