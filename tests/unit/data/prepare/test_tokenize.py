"""Text files become token files; the oracle is the tokenizer library, called directly."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from evomesh.data.prepare.tokenize import TextOptions, tokenize_files
from evomesh.data.records.decompress import decompress
from evomesh.data.records.source_files import find_source_files
from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.token_files.repair import repair
from evomesh.data.token_files.writer import BinWriter
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError

TEXTS = [
    "hello world, hello",
    "a second one\nwith two lines",
    "Ünïcödé 感恩生活",
    "x" * 50,
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a byte-level BPE in which <s> is 0 and </s> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def tokenize(
    inputs: list[str], output: Path, bpe: Path, append: bool = False, **options: Any
) -> dict[str, Any]:
    return tokenize_files(
        find_source_files(inputs),
        output,
        load_tokenizer(bpe),
        TextOptions(**options),
        append=append,
    )


def read_documents(path: Path) -> list[list[int]]:
    dataset = BinDataset(path)
    return [dataset.read(np.array([i])).tolist() for i in range(len(dataset))]


def encode(bpe: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(bpe))
    return [[*tokenizer.encode(text).ids, 1] for text in texts]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n\n",
        encoding="utf-8",
    )
    return path


def test_txt_json_and_jsonl_become_the_same_documents(
    tmp_path: Path, bpe: Path
) -> None:
    tokenize(
        [str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], tmp_path / "out/en/a.bin", bpe
    )
    assert read_documents(tmp_path / "out/en/a.bin") == encode(bpe, TEXTS)
    assert np.load(tmp_path / "out/en/a.bin.meta").dtype == np.int64
    (tmp_path / "a.json").write_text(
        "  " + json.dumps([{"text": text} for text in TEXTS])
    )
    tokenize([str(tmp_path / "a.json")], tmp_path / "b.bin", bpe)
    assert read_documents(tmp_path / "b.bin") == encode(bpe, TEXTS)
    (tmp_path / "a.txt").write_text("  one \n\n\t two\n")
    tokenize([str(tmp_path / "a.txt")], tmp_path / "c.bin", bpe)
    assert read_documents(tmp_path / "c.bin") == encode(bpe, ["one", "two"])


def test_compressed_files_folders_and_globs_are_read(tmp_path: Path, bpe: Path) -> None:
    raw = write_jsonl(tmp_path / "x.jsonl", TEXTS).read_bytes()
    folder = tmp_path / "in" / "sub"
    folder.mkdir(parents=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    half = zstandard.ZstdCompressor().compress
    (folder / "b.jsonl.zst").write_bytes(half(raw[:20]) + half(raw[20:]))  # two frames
    (folder / "notes.md").write_text("not data")
    tokenize([str(tmp_path / "in")], tmp_path / "a.bin", bpe)
    assert read_documents(tmp_path / "a.bin") == encode(bpe, TEXTS * 2)
    tokenize([str(tmp_path / "in/**/*.gz")], tmp_path / "b.bin", bpe)
    assert read_documents(tmp_path / "b.bin") == encode(bpe, TEXTS)


def test_archives_are_read_as_folders(tmp_path: Path, bpe: Path) -> None:
    raw = write_jsonl(tmp_path / "x.jsonl", TEXTS).read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/two.jsonl", raw)
        archive.writestr(
            "a.csv", "text,id\r\n" + "\r\n".join(f'"{text}",1' for text in TEXTS)
        )
    facts = tokenize([str(tmp_path / "x.zip")], tmp_path / "a.bin", bpe)
    assert read_documents(tmp_path / "a.bin") == encode(bpe, TEXTS * 2)
    assert [source["file"] for source in facts["sources"]] == ["x.zip"]


def test_raw_lines_are_encoded_verbatim(tmp_path: Path, bpe: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "hello"}\n\n{"text": "world"}\n')
    tokenize([str(source)], tmp_path / "a.bin", bpe, raw_lines=True)
    assert read_documents(tmp_path / "a.bin") == encode(
        bpe, ['{"text": "hello"}\n', "\n", '{"text": "world"}\n']
    )
    (tmp_path / "a.json").write_text('[{"text": "感"}]')
    tokenize([str(tmp_path / "a.json")], tmp_path / "b.bin", bpe, raw_lines=True)
    assert read_documents(tmp_path / "b.bin") == encode(bpe, ['{"text": "\\u611f"}'])


def test_bos_and_eos_follow_options_and_tokenizer_config(
    tmp_path: Path, bpe: Path
) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", ["hello"]))
    plain = encode(bpe, ["hello"])[0][:-1]
    for options, tokens in (
        ({}, [*plain, 1]),
        ({"bos": True}, [0, *plain, 1]),
        ({"bos": False, "eos": False}, plain),
    ):
        tokenize([source], tmp_path / "a.bin", bpe, **options)
        assert read_documents(tmp_path / "a.bin") == [tokens]
    # A tokenizer.json says itself whether bos is added: as with transformers, the
    # setting beside it does not count.
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/tokenizer_config.json").write_text(
        '{"add_bos_token": false, "bos_token": "<s>", "eos_token": "z"}'
    )
    backend = Tokenizer.from_file(str(bpe))
    last = backend.token_to_id("z")
    for bos in ([], [0]):
        if bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        backend.save(str(tmp_path / "custom/tokenizer.json"))
        tokenize([source], tmp_path / "a.bin", tmp_path / "custom")
        assert read_documents(tmp_path / "a.bin") == [[*bos, *plain, last]]


def test_rerun_replaces_and_append_adds(tmp_path: Path, bpe: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    first = tokenize([source], tmp_path / "a.bin", bpe)
    again = tokenize([source], tmp_path / "a.bin", bpe)
    assert first == again
    both = tokenize([source], tmp_path / "a.bin", bpe, append=True)
    assert read_documents(tmp_path / "a.bin") == encode(bpe, TEXTS * 2)
    assert both["text_bytes"] == 2 * first["text_bytes"]
    assert (both["documents"], both["tokens"], len(both["sources"])) == (
        8,
        2 * first["tokens"],
        2,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.bin",
        "a.bin.json",
        "a.bin.meta",
        "a.jsonl",
    ]


def test_failed_run_keeps_the_old_file(tmp_path: Path, bpe: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenize([str(source)], tmp_path / "a.bin", bpe)
    before = {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.suffix != ".jsonl"
    }
    source.write_text(source.read_text() + '{"txt": "no"}\n')
    with pytest.raises(
        UserError, match=r"a.jsonl line 6.*no field 'text' \(it has: txt\)"
    ):
        tokenize([str(source)], tmp_path / "a.bin", bpe)
    assert {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.suffix != ".jsonl"
    } == before


def test_fingerprint_describes_the_file(tmp_path: Path, bpe: Path) -> None:
    facts = tokenize(
        [str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], tmp_path / "a.bin", bpe
    )
    assert json.loads((tmp_path / "a.bin.json").read_text()) == facts
    found = read_documents(tmp_path / "a.bin")
    assert facts["max_id"] == max(map(max, found))
    assert facts["max_id"] in found[facts["max_id_line"] - 1]
    assert facts["tokens"] == sum(map(len, found))
    texts_alone = "".join(TEXTS).encode()
    assert facts["text_bytes"] == len(texts_alone) > len("".join(TEXTS))
    assert facts["sources"][0]["bytes"] == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' is of type number"),
        ("a.jsonl", b'{"text": null}\n', "line 1: the field 'text' is of type null"),
        (
            "a.jsonl",
            b'{"messages": []}\n',
            "NAME, or tokenize conversations with --format messages",
        ),
        ("a.jsonl", b'{"instruction": "", "output": ""}\n', "--format alpaca"),
        ("a.jsonl", b'{"txt": "a"}\n', "NAME, or encode whole lines with --raw-lines"),
        ("a.jsonl", b"{]\n", "line 1: the line is not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1 byte 13: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "the file is compressed with gzip"),
        ("a.txt", b"\xff\xfea\x00\n\x00", "the file is in UTF-16"),
        ("a.jsonl", b'{"text": "x", "score": NaN}\n', "write null for NaN"),
        ("a.jsonl", b'[{"text": "x"}]\n', "line 1: the record is of type list"),
        ("a.txt", b"ok\n\xff\n", "line 2 byte 0: byte 0xff is not UTF-8"),
        ("a.json", b'{"text": "x"}', "the file starts with '{'"),
        ("a.json", b'[{"text": "x"}', "not JSON"),
        ("a.jsonl.gz", b"plain", "cannot read the file"),
        ("a.md", b"x", "has an unknown format"),
        ("a.txt", b"\n", "has no documents"),
    ],
)
def test_bad_input_is_rejected_and_nothing_is_written(
    tmp_path: Path, bpe: Path, name: str, content: bytes, part: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        tokenize([str(tmp_path / name)], tmp_path / "out" / "a.bin", bpe)
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_failed_run_removes_no_folder_that_it_did_not_make(
    tmp_path: Path, bpe: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "a.txt").write_text("\n")
    for output in ("old/a.bin", "old/new/deep/a.bin"):
        with pytest.raises(UserError, match="has no documents"):
            tokenize([str(tmp_path / "a.txt")], tmp_path / output, bpe)
    assert list((tmp_path / "old").iterdir()) == []


def test_a_failed_run_keeps_what_others_write_into_its_folder(
    tmp_path: Path, bpe: Path
) -> None:
    with (
        BinWriter(tmp_path / "out/en/a.bin") as failing,
        BinWriter(tmp_path / "out/en/b.bin") as other,
    ):
        failing.abort()
        other.write([[1, 2]])
        other.commit({})
    kept = sorted(path.name for path in (tmp_path / "out/en").iterdir())
    assert kept == ["b.bin", "b.bin.json", "b.bin.meta"]


def test_empty_texts_are_counted(tmp_path: Path, bpe: Path) -> None:
    """They stay documents, as blank lines of a .jsonl do in InternEvo's tool."""
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "", " \n", "b "])
    facts = tokenize([str(source)], tmp_path / "a.bin", bpe)
    assert facts["documents"] == 4 and facts["empty_texts"] == 2
    added = tokenize([str(source)], tmp_path / "a.bin", bpe, append=True)
    assert added["documents"] == 8 and added["empty_texts"] == 4
    (tmp_path / "b.txt").write_text("a\n\n  \nb\n")
    skipped = tokenize([str(tmp_path / "b.txt")], tmp_path / "b.bin", bpe)
    assert skipped["documents"] == 2 and "empty_texts" not in skipped
    lines = tmp_path / "b.jsonl"
    lines.write_text("a\n\n  \nb\n")
    verbatim = tokenize([str(lines)], tmp_path / "b.bin", bpe, raw_lines=True)
    assert verbatim["documents"] == 4 and verbatim["empty_texts"] == 2


