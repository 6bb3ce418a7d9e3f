"""Text tokenized while training reads it: nothing lost or repeated, exact resume, the same steps in every layout."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from evomesh.config.data import DataConfig
from evomesh.data.build import build_train_data, build_valid_data
from evomesh.data.records import rows as rows_module
from evomesh.data.records.rows import RowCursor, RowStream, find_split_files
from evomesh.data.records.source_files import find_source_files
from evomesh.errors import UserError
from tests.support.covers import covers

pytestmark = covers("promise:streaming")

WORDS = 4000
IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a word-level tokenizer: ``w17`` is id 17, eos is 1."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{n}": n for n in range(2, WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    made.save(str(path))
    return path


def texts(count: int, seed: int = 0) -> list[str]:
    """Return documents whose words are all different, so that a token identifies its document and position."""
    rng = np.random.RandomState(seed)
    word, found = 2, []
    for _ in range(count):
        length = rng.randint(0, 14)
        found.append(" ".join(f"w{n}" for n in range(word, word + length)))
        word += length
    return found


def write(folder: Path, found: list[str], files: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.array(found, dtype=object), files)):
        lines = "".join(json.dumps({"text": text, "id": 0}) + "\n" for text in part)
        (folder / f"train-{number}.jsonl").write_text(lines)
    return folder


def config(folder: Path, tokenizer: Path, **values: Any) -> DataConfig:
    options = {"type": "streaming", "train_folder": str(folder), "tokenizer_path": str(tokenizer), "seq_len": 16,
               "micro_num": 2, "valid_every": 0}  # fmt: skip
    return DataConfig(**(options | values))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "WINDOW", 8)


def take(stream: Any, steps: int) -> list[list[list[int]]]:
    found = [next(stream).tokens.tolist() for _ in range(steps)]
    stream.close()
    return found


def test_one_pass_holds_every_token_once(tmp_path: Path, tokenizer: Path) -> None:
    found = texts(300)
    folder = write(tmp_path / "d", found)
    words = sum(len(text.split()) for text in found)
    eos = sum(1 for text in found if text)
    steps = (words + eos) // 32
    batches = take(build_train_data(config(folder, tokenizer), WORDS).stream(), steps)
    counts = Counter(token for batch in batches for row in batch for token in row)
    repeated = [token for token, count in counts.items() if count > 1 and token != 1]
    missing = words - sum(1 for token in counts if token > 1)
    # The two lanes do not end a pass at the same token, so a few of the next pass come before the last of this one.
    assert len(repeated) <= 60
    assert missing <= 60
    again = take(build_train_data(config(folder, tokenizer), WORDS).stream(), 2 * steps)
    assert (
        max(
            Counter(
                token for batch in again for row in batch for token in row if token > 1
            ).values()
        )
        <= 3
    )
    assert again[: len(batches)] == batches


def test_text_is_packed_by_the_rules_of_tokenized_data(
    tmp_path: Path, tokenizer: Path
) -> None:
    folder = write(tmp_path / "d", texts(100))
    batch = next(build_train_data(config(folder, tokenizer), WORDS).stream())
    for lane in range(2):
        ids, labels = batch.tokens[lane].tolist(), batch.labels[lane].tolist()
        bounds = batch.cu_seqlens[lane].tolist()
        for position in range(15):
            is_eos = ids[position] == 1
            assert labels[position] == (IGNORED if is_eos else ids[position + 1])
            assert (position + 1 in bounds) == is_eos
        assert labels[15] in (IGNORED, 1, ids[15] + 1)


@pytest.mark.parametrize("split", [(1, 4), (2, 2), (4, 1)])
def test_steps_do_not_depend_on_the_layout(
    tmp_path: Path, tokenizer: Path, split: tuple[int, int]
) -> None:
    folder = write(tmp_path / "d", texts(200))
    micro_num, dp_size = split
    whole = take(
        build_train_data(config(folder, tokenizer, micro_num=4), WORDS).stream(), 20
    )
    data = build_train_data(config(folder, tokenizer, micro_num=micro_num), WORDS)
    shares = [
        take(data.stream(dp_rank=rank, dp_size=dp_size), 20) for rank in range(dp_size)
    ]
    for step in range(20):
        assert sorted(row for share in shares for row in share[step]) == sorted(
            whole[step]
        )


def test_any_layout_resumes_from_any_step(tmp_path: Path, tokenizer: Path) -> None:
    folder = write(tmp_path / "d", texts(60))  # several passes
    data = build_train_data(config(folder, tokenizer, micro_num=2), WORDS)
    streams = [data.stream(dp_rank=rank, dp_size=2) for rank in range(2)]
    states, rows = [], []
    for _ in range(30):
        states.append(
            json.loads(
                json.dumps(data.merge_states([stream.state() for stream in streams]))
            )
        )
        rows.append(
            sorted(row for stream in streams for row in next(stream).tokens.tolist())
        )
    for stream in streams:
        stream.close()
    one = build_train_data(config(folder, tokenizer, micro_num=4), WORDS)
    for step in range(0, 27, 2):
        assert [
            sorted(batch) for batch in take(one.stream(state=states[step]), 3)
        ] == rows[step : step + 3]
    from_the_start = one.stream()
    for _ in range(5):
        from_the_start.skip()
    assert [sorted(batch) for batch in take(from_the_start, 2)] == rows[5:7]
    assert len(json.dumps(states[-1])) < 500
    with pytest.raises(UserError, match="this run's have 6"):
        data.stream(dp_size=3, state=states[3])
    write(folder, texts(61))
    with pytest.raises(UserError, match="data changed"):
        build_train_data(config(folder, tokenizer, micro_num=4), WORDS).stream(
            state=states[3]
        )


@pytest.mark.parametrize("kind", ["parquet", "arrow", "txt", "json", "jsonl.gz"])
def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    found = [text for text in texts(50) if text]
    table = datasets.Dataset.from_dict({"text": found})
    folder = tmp_path / "d"
    folder.mkdir()
    if kind == "parquet":
        table.to_parquet(str(folder / "train.parquet"), batch_size=7)
    elif kind == "arrow":
        datasets.DatasetDict(
            {"train": table, "test": table.select(range(3))}
        ).save_to_disk(str(folder))
    elif kind == "txt":
        (folder / "a.txt").write_text("\n".join(found))
    elif kind == "json":
        (folder / "a.json").write_text(json.dumps([{"text": text} for text in found]))
    else:
        (folder / "a.jsonl.gz").write_bytes(
            gzip.compress("\n".join(json.dumps({"text": t}) for t in found).encode())
        )
    files, _ = find_split_files(str(folder), "data.train_folder", None, "train")
    stream = RowStream(files, "text", 3)
    windows = []
    for window in stream.windows(RowCursor()):
        if window.next_cursor.epoch:
            break
        windows.append(window)
    assert sorted(text for window in windows for text in window.texts) == sorted(found)
    assert [text for window in windows for text in window.texts] != found
    for before, window in pairwise(windows):
        assert next(stream.windows(before.next_cursor)) == window
    if kind == "arrow":
        assert (
            len(find_split_files(str(folder), "data.valid_folder", None, "valid")[0])
            == 1
        )


@covers("data.subset_name")
def test_split_and_subset_are_chosen_by_name(tmp_path: Path) -> None:
    def names(subset: str | None, split: str = "train") -> list[str]:
        return [
            str(file.full_path.relative_to(folder))
            for file in find_split_files(str(folder), "k", subset, split)[0]
        ]

    folder = write(tmp_path / "d", texts(9))
    # The fingerprint of a token file is not data.
    (folder / "train.bin.json").write_text("{}")
    (folder / "more.txt").write_text("w5\n")
    files, warnings = find_split_files(str(folder), "k", None, "train")
    assert len(files) == 3
    assert warnings == [
        "left out: 1 file such as more.txt, because other files are named train; "
        'data.split_name="all" reads all files'
    ]
    (folder / "train.txt").write_text("w5\n")
    assert (
        "(3 json, 1 txt); only the json files are read; set data.subset_name"
        in find_split_files(str(folder), "k", None, "train")[1][0]
    )
    with zipfile.ZipFile(folder / "books.zip", "w") as archive:
        archive.writestr("old/train.txt", "w5\n")
        archive.writestr("old/test.txt", "w6\n")
        archive.writestr("new/train.txt", "w6\n")
        archive.writestr("old/readme.md", "no data")
    assert names("txt") == [
        "books.zip/new/train.txt",
        "books.zip/old/train.txt",
        "train.txt",
    ]
    assert names("books.zip") == names("txt")[:2]
    assert names("books.zip/old") == names("txt")[1:2]
    assert names(None, "valid") == ["books.zip/old/test.txt"]
    with pytest.raises(
        UserError,
        match=r"no folder or archive 'arrow'(.|\n)*formats jsonl, txt, or one of books.zip",
    ):
        names("arrow")


@covers("data.split_name", "data.valid_split_name")
def test_training_and_validation_read_the_splits_that_are_named(
    tmp_path: Path, tokenizer: Path
) -> None:
    (tmp_path / "train_a.txt").write_text("w5 w6 w7\n" * 40)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/extra-00000-of-00001.txt").write_text("w8 w9\n" * 40)
    options = {
        "split_name": "extra",
        "valid_folder": str(tmp_path),
        "valid_split_name": "train",
    }
    made = config(tmp_path, tokenizer, **options)
    tokens = next(build_train_data(made, WORDS).stream()).tokens
    assert set(tokens.flatten().tolist()) == {8, 9, 1}
    (valid,) = build_valid_data(made, WORDS)
    assert {
        label
        for batch in valid.batches(0, 1)
        for label in batch.labels.flatten().tolist()
    } == {
        6,
        7,
        1,
        IGNORED,
    }


def pack_members(path: Path, members: dict[str, bytes]) -> None:
    """Write an archive of the kind that its suffix names, with these members in order."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return
    mode: Any = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def kinds_of_files(found: list[str]) -> dict[str, bytes]:
    """Return the texts divided among one file of each kind, names in sorted order."""
    datasets = pytest.importorskip("datasets")
    parts = [list(part) for part in np.array_split(np.array(found, dtype=object), 7)]
    table, arrow = io.BytesIO(), io.BytesIO()
    datasets.Dataset.from_dict({"text": parts[0]}).to_parquet(table, batch_size=7)
    pyarrow = pytest.importorskip("pyarrow")
    rows = pyarrow.table({"text": parts[1]})
    with pyarrow.ipc.new_stream(arrow, rows.schema) as writer:
        writer.write_table(rows)
    lines = ["\n".join(json.dumps({"text": text}) for text in part) for part in parts]
    quoted = "id,text\r\n" + "".join(f'1,"{text}"\r\n' for text in parts[2])
    return {
        "a.parquet": table.getvalue(),
        "b.arrow": arrow.getvalue(),
        "c.csv": quoted.encode(),
        "d.json": f"[{','.join(lines[3].splitlines())}]".encode(),
        "e/f.jsonl": lines[4].encode(),
        "e/g.jsonl.gz": gzip.compress(lines[5].encode()),
        "h.txt": "\n".join(parts[6]).encode(),
    }


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.zip"])
@pytest.mark.parametrize("backwards", [False, True])
def test_an_archive_gives_the_rows_of_its_files_from_any_cursor(
    tmp_path: Path, name: str, backwards: bool
) -> None:
    found = [text for text in texts(150) if text]
    members = kinds_of_files(found)
    folder = tmp_path / "d"
    folder.mkdir()
    stored = dict(reversed(members.items())) if backwards else members
    pack_members(folder / name, stored | {"notes.md": b"no data", "._h.txt": b"\xff"})
    files, _ = find_split_files(str(folder), "k", None, "train")
    assert [str(file.full_path.relative_to(folder / name)) for file in files] == sorted(
        members
    )
    stream = RowStream(files, "text", 3)
    windows = []
    for window in stream.windows(RowCursor()):
        if window.next_cursor.epoch:
            break
        windows.append(window)
    assert [text for window in windows for text in window.texts] != found
    in_order = [record.value for record, _, _ in stream._rows(0, 0)]
    assert [
        value if isinstance(value, str) else value["text"] for value in in_order
    ] == found
    for before, window in pairwise(windows):
        assert next(stream.windows(before.next_cursor)) == window


