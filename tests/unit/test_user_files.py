"""Small files of users: whatever is wrong with one is a message that names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evomesh.config.deepspeed import deepspeed_settings
from evomesh.config.hugging_face import read_model_folder
from evomesh.data.token_files.folders import read_order
from evomesh.data.tokenizer_folder import read_json as read_tokenizer_json
from evomesh.errors import UserError
from evomesh.serve.load import read_key
from evomesh.user_files import read_json, read_text

NESTED = b"[" * 200_000


def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffgr\u00fc\u00df".encode())
    assert read_text(file) == "gr\u00fc\u00df"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ab\xff", "not UTF-8: byte 0xff at position 2"),
        ("\u4f60\u597d".encode("gb18030"), "not UTF-8: byte 0xc4 at position 0"),
        (NESTED, "not JSON"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(file, "--option", "an object")
    message = caught.value
    assert words in message.found and str(file) in message.found
    assert (message.where, message.expected) == ("--option", "an object")


@pytest.mark.parametrize("make", ["missing", "folder", "loop"])
def test_files_that_cannot_be_read(tmp_path: Path, make: str) -> None:
    file = tmp_path / "a"
    if make == "folder":
        file.mkdir()
    if make == "loop":
        os.symlink(file, file)
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_text(file)
    assert caught.value.where == str(file)


@pytest.mark.timeout(20)
def test_what_would_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a named pipe"):
        read_text(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a device") as caught:
        read_order(tmp_path / "zero")
    assert caught.value.exit_code == 2
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(UserError, match="has 268,435,457 bytes, more than"):
        read_text(tmp_path / "sparse", "--key-file")


def test_a_pipe_of_the_shell_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"secret\n")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == "secret\n"
    os.close(reader)


@pytest.mark.parametrize("content", [b"\xff\xfe", NESTED])
def test_every_reader_of_such_a_file_gives_a_message(
    tmp_path: Path, content: bytes
) -> None:
    """A key, an order file, a DeepSpeed file, and the JSON of model and tokenizer folders."""
    file = tmp_path / "config.json"
    file.write_bytes(content)
    readers = [
        lambda: read_model_folder(tmp_path),
        lambda: read_tokenizer_json(file),
        lambda: deepspeed_settings(str(file)),
    ]
    if content != NESTED:
        readers += [lambda: read_key("localhost", str(file)), lambda: read_order(file)]
    for reader in readers:
        with pytest.raises(UserError, match=r"UTF-8|JSON") as caught:
            reader()
        assert str(file) in str(caught.value)
