"""Reading token files: the example of InternEvo's guide, and a test for each way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomesh.data.token_files import bin_dataset
from evomesh.data.token_files.bin_dataset import BinDataset, check_sources
from evomesh.data.token_files.cache import write_cache
from evomesh.data.token_files.lines import parse_plain
from evomesh.data.token_files.repair import repair
from evomesh.data.token_files.writer import BinWriter
from evomesh.errors import UserError
from tests.support.covers import covers

DOCUMENTED = [
    [73075, 75302, 69522, 69022, 98899, 67713, 68015, 81269, 74637, 75445, 99157],
    [69469, 60355, 73026, 68524, 60846, 61844, 98899, 67775, 79241, 98899, 67713, 67800, 67453, 67838, 99157],
    [68057, 79017, 60378, 68014, 98899, 67713, 67990, 68015, 70381, 67428, 61003, 67622, 99157],
]  # fmt: skip


def read_all(path: Path, **options: Any) -> list[list[int]]:
    dataset = BinDataset(path, **options)
    return [dataset.read(np.array([i])).tolist() for i in range(len(dataset))]


def assert_refused(path: Path, *parts: str, **options: Any) -> None:
    """Check that opening or reading ``path`` fails with a message that has every part."""
    with pytest.raises(UserError) as caught:
        read_all(path, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def set_meta(path: Path, rows: Any) -> None:
    with Path(f"{path}.meta").open("wb") as file:
        np.save(file, rows)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_the_documented_example_is_read(write_bin: Any, dtype: str) -> None:
    path = write_bin(DOCUMENTED, dtype=dtype)
    assert np.load(f"{path}.meta").tolist() == [[0, 11], [90, 15], [208, 13]]
    assert read_all(path) == DOCUMENTED
    assert (
        BinDataset(path).read(np.array([2, 0])).tolist()
        == DOCUMENTED[2] + DOCUMENTED[0]
    )


@covers("promise:example-lines")
def test_documented_example_is_written(tmp_path: Path) -> None:
    path = tmp_path / "cn" / "output.bin"
    with BinWriter(path) as writer:
        writer.write(DOCUMENTED)
        writer.commit({})
    lines = path.read_text().splitlines()
    assert lines[0] == (
        '{"tokens": [73075, 75302, 69522, 69022, 98899, 67713, 68015, 81269, 74637, 75445, 99157]}'
    )
    assert np.load(f"{path}.meta").tolist() == [[0, 11], [90, 15], [208, 13]]
    assert read_all(path) == DOCUMENTED


def test_other_json_forms_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(
        b'{"tokens":[1,2]}\n{"type": "en", "tokens": [ -3 ,4 ]}\n{"tokens": []}\r\n{"tokens": [5]}'
    )
    repair(path)
    assert read_all(path) == [[1, 2], [-3, 4], [], [5]]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no.bin", "no.bin", "No such file")


def test_a_file_without_meta_is_refused(write_bin: Any) -> None:
    path = write_bin([[1]])
    os.remove(f"{path}.meta")
    assert_refused(path, "no .meta", f"evomesh data repair {path}")


def test_a_meta_of_text_is_refused(write_bin: Any) -> None:
    path = write_bin([[1]])
    Path(f"{path}.meta").write_text("(0, 11), (90, 15), (208, 13)")
    assert_refused(
        path, "not an .npy file (it starts with '(0, 11), (90, 15'", "repair"
    )


@pytest.mark.parametrize("cut", [0, 40, 130])
def test_a_truncated_meta_is_refused(write_bin: Any, cut: int) -> None:
    path = write_bin([[1], [2]])
    os.truncate(f"{path}.meta", cut)
    assert_refused(
        path,
        ".meta",
        "empty (0 bytes)"
        if cut == 0
        else "broken .npy header"
        if cut == 40
        else "130 bytes",
    )


def test_a_meta_with_pickled_objects_is_refused(write_bin: Any) -> None:
    path = write_bin([[1]])
    set_meta(path, np.array([[0, 1]], dtype=object))
    assert_refused(path, "pickled", "int32 or int64")


@pytest.mark.parametrize("rows", [np.zeros(4, np.int64), np.zeros((2, 3), np.int64)])
def test_a_meta_of_another_shape_is_refused(write_bin: Any, rows: Any) -> None:
    path = write_bin([[1]])
    set_meta(path, rows)
    assert_refused(path, f"shape {rows.shape}", "(N, 2)")


@pytest.mark.parametrize("dtype", ["<f8", "i1", ">i8"])
def test_a_meta_of_another_dtype_is_refused(write_bin: Any, dtype: str) -> None:
    path = write_bin([[1]])
    set_meta(path, np.array([[0, 1]], dtype))
    assert_refused(path, "dtype " + np.dtype(dtype).str, "<i8")


def test_offsets_that_do_not_increase_are_refused(write_bin: Any) -> None:
    path = write_bin([[1], [2], [3]])
    set_meta(path, np.array([[0, 1], [30, 1], [15, 1]]))
    assert_refused(
        path,
        "row 2",
        "offset 15 does not increase",
        "45 bytes" if path.stat().st_size == 45 else "bytes",
    )


def test_a_negative_offset_is_refused(write_bin: Any) -> None:
    path = write_bin([[1], [2]])
    set_meta(path, np.array([[-5, 1], [15, 1]]))
    assert_refused(path, "row 0", "-5")


def test_an_offset_past_the_end_is_refused(write_bin: Any) -> None:
    path = write_bin([[1], [2]])
    set_meta(path, np.array([[0, 1], [999, 1]]))
    assert_refused(path, "row 1", "offset 999", f"{path.stat().st_size} bytes")


def test_an_offset_inside_a_line_is_refused(write_bin: Any) -> None:
    path = write_bin([[1, 2], [3, 4], [5, 6]])
    rows = np.load(f"{path}.meta")
    rows[1, 0] += 4
    set_meta(path, rows)
    assert_refused(
        path,
        "row 1",
        f"offset {rows[1, 0]} is not the start of a line",
        f"byte {rows[1, 0] - 4}",
        "repair",
    )


def test_a_wrong_token_count_is_refused(write_bin: Any) -> None:
    path = write_bin([[1, 2], [3, 4, 5]])
    rows = np.load(f"{path}.meta")
    rows[1, 1] = 2
    set_meta(path, rows)
    assert_refused(path, "line 2", "row 1", "declares 2 tokens", "has 3")


@pytest.mark.parametrize(
    ("row", "column", "by", "part"),
    [
        (1, 1, 1, "row 1, byte 19): the meta declares 3 tokens, the line has 2"),
        (1, 0, 1, "row 1: offset 20 is not the start of a line"),
        (2, 0, -1, "row 2: offset 37 is not the start of a line"),
    ],
)
def test_a_wrong_row_is_found_among_documents_that_are_read_together(
    write_bin: Any, row: int, column: int, by: int, part: str
) -> None:
    """The total numbers of tokens and bytes stay the same; only their division into documents is wrong."""
    path = write_bin([[1, 2], [3, 4], [5, 6], [7, 8]])
    rows = np.load(f"{path}.meta")
    rows[row, column] += by
    if column == 1:
        rows[row + 1, column] -= by
    set_meta(path, rows)
    with pytest.raises(UserError, match=re.escape(part)):
        BinDataset(path).read(np.arange(4))


def test_an_extra_comma_is_not_a_token(write_bin: Any) -> None:
    path = write_bin([[1, 2], [3, 4]])
    for row in (0, 1):
        lines = [b'{"tokens": [1, 2]}\n', b'{"tokens": [3, 4]}\n']
        lines[row] = lines[row].replace(b"]", b",]")
        path.write_bytes(b"".join(lines))
        set_meta(path, np.array([[0, 2], [len(lines[0]), 2]]))
        with pytest.raises(UserError, match=f"line {row + 1} byte .*not JSON"):
            BinDataset(path).read(np.arange(2))


def test_a_meta_with_fewer_rows_than_lines_is_refused(write_bin: Any) -> None:
    path = write_bin([[1], [2], [3]])
    set_meta(path, np.load(f"{path}.meta")[:2])
    assert_refused(path, "2 rows", "1 more line")


def test_a_row_missing_in_the_middle_is_found(write_bin: Any) -> None:
    path = write_bin([[1], [2], [3]])
    set_meta(path, np.load(f"{path}.meta")[[0, 2]])
    assert_refused(path, "row 0", "2 lines", "lacks rows")


def test_a_meta_with_more_rows_than_lines_is_refused(write_bin: Any) -> None:
    path = write_bin([[1], [2]])
    rows = np.load(f"{path}.meta")
    set_meta(path, np.vstack([rows, [[path.stat().st_size, 1]]]))
    assert_refused(path, "row 2", "1 row too many")


def test_a_truncated_file_is_refused_and_can_be_repaired(write_bin: Any) -> None:
    path = write_bin([[1, 2], [3, 4], [5, 6]])
    os.truncate(path, path.stat().st_size - 4)
    assert_refused(
        path,
        "line 3",
        f"byte {path.stat().st_size}",
        "last good one is line 2",
        "repair",
    )
    assert "2 documents" in repair(path)
    assert read_all(path) == [[1, 2], [3, 4]]
    assert path.with_name("a.bin.torn").read_bytes() == b'{"tokens": [5, '


def test_an_empty_file_is_refused(write_bin: Any) -> None:
    path = write_bin([[1]])
    path.write_bytes(b"")
    assert_refused(path, str(path), "empty (0 bytes)")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "a", "id": 1}', ["no key tokens", "id, text"]),
        ('{"tokens": "1 2"}', ["tokens is a string", "list of integers"]),
        ("[1, 2]", ["JSON list"]),
        ('{"tokens": [1, 2', ["not JSON"]),
    ],
)
def test_a_line_without_a_list_of_tokens_is_refused(
    write_bin: Any, line: str, parts: list[str]
) -> None:
    path = write_bin([[1], [2]])
    path.write_text('{"tokens": [1]}\n' + line + '\n{"tokens": [3]}\n')
    set_meta(path, np.array([[0, 1], [16, 2], [17 + len(line), 1]]))
    assert_refused(path, f"{path} line 2", *parts)


@pytest.mark.parametrize(
    "value", ["1.5", "true", "null", '"7"', "99999999999999999999", "5e0"]
)
def test_a_token_that_is_not_an_integer_is_refused(write_bin: Any, value: str) -> None:
    path = write_bin([[1, 2], [3]])
    text = '{"tokens": [1, 2, ' + value + "]}\n"
    path.write_text(text)
    set_meta(path, np.array([[0, 3]]))
    assert_refused(path, "line 1", "token 2")


@pytest.mark.parametrize("token", [50, -50, 51])
def test_a_token_outside_the_vocabulary_is_refused(write_bin: Any, token: int) -> None:
    path = write_bin([[1, 2], [3, token, 4]])
    assert_refused(
        path, f"{path} line 2", f"token 1 is {token}", "vocab_size=50", vocab_size=50
    )
    assert read_all(write_bin([[49, -49, 0]]), vocab_size=50) == [[49, -49, 0]]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"tokens": [1\x00, 2]}', "NUL bytes"),
        (b'{"tokens": [1, 2], "x": "\xff"}', "0xff is not UTF-8"),
        (b'{"tokens": [NaN, 2]}', "NaN"),
    ],
)
def test_bytes_that_are_not_json_text_are_refused(
    write_bin: Any, line: bytes, part: str
) -> None:
    path = write_bin([[1], [2]])
    path.write_bytes(b'{"tokens": [1]}\n' + line + b"\n")
    set_meta(path, np.array([[0, 1], [16, 2]]))
    assert_refused(path, f"{path} line 2 byte ", part)


def test_an_int32_meta_of_a_file_above_2_gib_is_refused(write_bin: Any) -> None:
    path = write_bin([[1]], dtype="int32")
    os.truncate(path, 2**31 + 10)  # a hole: takes no room on the disk
    assert_refused(path, "int32", "2,147,483,658 bytes", "int64")


@pytest.mark.parametrize(
    ("magic", "kind"),
    [(b"\x1f\x8b\x08\x00", "gzip"), (b"\x28\xb5\x2f\xfd", "zstandard")],
)
def test_a_compressed_file_is_refused_by_name(
    write_bin: Any, magic: bytes, kind: str
) -> None:
    path = write_bin([[1]])
    path.write_bytes(magic + b"data")
    assert_refused(path, str(path), kind, magic[:2].hex(" "))


@covers("data.min_length")
def test_min_length_counts_tokens(write_bin: Any) -> None:
    path = write_bin([[1], [2, 3], [4, 5, 6]])
    assert read_all(path, min_length=2) == [[2, 3], [4, 5, 6]]
    assert BinDataset(path, min_length=2).row(0) == 1


def test_the_check_before_a_run_reads_every_document_of_small_data_only(
    write_bin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_bin([[1, 1]] * (bin_dataset.BLOCK + 1) + [[200, 1], [1, 1]])
    dataset = BinDataset(path, vocab_size=100)
    with pytest.raises(
        UserError, match=f"line {bin_dataset.BLOCK + 2}: token 0 is 200"
    ):
        check_sources([dataset])
    monkeypatch.setattr(bin_dataset, "CHECKED_BYTES", dataset.size - 1)
    check_sources([dataset])


def test_documents_can_be_read_from_several_threads(write_bin: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    documents = [[i] * (i % 7 + 1) for i in range(1, 300)]
    dataset = BinDataset(write_bin(documents))
    with ThreadPoolExecutor(4) as pool:
        read = list(
            pool.map(
                lambda i: dataset.read(np.array([i])).tolist(), range(len(documents))
            )
        )
    assert read == documents


def test_a_cache_holds_the_same_tokens_and_is_ignored_once_the_file_changes(
    write_bin: Any,
) -> None:
    # Read through an index of their tokens.
    short = [[i, -i - 1, 7] * (i % 4) for i in range(1, 60)]
    documents = [*short, [6] * 1000]  # the last one is read as a slice
    path = write_bin(documents)
    assert write_cache(path) == sum(map(len, documents))
    dataset = BinDataset(path, min_length=4)
    assert dataset._cache is not None
    assert read_all(path) == documents
    assert read_all(path, min_length=4) == [
        document for document in documents if len(document) >= 4
    ]
    assert_refused(path, f"{path} line 10", "token 1 is -11", vocab_size=11)
    write_bin([[5] * 3] * 5)
    os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)
    assert BinDataset(path)._cache is None
    assert read_all(path) == [[5] * 3] * 5


def test_a_broken_file_is_not_cached(write_bin: Any) -> None:
    path = write_bin([[1, 2]] * 3)
    for spoil, part in (
        (
            lambda text: text.replace(b"1, 2", b"1, x", 1),
            "line 1: the line is not JSON",
        ),
        (
            lambda text: text.replace(b"1, 2", b"1, 23", 1)[:-5],
            "line 1: the meta declares 2|line 3: the line is not JSON",
        ),
    ):
        whole = path.read_bytes()
        path.write_bytes(spoil(whole))
        with pytest.raises(UserError, match=part):
            write_cache(path)
        path.write_bytes(whole)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "a.bin",
        "a.bin.meta",
    ]


def test_the_fast_parser_never_differs_from_json() -> None:
    draw = random.Random(0)
    plain = 0
    for _ in range(3000):
        documents = [
            [draw.randrange(-99, 99) for _ in range(draw.randrange(1, 5))]
            for _ in range(draw.randrange(1, 4))
        ]
        lines = [
            json.dumps({"tokens": tokens}).encode() + b"\n" for tokens in documents
        ]
        lengths = [len(tokens) for tokens in documents]
        if draw.random() < 0.8:
            # Insert something into a line, or put it in place of a byte.
            row = draw.randrange(len(lines))
            line = bytearray(lines[row])
            start = draw.randrange(len(line))
            line[start : start + draw.randrange(2)] = draw.choice(
                [
                    b"",
                    b"1",
                    b",",
                    b" ",
                    b"-",
                    b"]",
                    b"[",
                    b'"',
                    b"\n",
                    b"}",
                    b".5",
                    b"1 2",
                    b", 3",
                    b"e1",
                ]
            )
            lines[row] = bytes(line)
        tokens = parse_plain(lines, np.array(lengths))
        if tokens is None:
            continue
        plain += 1
        # NumPy reads 07 as 7.
        text = [re.sub(rb"(?<![0-9])0+(?=[0-9])", b"", line) for line in lines]
        records = [json.loads(line)["tokens"] for line in text]
        assert [len(record) for record in records] == lengths
        assert tokens.tolist() == [token for record in records for token in record]
    assert plain > 500


def test_large_data_is_checked_in_evenly_spaced_blocks(
    write_bin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong everywhere is found before a run begins; one bad line at its first use, by name."""
    monkeypatch.setattr(bin_dataset, "BLOCK", 4)
    monkeypatch.setattr(bin_dataset, "CHECKED_BYTES", 3000)
    # 30 KB: a tenth is read.
    path = write_bin([[row % 50 + 1] * 10 for row in range(600)])
    assert path.stat().st_size > 25_000
    read: list[int] = []
    one_pass = BinDataset.read
    monkeypatch.setattr(
        BinDataset,
        "read",
        lambda self, rows: (read.extend(rows.tolist()), one_pass(self, rows))[1],
    )
    check_sources([BinDataset(path, vocab_size=60)])
    assert 40 <= len(read) <= 80 and read[:4] == [0, 1, 2, 3] and read[-1] == 599
    assert max(np.diff(read)) < 60
    with pytest.raises(UserError, match="outside the vocabulary"):
        check_sources([BinDataset(path, vocab_size=30)])
    lines = path.read_bytes().splitlines(keepends=True)
    bad = next(row for row in range(600) if row not in read)
    path.write_bytes(
        b"".join(
            [*lines[:bad], b"x" * (len(lines[bad]) - 1) + b"\n", *lines[bad + 1 :]]
        )
    )
    dataset = BinDataset(path, vocab_size=60)
    check_sources([dataset])
    with pytest.raises(UserError, match=f"line {bad + 1} byte .*not JSON"):
        dataset.read(np.arange(bad - 3, bad + 1))