def test_a_resume_in_the_middle_of_an_archive_is_exact(
    tmp_path: Path, tokenizer: Path
) -> None:
    members = kinds_of_files([text for text in texts(120) if text])
    folder = tmp_path / "d"
    folder.mkdir()
    pack_members(folder / "m.tar.gz", dict(list(members.items())[:4]))
    pack_members(folder / "n.zip", dict(list(members.items())[4:6]))
    (folder / "h.txt").write_bytes(members["h.txt"])
    data = build_train_data(config(folder, tokenizer), WORDS)
    stream = data.stream()
    states, batches = [], []
    for _ in range(40):  # more than a pass
        states.append(json.loads(json.dumps(stream.state())))
        batches.append(next(stream).tokens.tolist())
    stream.close()
    assert len({(state["cursor"]["file"]) for state in states}) == 7
    assert states[-1]["cursor"]["epoch"] > 0
    for step in range(0, 37, 3):
        assert take(data.stream(state=states[step]), 3) == batches[step : step + 3]


@pytest.mark.parametrize(
    ("name", "spoil", "part"),
    [
        (
            "x.zip",
            lambda whole: whole[:-40],
            "cannot read the archive: File is not a zip file",
        ),
        (
            "x.tar.gz",
            lambda whole: whole[:-40],
            "cannot read the archive: Compressed file ended",
        ),
        (
            "x.tar.gz",
            lambda whole: b"plain" + whole,
            "cannot read the archive: Not a gzipped file",
        ),
        (
            "x.tar",
            lambda whole: whole[:1600],
            "cannot read the archive: unexpected end of data",
        ),
        ("x.tar", lambda whole: whole[:1100], r"truncated at byte 1024"),
        (
            "x.tar",
            lambda whole: whole[:1024],
            r"truncated at byte 1024 \(unpacked\), after 1 file",
        ),
        (
            "x.tar",
            lambda whole: whole[:1030] + b"?" + whole[1031:],
            r"damaged at byte 1024",
        ),
        ("x.tar", lambda whole: b"no tar" * 200, "cannot read the archive"),
        ("x.7z", lambda whole: whole, "archives of this kind are not supported"),
    ],
)
def test_broken_archives_are_refused_by_name(
    tmp_path: Path, name: str, spoil: Any, part: str
) -> None:
    pack_members(tmp_path / "x.tar", {"a.txt": b"w2\n", "b.txt": b"w3\n" * 300})
    whole = tmp_path / name
    if name != "x.7z":
        pack_members(whole, {"a.txt": b"w2\n", "b.txt": b"w3\n" * 300})
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / name).write_bytes(
        spoil((whole if whole.exists() else tmp_path / "x.tar").read_bytes())
    )
    with pytest.raises(UserError, match=part) as caught:
        find_split_files(str(folder), "k", None, "train")
    assert str(folder / name) in str(caught.value)


