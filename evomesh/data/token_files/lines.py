"""Parse lines of a token file, ``{"tokens": [1, 2, 3]}``: fast in the usual form, else with every check."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

TokenArray = NDArray[np.int64]
IntArray = NDArray[np.integer]
MAX_ID = 2**31 - 1  # ids travel as int64, but no vocabulary is larger

_HEAD = b'{"tokens": ['
_TAIL = b"]}\n"
_FRAME = len(_HEAD) + len(_TAIL)
_NUMBERS = b"0123456789,- "
_BORDER = 9999999999  # stands between two documents that are parsed together: no id is so large
_JOINT = b", %d, " % _BORDER
_MISSING_NUMBERS = (b",,", b"-,", b"--")  # a number without digits, once spaces are removed


class BadLineError(Exception):
    """A line that cannot be used: what was found, in one sentence, and what was expected.

    ``byte`` counts from the line's start; None where no byte is at fault.
    """

    def __init__(self, found: str, expected: str = "", byte: int | None = None) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.byte = byte


def format_lines(documents: list[list[int]]) -> bytes:
    """Encode documents in InternEvo's line format: a space after comma and colon, a newline at the end of each."""
    numbers = orjson.dumps(documents)[2:-2]
    lines = numbers.replace(b"],[", _TAIL + _HEAD).replace(b",", b", ")
    return _HEAD + lines + _TAIL


def parse_plain(lines: list[bytes], lengths: IntArray) -> TokenArray | None:
    """Parse lines in memory as ``parse_ranges`` does."""
    ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)))
    starts = np.append(0, ends[:-1])
    return parse_ranges(memoryview(b"".join(lines)), starts, ends, lengths)


def parse_ranges(file: memoryview, starts: IntArray, ends: IntArray, lengths: IntArray) -> TokenArray | None:
    """Parse lines that have exactly InternEvo's form; return all their tokens, one line after the other.

    Return None when any line has another form: ``parse_line`` then finds out what it holds. Python only makes a view
    of each line, and NumPy's text reader is twice as fast as a JSON parser that makes a Python int of every token.

    Args:
        file: [bytes] holds the lines.
        starts: [n] byte at which each line starts.
        ends: [n] byte after its newline.
        lengths: [n] number of tokens that it must have.
    """
    if not _have_frames(file, starts, ends):
        return None
    # All documents are parsed as one list of numbers, with a number that is no id at each border.
    first_bytes = (starts + len(_HEAD)).tolist()
    last_bytes = (ends - len(_TAIL)).tolist()
    text = _JOINT.join([file[first:last] for first, last in zip(first_bytes, last_bytes, strict=True)])
    if not _is_list_of_integers(text):
        return None
    try:
        numbers: TokenArray = np.fromstring(text, dtype=np.int64, sep=",")
    except ValueError:
        return None
    tokens = _remove_borders(numbers, lengths)
    if tokens is None or _has_missing_number(text, tokens):
        return None
    # Where a document has another length, a border is left among the tokens, and a border is too large.
    return tokens if largest_id(tokens) <= MAX_ID else None


def _have_frames(file: memoryview, starts: IntArray, ends: IntArray) -> bool:
    """Return whether every line is in the file, starts with the head and ends with the tail."""
    if not len(starts):
        return False
    shortest = int((ends - starts).min())
    if shortest <= _FRAME or int(starts.min()) < 0 or int(ends.max()) > len(file):
        return False
    heads = _slices_at_every_byte(file, len(_HEAD))[starts]
    tails = _slices_at_every_byte(file, len(_TAIL))[ends - len(_TAIL)]
    return bool((heads == _HEAD).all()) and bool((tails == _TAIL).all())


def _slices_at_every_byte(file: memoryview, size: int) -> NDArray[np.bytes_]:
    """Return the ``size`` bytes that start at each byte, without a copy."""
    return np.ndarray((len(file) - size + 1,), f"S{size}", file, strides=(1,))


def _is_list_of_integers(text: bytes) -> bool:
    """Return whether only digits, commas, signs and spaces occur, so that NumPy cannot misread anything else."""
    if text.translate(None, _NUMBERS):
        return False
    if not text[-1:].isdigit():  # NumPy accepts a comma at the end
        return False
    return b"-" not in text or b"- " not in text


def _remove_borders(numbers: TokenArray, lengths: IntArray) -> TokenArray | None:
    """Drop the number between each two documents; None when there are not as many numbers as declared."""
    borders = np.cumsum(lengths)[:-1] + np.arange(len(lengths) - 1)
    if len(numbers) != int(lengths.sum()) + len(borders):
        return None
    if not len(borders):
        return numbers
    is_token = np.ones(len(numbers), bool)
    is_token[borders] = False
    return numbers[is_token]


def _has_missing_number(text: bytes, tokens: TokenArray) -> bool:
    """Return whether a number has no digits: NumPy reads it as 0."""
    if np.count_nonzero(tokens) == len(tokens):
        return False
    without_spaces = b",%b," % text.translate(None, b" ")
    return any(missing in without_spaces for missing in _MISSING_NUMBERS)


def largest_id(tokens: TokenArray) -> int:
    """Return the largest absolute id; 0 when there are no tokens."""
    return max(int(tokens.max()), -int(tokens.min())) if len(tokens) else 0


def parse_line(line: bytes) -> list[int]:
    """Return the tokens of one line, with every rule checked.

    Raises:
        BadLineError: the line is not such an object.
    """
    if b"\x00" in line:
        raise BadLineError("the line has NUL bytes (was a write lost in a crash?)", byte=line.index(b"\x00"))
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
    raise BadLineError(f"{name} is not a JSON value", "integers only")


def json_kind(value: object) -> str:
    """Return JSON's name for the type of a value; its Python type where JSON has none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)
