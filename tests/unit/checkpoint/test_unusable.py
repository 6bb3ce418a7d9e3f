"""A newest checkpoint that cannot be used, for whatever reason: a resume takes the one before it, with a warning."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.errors import UserError, printable
from evomesh.storage.base import StorageReader
from evomesh.storage.local import LocalReader, LocalStorage
from tests.support.nobody import as_nobody

NEWEST = "step-00000002"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "ckpts"
    writer = CheckpointWriter(str(root))
    for step in (1, 2):
        writer.save(
            step,
            {"w": torch.full((4, 3), float(step)), "v": torch.ones(2)},
            {"step": step},
            {},
        )
    writer.close()
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "ckpts")


def newest(root: Path, **options: Any) -> int | None:
    found = CheckpointReader().newest(SaveFolder.open(str(root)), **options)
    return None if found is None else found.step


def file_of(root: Path, kind: str) -> Path:
    (path,) = (root / NEWEST).glob(
        {"data": "*.safetensors", "index": "*.jsonl", "commit": "commit.json"}[kind]
    )
    return path


def assert_falls_back(root: Path, caplog: pytest.LogCaptureFixture, words: str) -> None:
    assert newest(root) == 1
    skipped = [
        record for record in caplog.records if record.getMessage().startswith("skipped")
    ]
    (record,) = skipped
    assert NEWEST in record.getMessage() and words in record.getMessage()
    assert record.levelno == logging.WARNING


# ---------------------------------------------------------------------------------------------- what the disk holds


@pytest.mark.parametrize("kind", ["data", "index", "commit"])
@pytest.mark.parametrize(
    "special", ["pipe", "device", "socket", "folder", "circle", "dangling"]
)
def test_a_special_file_is_never_opened(
    root: Path, caplog: pytest.LogCaptureFixture, kind: str, special: str
) -> None:
    path = file_of(root, kind)
    path.unlink()
    if special == "pipe":
        os.mkfifo(path)
    elif special == "device":
        path.symlink_to("/dev/zero")
    elif special == "socket":
        with (
            tempfile.TemporaryDirectory() as short,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.bind(f"{short}/s")  # a socket's path may have about 100 characters
            os.rename(f"{short}/s", path)
    elif special == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if special == "circle" else root / "nowhere")
    assert_falls_back(root, caplog, path.name)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["data", "index", "commit", "folder"])
@pytest.mark.parametrize("others", [True, False])
def test_what_nobody_may_read_is_skipped_and_never_a_fresh_start(
    original: Path, target: str, others: bool
) -> None:
    # Tmp_path cannot be entered by another user.
    with tempfile.TemporaryDirectory() as name:
        root = shutil.copytree(original, Path(name) / "ckpts")
        for path in (Path(name), *root.rglob("*")):
            path.chmod(0o755)
        if not others:
            shutil.rmtree(root / "step-00000001")
        (root / NEWEST if target == "folder" else file_of(root, target)).chmod(0)

        def resume() -> str:
            try:
                return f"step {newest(root)}"
            except UserError as error:
                return str(error)

        text = as_nobody(resume)
        (root / NEWEST).chmod(0o755)
    if others:
        assert text == "step 1"
    else:
        assert "no checkpoint verifies" in text and "Permission denied" in text


@pytest.mark.slow
def test_a_save_folder_that_nobody_may_list_is_an_error_and_no_fresh_start(
    original: Path,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = shutil.copytree(original, Path(name) / "ckpts")
        Path(name).chmod(0o755)
        root.chmod(0o311)

        def resume() -> str:
            with pytest.raises(UserError) as caught:
                newest(root)
            return str(caught.value)

        text = as_nobody(resume)
        root.chmod(0o755)
    assert "cannot be read: Permission denied" in text and str(root) in text


@pytest.mark.parametrize("code", [5, 116, 121])  # EIO, ESTALE, EREMOTEIO
def test_a_bad_sector(
    root: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    read = LocalReader.read_into

    def fail(self: LocalReader, start: int, buffer: memoryview) -> None:
        if NEWEST in self._path and self._path.endswith(".safetensors"):
            raise OSError(code, os.strerror(code), self._path)
        read(self, start, buffer)

    monkeypatch.setattr(LocalReader, "read_into", fail)
    assert_falls_back(root, caplog, os.strerror(code))


def test_a_renamed_step_folder_is_not_resumed_again_and_again(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / NEWEST).rename(root / "step-00000090")
    assert newest(root) == 1
    assert "named after step 90, but commit.json is of step 2" in caplog.messages[0]
    with pytest.raises(UserError, match="rename the folder to step-00000002"):
        CheckpointReader().resolve(str(root / "step-00000090"))


@pytest.mark.parametrize(
    "name",
    [
        "step-00000009\n",
        "step-٠٠٠٠٠٠٠٩",
        "step-9",
        "step-00000009-xyz",
        "xstep-00000009",
    ],
)
def test_names_that_only_look_like_a_step(root: Path, name: str) -> None:
    shutil.copytree(root / NEWEST, root / name)
    assert newest(root) == 2


# ------------------------------------------------------------------------------------ records with the right hashes


def reseal(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = file_of(root, "commit")
    body = json.loads(path.read_bytes())["body"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = fmt.sha256(text.encode("utf-8", "surrogatepass"))
    path.write_bytes(
        f'{{"body":{text},"sha256":"{digest}"}}'.encode("utf-8", "surrogatepass")
    )


def reindex(root: Path, lines: list[Any]) -> None:
    path = file_of(root, "index")
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    hashed = {"bytes": path.stat().st_size, "sha256": fmt.sha256(path.read_bytes())}
    reseal(root, lambda body: body["index"].update(hashed))


ODD = [
    None,
    True,
    -1,
    1.5,
    10**30,
    "x",
    "\x1b[2J",
    "\ud800",
    [],
    [[]],
    {},
    {"$float": []},
    {"$bytes": 7},
]
FIELDS = [
    "step",
    "attempt",
    "created",
    "config",
    "state",
    "layout",
    "parent",
    "snapshot",
    "software",
    "files",
    "index",
    "tensors",
    "version",
    "format",
]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_odd_fields_of_a_commit_record(root: Path, field: str, value: Any) -> None:
    """Each is accepted as what it says, or the checkpoint is skipped; no other error, and nothing is resumed twice."""
    reseal(root, lambda body: body.update({field: value}))
    assert newest(root) in (1, 2)


@pytest.mark.parametrize(
    "field",
    ["step", "attempt", "created", "config", "state", "files", "index", "tensors"],
)
@pytest.mark.parametrize(
    "value", [None, True, -1, 1.5, 10**30, "\x1b[2J", [[]]], ids=range(7)
)
def test_a_wrong_type_is_damage(
    root: Path, caplog: pytest.LogCaptureFixture, field: str, value: Any
) -> None:
    reseal(root, lambda body: body.update({field: value}))
    assert_falls_back(root, caplog, "commit.json")
    assert "\x1b" not in caplog.text


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("part", ["state", "config", "software"])
def test_nesting(root: Path, part: str) -> None:
    reseal(root, lambda body: body.update({part: {"x": deep(700)}}))
    assert newest(root) in (1, 2)


def line(**changes: Any) -> dict[str, Any]:
    return {
        "name": "w",
        "dtype": "F32",
        "shape": [4, 3],
        "pieces": [[0, [0, 0], [4, 3], 256, "ab"]],
        **changes,
    }


ODD_LINES: list[Any] = [
    None,
    [],
    "w",
    {},
    deep(500),
    *[line(name=value) for value in (None, 5, [], "\x1b[31m", "\u202ew")],
    *[line(dtype=value) for value in (None, [], {}, "F31", "f32")],
    *[
        line(shape=value)
        for value in (
            None,
            4,
            "43",
            [4, None],
            [4, True],
            [4, -3],
            [4.0, 3],
            [10**40, 3],
        )
    ],
    *[line(shape=[1] * 100, pieces=[]), line(shape=[2**62, 2**62], pieces=[])],
    *[
        line(pieces=value)
        for value in (None, {}, [None], [[]], [[0]], [5], [[0, [0, 0], [4, 3], 256]])
    ],
    *[
        line(pieces=[[value, [0, 0], [4, 3], 256, "ab"]])
        for value in (None, True, -1, 7, "0", 10**30)
    ],
    *[
        line(pieces=[[0, value, [4, 3], 256, "ab"]])
        for value in (None, [0], [0, 0, 0], [0, "0"], [2**63, 0])
    ],
    *[
        line(pieces=[[0, [0, 0], value, 256, "ab"]])
        for value in (None, [4], [4, 3, 1], [4, 2], [2**40, 2**40])
    ],
    *[
        line(pieces=[[0, [0, 0], [4, 3], value, "ab"]])
        for value in (None, -1, 1.0, 10**9, 2**62)
    ],
    line(pieces=[[0, [0, 0], [4, 3], 256, None]]),
    line(pieces=[[0, [0, 0], [4, 2], 256, "ab"], [0, [0, 1], [4, 1], 256, "ab"]]),
]


@pytest.mark.parametrize("odd", ODD_LINES, ids=range(len(ODD_LINES)))
def test_odd_lines_of_an_index(
    root: Path, caplog: pytest.LogCaptureFixture, odd: Any
) -> None:
    reindex(root, [line(name="v", shape=[2], pieces=[[0, [0], [2], 256, "ab"]]), odd])
    assert_falls_back(root, caplog, "step-00000002")
    assert "\x1b" not in caplog.text and "\u202e" not in caplog.text


def test_a_tensor_that_is_listed_twice(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        json.loads(text) for text in file_of(root, "index").read_text().splitlines()
    ]
    reindex(root, [lines[0], lines[0]])
    assert_falls_back(root, caplog, "twice")


def test_pieces_with_so_many_edges_that_counting_them_takes_all_memory(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cubes = [
        [0, [n * 3, n * 3 + 1, n * 3 + 2], [1, 1, 1], 256, "ab"] for n in range(1000)
    ]
    rest = [[0, [0, 0, 0], [3002, 3002, 1], 256, "ab"]]
    reindex(root, [line(shape=[3002, 3002, 3002], pieces=cubes + rest)])
    assert_falls_back(root, caplog, "step-00000002")
    boxes = [fmt.Box((n * 3, n * 3 + 1, n * 3 + 2), (1, 1, 1)) for n in range(1000)]
    assert not fmt.covers_once((10, 10, 10), boxes)


@pytest.mark.parametrize("size", [(64 << 20) + 1, 1 << 40])
def test_a_commit_record_of_a_terabyte_of_nothing(
    root: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    os.truncate(file_of(root, "commit"), size)
    assert_falls_back(root, caplog, "far more than any save writes")


def test_a_check_of_the_caller_that_fails_in_any_way(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (
        newest(
            root,
            check=lambda checkpoint: (
                int(checkpoint.state["step"]) // (2 - checkpoint.step)
            ),
        )
        == 1
    )
    assert "the stored state cannot be used: ZeroDivisionError" in caplog.messages[0]


# ------------------------------------------------------------------------------------------------- bytes on the way


class FlippingReader:
    """Passes one flipped bit on, at the first read that touches a chosen file."""

    def __init__(self, storage: Flipping, path: str, inner: StorageReader) -> None:
        self._storage, self._path, self._inner = storage, path, inner
        self.expect, self.close = inner.expect, inner.close

    def read_into(self, start: int, buffer: memoryview) -> None:
        self._inner.read_into(start, buffer)
        if (
            self._path.endswith(self._storage.suffix)
            and len(buffer)
            and self._storage.flips > 0
        ):
            self._storage.flips -= 1
            buffer[len(buffer) // 2] ^= 4


class Flipping(LocalStorage):
    def __init__(self, suffix: str, flips: int) -> None:
        super().__init__()
        self.suffix, self.flips = suffix, flips

    def open(self, path: str) -> StorageReader:  # type: ignore[override]
        return FlippingReader(self, path, super().open(path))


@pytest.mark.parametrize("suffix", ["commit.json", "index.jsonl", ".safetensors"])
@pytest.mark.parametrize(("flips", "step"), [(1, 2), (2, 2), (3, 1)])
def test_a_bit_flipped_on_the_way_is_read_again(
    root: Path, caplog: pytest.LogCaptureFixture, suffix: str, flips: int, step: int
) -> None:
    storage = Flipping(suffix, flips)
    found = CheckpointReader().newest(
        SaveFolder(storage, str(root), storage, str(root / "snapshot"))
    )
    assert found is not None and found.step == step
    words = "read again" if step == 2 else "does not match"
    assert words in caplog.text or "is not a commit record" in caplog.text


def test_a_bit_flipped_while_tensors_are_loaded(root: Path) -> None:
    storage = Flipping(".safetensors", 0)
    found = CheckpointReader().newest(
        SaveFolder(storage, str(root), storage, str(root / "snapshot"))
    )
    assert found is not None
    storage.flips = 2
    target = {"w": torch.zeros(4, 3), "v": torch.zeros(2)}
    CheckpointReader().load(found, target)
    assert (
        storage.flips == 0
        and bool((target["w"] == 2).all())
        and bool((target["v"] == 1).all())
    )


# ----------------------------------------------------------------------------------------------- what gets printed


@pytest.fixture
def hostile() -> Iterator[str]:
    yield "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\udcff\u2028\x9b31m"


def test_control_characters_are_printed_as_escapes(hostile: str) -> None:
    text = printable(hostile)
    assert text.isprintable() and r"\x1b]0;owned\x07" in text
    assert printable("训练\n中文\t　é") == "训练\n中文\t　é"
    assert printable("a\nb", keep="") == r"a\nb"


def test_an_error_message_never_acts_on_the_terminal(
    tmp_path: Path, hostile: str
) -> None:
    name = hostile.replace("/", "")
    (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught:
        CheckpointReader().resolve(str(tmp_path))
    error = caught.value
    for text in (str(error), error.found, error.where, error.fix):
        assert "owned" in str(error) and all(
            part.isprintable() for part in text.split("\n")
        )