def test_broken_files_and_members_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "w2\n" * 100)
    path.write_bytes(path.read_bytes().replace(b"w2\nw2", b"w2\nw3", 1))
    with pytest.raises(
        UserError, match=r"x.zip/a.txt: cannot read the file: Bad CRC-32"
    ):
        list(RowStream(find_source_files([str(path)]), "text", 0)._rows(0, 0))
    for content, part in [
        (b"text,id\nw2\n", "a.csv line 2: the row has 1 fields"),
        (b'text\n"w2\n', "not csv"),
        (b"text\n\xff\n", "byte 0xff is not UTF-8"),
        (b"body\nw2\n", r"no field 'text' \(it has: body\)"),
    ]:
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(UserError, match=part):
            next(
                RowStream(
                    find_source_files([str(tmp_path / "a.csv")]), "text", 0
                ).windows(RowCursor())
            )
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    files = find_source_files([str(tmp_path / "a.jsonl")])
    with pytest.raises(UserError, match="of type null") as caught:
        next(RowStream(files, "text", 0).windows(RowCursor()))
    assert "content_name" not in caught.value.fix  # the column has the right name
    pack_members(path, {"a.md": b"x"})
    with pytest.raises(UserError, match=r"'x\.zip' contains no such file"):
        find_source_files([str(path)])