def test_missing_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(UserError, match="it contains: nothing"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_tokenizing_does_not_import_torch() -> None:
    modules = "evomesh.cli.tokenize, evomesh.cli.data, evomesh.data.prepare.tokenize, evomesh.data.packing.packs"
    code = f"import sys, {modules}; "
    subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=True
    )


def test_byte_order_mark_is_not_text(tmp_path: Path, bpe: Path) -> None:
    mark = b"\xef\xbb\xbf"
    for name, content in (
        ("a.txt", b"one\n"),
        ("a.jsonl", b'{"text": "one"}'),
        ("a.json", b' [{"text": "one"}]'),
    ):
        (tmp_path / name).write_bytes(mark + content)
        tokenize([str(tmp_path / name)], tmp_path / "a.bin", bpe)
        assert read_documents(tmp_path / "a.bin") == encode(bpe, ["one"])


@pytest.mark.slow
@pytest.mark.parametrize("raw_lines", [False, True])
@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        zstandard.ZstdCompressor().compress,
        lambda raw: zstandard.ZstdCompressor().compress(raw) * 2,
    ],
)
def test_compressed_file_truncated_anywhere_is_rejected(
    tmp_path: Path, bpe: Path, compress: Callable[[bytes], bytes], raw_lines: bool
) -> None:
    compressed = compress(write_jsonl(tmp_path / "x.jsonl", TEXTS).read_bytes())
    source = tmp_path / ("a.jsonl.gz" if compressed[:1] == b"\x1f" else "a.jsonl.zst")
    source.write_bytes(compressed)
    tokenize([str(source)], tmp_path / "a.bin", bpe, raw_lines=raw_lines)
    frames = (
        2
        if compressed[: len(compressed) // 2] == compressed[len(compressed) // 2 :]
        else 1
    )
    for size in range(1, len(compressed)):
        if frames == 2 and size == len(compressed) // 2:
            continue  # ends after a complete frame, and so is a complete file
        source.write_bytes(compressed[:size])
        with pytest.raises(UserError, match=r"a.jsonl.*cannot read the file"):
            tokenize([str(source)], tmp_path / "a.bin", bpe, raw_lines=raw_lines)


def test_empty_and_skippable_zstandard_frames_are_read(
    tmp_path: Path, bpe: Path
) -> None:
    raw = write_jsonl(
        tmp_path / "x.jsonl",
        [f"{number} {text}" for number in range(3000) for text in TEXTS],
    ).read_bytes()
    compress = zstandard.ZstdCompressor().compress
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    compressed = (
        compress(b"")
        + skipped
        + compress(raw[:100_000])
        + skipped
        + compress(raw[100_000:])
        + skipped
    )
    (tmp_path / "a.jsonl.zst").write_bytes(compressed)
    packed = (tmp_path / "a.jsonl.zst").open("rb")
    with decompress(packed, "zst", len(compressed)) as stream:
        assert stream.read() == raw


def test_pipe_is_rejected(tmp_path: Path, bpe: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl: not a regular file"):
        tokenize([str(tmp_path / "a.jsonl")], tmp_path / "a.bin", bpe)


def test_append_to_a_file_without_fingerprint(tmp_path: Path, bpe: Path) -> None:
    """Other tools write such files; this one also lacks the newline at its end."""
    output = tmp_path / "a.bin"
    output.write_bytes(b'{"tokens": [5, -9000]}\n{"tokens": [7]}')
    repair(output)
    facts = tokenize(
        [str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], output, bpe, append=True
    )
    assert read_documents(output) == [[5, -9000], [7], *encode(bpe, TEXTS)]
    assert "text_bytes" not in facts  # of the first two nobody knows it
    assert (facts["max_id"], facts["max_id_line"]) == (9000, 1)
    assert (
        facts["bin_hash"]
        == f"xxh3_128:{xxhash.xxh3_128_hexdigest(output.read_bytes())}"
    )


@pytest.mark.slow
def test_full_disk_is_reported_without_traceback(tmp_path: Path, bpe: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 500)
    code = "import resource, sys; from evomesh.cli.main import main; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); main()"
    command = [
        "tokenize",
        str(source),
        "-o",
        str(tmp_path / "out/a.bin"),
        "-t",
        str(bpe),
        "--no-eos",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert (
        "out/a.bin: cannot write: File too large\n  fix: raise the limit of file sizes"
        in ended.stderr
        and "Traceback" not in ended.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_file_that_two_inputs_name_is_refused(tmp_path: Path, bpe: Path) -> None:
    (tmp_path / "d").mkdir()
    path = write_jsonl(tmp_path / "d/a.jsonl", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(path)
    twice = [
        [str(path), str(path)],
        [str(tmp_path / "d"), str(path)],
        [str(tmp_path / "d/*.jsonl"), str(tmp_path / "d/../d/a.jsonl")],
        [str(tmp_path / "link.jsonl"), str(path)],
    ]
    for inputs in twice:
        with pytest.raises(UserError, match="named twice, by") as caught:
            tokenize(inputs, tmp_path / "a.bin", bpe)
        assert inputs[1] in caught.value.fix
