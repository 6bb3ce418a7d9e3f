"""Input that would fill memory, disk or time is refused early, with its file and record."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from evomesh.data.records import decompress, limits, spill
from evomesh.data.records.json_stream import _GuardedStream
from evomesh.data.records.reader import SourceRecord, read_records
from evomesh.data.records.source_files import find_source_files, open_files
from evomesh.errors import UserError

KIB = 1 << 10


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_RECORD_BYTES", 256 * KIB)
    monkeypatch.setattr(limits, "ALWAYS_UNPACKED", 1024 * KIB)
    monkeypatch.setattr(limits, "MAX_UNPACK_RATIO", 50)
    monkeypatch.setattr(limits, "MAX_NESTING", 100)


def read_all(path: Path) -> list[SourceRecord]:
    found = []
    for file, stream, _ in open_files(find_source_files([str(path)])):
        found += read_records(stream, file)
    return found


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert caught.value.fix
    return str(caught.value)


def test_a_quote_that_is_never_closed_names_the_row_that_opens_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    good = "id,text\n1,a\n2,b\n"
    path.write_text(good + '3,"never closed\n' + "4,many more lines\n" * 100_000)
    assert f"{path} line 4: the record is longer" in refusal(path)
    # The same in a row of many closed fields.
    path.write_text(good + '3,"x\ny",' + '"x\ny",' * 100_000 + "\n")
    assert f"{path} line 4: the record is longer" in refusal(path)
    path.write_text(good + '3,"to the end\n')
    assert f"{path} line 4: not csv" in refusal(path)


def test_rows_of_many_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "line\n" * 40_000
    path.write_text("text\n" + f'"{long}"\n' * 4)
    assert [record.value["text"] for record in read_all(path)] == [long] * 4


@pytest.mark.parametrize(
    "element",
    [b'"' + b"x" * 600_000 + b'"', b'{"a": [' + b"[],\n" * 200_000 + b"0]}", b" " * 600_000],
)  # fmt: skip
def test_a_huge_element_of_a_list_is_refused(tmp_path: Path, element: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"}, {"text": "b"}, ' + element + b"]")
    assert f"{path} record 3: the record is longer than 262,144 bytes" in refusal(path)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_deep_nesting_is_refused(tmp_path: Path, opening: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[1, 2, " + opening * 20_000)
    assert f"{path} record 3: the record nests" in refusal(path)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + opening * 20_000 + b"\n")
    assert f"{path} line 2: " in refusal(path)


def test_brackets_in_strings_are_no_nesting(tmp_path: Path) -> None:
    texts = [
        "[" * 3000,
        '\\"[{' * 500,
        "\\\\" * 999 + '"[' * 700,
        "ends with \\",
        "{" * 99,
    ]
    records = [{"text": text, "more": [[[text]]]} for text in texts] * 20
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    assert [record.value for record in read_all(path)] == records


@pytest.mark.parametrize("seed", range(20))
def test_depth_is_counted_alike_in_blocks_of_any_size(seed: int) -> None:
    rng = np.random.RandomState(seed)
    value: object = "x"
    deepest = int(rng.randint(1, 60))
    for _ in range(deepest):
        text = "".join(rng.choice(list('a"\\[]{}é\n'), 8))
        value = [text, value] if rng.rand() < 0.5 else {text: value, "b": text}
    content = json.dumps([value, 1], ensure_ascii=bool(seed % 2)).encode()
    size = int(rng.randint(1, 30))
    stream = _GuardedStream(b"", io.BytesIO(content), "f")
    depths = [stream._depth]
    while stream.read(size):
        depths.append(stream._depth)
    assert stream._depth == -1  # as many closed as opened
    whole = _GuardedStream(content, io.BytesIO(), "f")
    limits.MAX_NESTING = deepest
    whole.read(1)
    limits.MAX_NESTING = deepest - 1
    with pytest.raises(UserError, match="nests"):
        _GuardedStream(content, io.BytesIO(), "f").read(1)


LINE = b'{"text": "a"}\n'
BOMB = LINE + b" \n" * (4 << 20)  # blank lines: no single one is long


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_unpacks_too_far_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    pack = gzip.compress if suffix == "gz" else zstandard.compress
    path.write_bytes(pack(BOMB))
    text = refusal(path)
    assert f"after {path} line 1: " in text
    assert f"{path.stat().st_size:,} bytes unpack to more than 1 MiB" in text


def tar_gz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_archives_that_unpack_too_far_are_refused_before_they_are_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.jsonl", LINE)
        archive.writestr("bomb.jsonl", BOMB)
    assert f"{path}/bomb.jsonl: " in refusal(path)
    path = tar_gz(tmp_path / "b.tar.gz", {"good.jsonl": LINE, "bomb.jsonl": BOMB})
    assert f"{path}/bomb.jsonl: " in refusal(path)
    # Members that are no input, and what comes after the end of the tar, count too.
    path = tar_gz(tmp_path / "c.tar.gz", {"good.jsonl": LINE, "bomb.bin": BOMB})
    assert f"{path}/bomb.bin: " in refusal(path)
    path = tmp_path / "d.tar.gz"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        info = tarfile.TarInfo("good.jsonl")
        info.size = len(LINE)
        tar.addfile(info, io.BytesIO(LINE))
    path.write_bytes(gzip.compress(inner.getvalue() + bytes(8 << 20)))
    assert "unpack to more than" in refusal(path)


def test_a_compressed_member_of_an_archive_is_limited_by_its_share_of_it(
    tmp_path: Path,
) -> None:
    packed = zstandard.compress(BOMB)
    for path in (tmp_path / "a.zip", tmp_path / "a.tar.gz", tmp_path / "a.tar"):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("x.jsonl.zst", packed)
        elif path.suffix == ".gz":
            tar_gz(path, {"x.jsonl.zst": packed})
        else:
            with tarfile.open(path, "w") as tar:
                info = tarfile.TarInfo("x.jsonl.zst")
                info.size = len(packed)
                tar.addfile(info, io.BytesIO(packed))
        assert f"after {path}/x.jsonl.zst line 1: " in refusal(path)


@pytest.mark.slow
def test_text_of_usual_ratios_is_read(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    words = ["".join(map(chr, rng.randint(97, 123, 6))) for _ in range(5000)]
    texts = [" ".join(rng.choice(words, 100)) for _ in range(5000)]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\n".join(texts).encode(), 1))
    assert len("\n".join(texts)) > limits.ALWAYS_UNPACKED
    assert [record.value for record in read_all(path)] == texts


def spilled_archive(tmp_path: Path) -> Path:
    """Return a tar.gz whose members are not in the order of their names, so that it is unpacked to a file."""
    content = os.urandom(300 * KIB).hex().encode()
    return tar_gz(tmp_path / "a.tar.gz", {"b.txt": content[: 200 * KIB], "a.txt": content[-200 * KIB :]})  # fmt: skip


def test_a_full_temporary_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spilled_archive(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * KIB, hard))
    try:
        text = refusal(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{path}: cannot unpack it to {tmp_path}: File too large" in text
    assert "TMPDIR" in text
    assert len(read_all(path)) == 2
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_no_temporary_folder_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spilled_archive(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert "TMPDIR" in refusal(path)


def test_only_what_is_needed_is_spilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = spill.spilled

    def recording(source: io.BytesIO, size: int, where: str):  # type: ignore[no-untyped-def]
        sizes.append(size)
        return original(source, size, where)

    monkeypatch.setattr("evomesh.data.records.archives.spilled", recording)
    path = tar_gz(
        tmp_path / "a.tar.gz",
        {"b.txt": b"x\n", "a.txt": b"y\n", "c.md": bytes(400 * KIB)},
    )
    assert len(read_all(path)) == 2
    assert sizes[0] < 4 * KIB


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
               "GNU.sparse.name": "a.txt", "GNU.sparse.realsize": str(1 << 30)}  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = headers
        content = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    assert "sparse" in refusal(path) or "unpack to more" in refusal(path)


def test_the_time_of_a_bomb_does_not_depend_on_what_it_unpacks_to(
    tmp_path: Path,
) -> None:
    """The stream below stops at the limit: its bytes are counted, not the seconds."""
    content = zstandard.compress(bytes(64 << 20))
    stream = decompress.decompress(io.BytesIO(content), "zst", len(content))
    read = 0
    with pytest.raises(limits.UnpackLimitError):
        while block := stream.read(KIB):
            read += len(block)
    assert read <= limits.unpack_limit(len(content)) < 64 << 20