def test_a_validation_set_of_text_has_every_target_once(
    tmp_path: Path, tokenizer: Path
) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    found = [text for text in texts(40, 1) if text]
    (folder / "validation.txt").write_text("\n".join(found) + "\n")
    (valid,) = build_valid_data(
        config(folder, tokenizer, valid_folder=str(folder)), WORDS
    )
    got = [
        label
        for batch in valid.batches(0, 1)
        for label in batch.labels.flatten().tolist()
        if label not in (IGNORED, 1)
    ]
    expected = [int(word[1:]) for text in found for word in text.split()[1:]]
    assert sorted(got) == sorted(expected)
    assert valid.name == "v"


@covers("data.content_name")
def test_a_hub_id_is_a_dataset_of_the_local_cache(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    by_id = config(tmp_path, tokenizer, train_folder="owner/stories")
    with pytest.raises(
        UserError, match="hf download owner/stories --repo-type dataset"
    ):
        build_train_data(by_id, 2000)
    repository = tmp_path / "hub" / "datasets--owner--stories"
    snapshot = write(repository / "snapshots" / "abc", texts(20))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    by_path = config(snapshot, tokenizer)
    found, expected = (
        take(build_train_data(data, 2000).stream(), 3) for data in (by_id, by_path)
    )
    assert found == expected


def test_bad_settings_and_texts_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    folder = write(tmp_path / "d", texts(30))

    def assert_refused(part: str, vocab_size: int = WORDS, **values: Any) -> None:
        with pytest.raises(UserError, match=part):
            next(
                build_train_data(
                    config(folder, tokenizer, **values), vocab_size
                ).stream()
            )

    assert_refused(
        r"no field 'body' \(it has: text, id\)[^$]*data.content_name",
        content_name="body",
    )
    assert_refused("outside the model's vocabulary", vocab_size=20)
    assert_refused("No such file", train_folder=str(tmp_path / "no"))
    write(folder, [""] * 30)
    assert_refused("no row contains any text")


def test_only_one_window_is_read_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w2\n" * 1000 + "\n")
    windows = RowStream(find_source_files([str(path)]), "text", 0).windows(RowCursor())
    assert next(windows).next_cursor == RowCursor(n=8, window=1, row=8)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_rows_that_are_all_too_short_end_the_run_with_their_numbers(
    tmp_path: Path, tokenizer: Path, dp_size: int
) -> None:
    folder = write(tmp_path / "d", ["w2 w3 w4", "w5", "w6 w7"] * 20)
    data = build_train_data(config(folder, tokenizer, min_length=5), WORDS)
    stream = data.stream(dp_rank=dp_size - 1, dp_size=dp_size)
    with pytest.raises(
        UserError,
        match=r"none of \d+ rows has data.min_length=5 tokens, the longest has 4",
    ):
        next(stream)
    stream.close()


def test_one_row_that_is_long_enough_is_enough(tmp_path: Path, tokenizer: Path) -> None:
    folder = write(tmp_path / "d", ["w2"] * 40 + [" ".join(["w9"] * 40)] + ["w3"] * 20)
    batches = take(
        build_train_data(config(folder, tokenizer, min_length=30), WORDS).stream(), 4
    )
    assert {token for batch in batches for row in batch for token in row} == {1, 9}


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["w2 w3", "w4", ""], {"valid_min_length": 5},
         "none of 2 rows has data.valid_min_length=5 tokens, the longest has 3"),
        (["unknown", "words"], {}, "none of 4 tokens is a target"),
        ([""], {}, "no row contains any text"),
    ],
)  # fmt: skip
def test_a_validation_set_of_text_without_anything_to_measure_is_refused(
    tmp_path: Path,
    tokenizer: Path,
    lines: list[str],
    options: dict[str, Any],
    words: str,
) -> None:
    (tmp_path / "validation.txt").write_text("\n".join(lines) + "\n")
    # Id 0 is never a target; without eos nothing else is in the documents.
    made = Tokenizer.from_file(str(tokenizer))
    if "unknown" in lines:
        made = Tokenizer(models.WordLevel({"<unk>": 0, "w2": 1}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        lines[0] = lines[1] = "unknown words"
        (tmp_path / "validation.txt").write_text("\n".join(lines) + "\n")
    made.save(str(tmp_path / "tokenizer.json"))
    found = config(tmp_path, tmp_path / "tokenizer.json", valid_folder=str(tmp_path))
    with pytest.raises(UserError, match=words) as caught:
        build_valid_data(found.model_copy(update=options), WORDS)
    assert "data.valid_folder" in str(caught.value) or str(tmp_path) in str(
        caught.value
    )


def test_training_on_text_without_a_target_ends_with_its_numbers(
    tmp_path: Path,
) -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "w2": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tok").mkdir()
    made.save(str(tmp_path / "tok/tokenizer.json"))
    folder = write(tmp_path / "d", ["a b c", "w2", "d e"] * 20)
    data = build_train_data(config(folder, tmp_path / "tok/tokenizer.json"), WORDS)
    stream = data.stream()
    with pytest.raises(UserError, match=r"none of \d+ tokens is a target"):
        for _ in range(30):
            next(stream)
    stream.close()


@covers("data.encoding")
def test_text_in_another_encoding_gives_the_same_steps(
    tmp_path: Path, tokenizer: Path
) -> None:
    plain = write(tmp_path / "a", [f"w{n} 你好 w{n + 1}" for n in range(2, 90)])
    other = tmp_path / "b"
    other.mkdir()
    for path in plain.iterdir():
        lines = path.read_text().splitlines()
        text = "".join(
            json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in lines
        )
        (other / path.name).write_bytes(text.encode("gb18030"))
    expected = take(build_train_data(config(plain, tokenizer), WORDS).stream(), 4)
    recoded = config(other, tokenizer, encoding="gb18030")
    assert take(build_train_data(recoded, WORDS).stream(), 4) == expected
    with pytest.raises(UserError, match=r"not UTF-8(.|\n)*data.encoding='gb18030'"):
        next(build_train_data(config(other, tokenizer), WORDS).stream())
    with pytest.raises(UserError, match="no encoding 'klingon'") as caught:
        build_train_data(config(other, tokenizer, encoding="klingon"), WORDS)
    assert caught.value.where == "data.encoding"


def test_windows_of_very_long_texts_end_early(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "d", texts(60))
    monkeypatch.setattr(rows_module, "WINDOW_CHARS", 100)
    files, _ = find_split_files(str(folder), "k", None, "train")
    windows = RowStream(files, "text", 0).windows(RowCursor())
    found = [window for _, window in zip(range(30), windows, strict=False)]
    lengths = [sum(map(len, window.texts)) for window in found]
    assert max(lengths) < 200 and min(len(window.texts) for window in found) < 8
    # A resume from any window continues with the next.
    again = RowStream(files, "text", 0).windows(found[7].next_cursor)
    assert [next(again).texts for _ in range(5)] == [w.texts for w in found[8:13]]
