"""Parse lines of a token file, ``{"tokens": [1, 2, 3]}``: fast in the usual form, else with every check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

TokenArray = NDArray[np.int64]
IntArray = NDArray[np.integer]
MAX_ID = 2**31 - 1  # ids are stored as int64, but no vocabulary is larger

_HEAD = b'{"tokens": ['
_TAIL = b"]}\n"
_FRAME = len(_HEAD) + len(_TAIL)
_NUMBERS = b"0123456789,- "
# Separates two documents that are parsed together: no id is that large.
_BORDER = 9999999999
_JOINT = b", %d, " % _BORDER
# A number without digits, once spaces are removed.
_MISSING_NUMBERS = (b",,", b"-,", b"--")


class BadLineError(Exception):
    """A line that cannot be used: what was found, in one sentence, and what was expected.

    ``byte`` counts from the line's start; None where no byte is at fault.
    """

    def __init__(self, found: str, expected: str = "", byte: int | None = None) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.byte = byte

    def location(self, path: Path, number: int, start: int) -> str:
        """Return file, line number (from 1) and, where known, the byte in a file whose line starts at ``start``."""
        byte = "" if self.byte is None else f" byte {start + self.byte}"
        return f"{path} line {number}{byte}"


def format_lines(documents: list[list[int]]) -> bytes:
    """Encode documents in InternEvo's line format: a space after comma and colon, a newline at the end of each."""
    numbers = orjson.dumps(documents)[2:-2]
    lines = numbers.replace(b"],[", _TAIL + _HEAD).replace(b",", b", ")
    return _HEAD + lines + _TAIL


def parse_plain(lines: list[bytes], lengths: IntArray) -> TokenArray | None:
    """Parse lines in memory as ``parse_ranges`` does."""
    sizes = np.fromiter(map(len, lines), np.int64, len(lines))
    ends = np.cumsum(sizes)
    starts = np.append(0, ends[:-1])
    content = b"".join(lines)
    return parse_ranges(memoryview(content), starts, ends, lengths)


def parse_ranges(
    file: memoryview, starts: IntArray, ends: IntArray, lengths: IntArray
) -> TokenArray | None:
    """Parse lines that have exactly InternEvo's form; return all their tokens, one line after the other.

    Return None when any line has another form: ``parse_line`` then determines what it
    contains. Python only makes a view of each line, and NumPy's text reader is twice as
    fast as a JSON parser that makes a Python int of each token.

    Args:
        file: [bytes] holds the lines.
        starts: [n] byte at which each line starts.
        ends: [n] byte after its newline.
        lengths: [n] number of tokens that it must have.
    """
    if not _have_frames(file, starts, ends):
        return None

    # Parse all documents as one list of numbers, with a number that is not an id at
    # each border.
    first_bytes = (starts + len(_HEAD)).tolist()
    last_bytes = (ends - len(_TAIL)).tolist()
    views = [
        file[first:last] for first, last in zip(first_bytes, last_bytes, strict=True)
    ]
    text = _JOINT.join(views)
    if not _is_list_of_integers(text):
        return None
    try:
        numbers: TokenArray = np.fromstring(text, dtype=np.int64, sep=",")
    except ValueError:
        return None

    # If the length of a document is wrong, a border remains among the tokens and
    # exceeds the largest id.
    tokens = _remove_borders(numbers, lengths)
    if (
        tokens is None
        or _has_missing_number(text, tokens)
        or largest_id(tokens) > MAX_ID
    ):
        return None
    return tokens


def _have_frames(file: memoryview, starts: IntArray, ends: IntArray) -> bool:
    """Return whether every line is in the file, starts with the head and ends with the tail."""
    if not len(starts):
        return False
    # A wrong meta may name any bytes; NumPy would take a negative start from the end.
    is_inside = starts.min() >= 0 and ends.max() <= len(file)
    if not is_inside:
        return False
    shortest = (ends - starts).min()
    if shortest <= _FRAME:
        return False
    has_heads = _occurs_at(file, _HEAD, starts)
    tails = ends - len(_TAIL)
    return has_heads and _occurs_at(file, _TAIL, tails)


def _occurs_at(file: memoryview, text: bytes, starts: IntArray) -> bool:
    """Return whether ``text`` starts at each of these bytes, by comparing overlapping views without a copy."""
    # Entry i of the array is the bytes [i, i + size): the array has the memory of the
    # file, and a step of one byte from entry to entry.
    size = len(text)
    slices: NDArray[np.bytes_] = np.ndarray(
        (len(file) - size + 1,), f"S{size}", file, strides=(1,)
    )
    return bool((slices[starts] == text).all())


def _is_list_of_integers(text: bytes) -> bool:
    """Return whether only digits, commas, signs and spaces occur, so that NumPy cannot misread anything else."""
    if text.translate(None, _NUMBERS):
        return False
    if not text[-1:].isdigit():  # NumPy accepts a comma at the end
        return False
    return b"-" not in text or b"- " not in text


def _remove_borders(numbers: TokenArray, lengths: IntArray) -> TokenArray | None:
    """Drop the number between each two documents; None when there are not as many numbers as declared."""
    num_borders = len(lengths) - 1
    if len(numbers) != int(lengths.sum()) + num_borders:
        return None
    if not num_borders:
        return numbers
    # Border i follows the documents 0 .. i and the i borders between them: documents of
    # 2, 3 and 1 tokens have the borders 2 and 6 in 1 2 # 3 4 5 # 6.
    ends = np.cumsum(lengths)[:-1]
    borders = ends + np.arange(num_borders)
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
    if not len(tokens):
        return 0
    return max(int(tokens.max()), -int(tokens.min()))


def parse_line(line: bytes) -> list[int]:
    """Return the tokens of one line, with every rule checked.

    Raises:
        BadLineError: the line is not such an object.
    """
    # 1. Bytes: blocks of a disk that were never written are zeros.
    if b"\x00" in line:
        raise BadLineError(
            "the line has NUL bytes (was a write lost in a crash?)",
            byte=line.index(b"\x00"),
        )
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLineError(
            f"byte 0x{line[error.start]:02x} is not UTF-8", byte=error.start
        ) from None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise _not_json(line) from None

    # 2. Form: an object with a list.
    if not isinstance(record, dict):
        raise BadLineError(
            f"the line is a JSON {json_kind(record)}", 'an object {"tokens": [ids]}'
        )
    if "tokens" not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise BadLineError(
            f"the line has no key tokens (keys found: {keys})",
            'an object {"tokens": [ids]}',
        )
    tokens = record["tokens"]
    if not isinstance(tokens, list):
        raise BadLineError(f"tokens is a {json_kind(tokens)}", "a list of integers")

    # 3. Values. Of true and 1.0 Python says that they are equal to 1, so the type
    #    itself is asked for.
    for position, token in enumerate(tokens):
        if type(token) is not int or abs(token) > MAX_ID:
            raise BadLineError(
                f"token {position} is {json.dumps(token)}",
                f"an integer of at most {MAX_ID}",
            )
    return tokens


def _not_json(line: bytes) -> BadLineError:
    try:
        json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return BadLineError(
            f"the line is not JSON ({error.msg})",
            'an object {"tokens": [ids]}',
            error.pos,
        )
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
    names = {
        dict: "object",
        list: "list",
        str: "string",
        bool: "boolean",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
