"""What killed and living runs leave beside their output: real processes, really killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from evomesh.data.token_files import part_files as parts
from evomesh.data.token_files.writer import BinWriter

WORDS = [[1, 2], [3]]


@pytest.fixture
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["hello"], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def part_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def write(path: Path) -> None:
    with BinWriter(path) as writer:
        writer.write(WORDS)
        writer.commit({})


@contextmanager
def running_tokenize(
    output: Path, tokenizer: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``evomesh tokenize`` in a process that has written something and still has much to do."""
    source = tokenizer.with_name("long.jsonl")
    line = json.dumps({"text": "hello " * 10_000}).encode() + b"\n"
    source.write_bytes(line * 2000)  # 120 MB
    command = [
        sys.executable,
        "-m",
        "evomesh",
        "tokenize",
        str(source),
        "-o",
        str(output),
        "-t",
        str(tokenizer),
    ]
    process = subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.DEVNULL)
    try:
        while not any(path.stat().st_size for path in output.parent.glob(".*.part")):
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()
        source.unlink()


@pytest.mark.slow
def test_a_killed_tokenize_leaves_the_old_files_and_a_rerun_removes_its_part(
    tmp_path: Path, tokenizer_json: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "a.bin"
    write(output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with running_tokenize(output, tokenizer_json) as process:
        left = part_files(tmp_path)
        assert len(left) == 1 and re.fullmatch(
            r"\.a\.bin\.[A-Za-z0-9-]+\.[0-9a-f]{8}\.part", left[0]
        )
        write(output)  # while another run is alive, its part stays
        assert part_files(tmp_path) == left
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert part_files(tmp_path) == left
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a.*")} == before
    assert "removed" not in caplog.text
    write(output)
    assert part_files(tmp_path) == []
    assert (
        f"removed {tmp_path / left[0]}" in caplog.text
        and "left by a run that was killed" in caplog.text
    )


@pytest.mark.parametrize(
    ("host", "age", "stays"), [("", 0, False), ("other", 0, True), ("other", 2, False)]
)
def test_a_part_of_another_host_has_to_be_a_day_old(
    tmp_path: Path, host: str, age: int, stays: bool
) -> None:
    host = host or re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    left = [
        tmp_path / f".a.bin.{host}.00000000.part{suffix}" for suffix in ("", ".meta")
    ]
    for path in left:
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age * parts.DEAD_SECONDS,) * 2)
    write(tmp_path / "a.bin")
    assert part_files(tmp_path) == (sorted(path.name for path in left) if stays else [])


def test_without_locks_a_part_has_to_be_a_day_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(parts.fcntl, "flock", refuse)
    part, file = parts.open_part(tmp_path / "a.bin")
    file.close()
    parts.remove_dead_parts(tmp_path / "a.bin")
    assert part.exists()
    os.utime(part, (time.time() - 2 * parts.DEAD_SECONDS,) * 2)
    parts.remove_dead_parts(tmp_path / "a.bin")
    assert not part.exists()


@pytest.mark.slow
def test_a_rerun_cleans_up_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from evomesh.data.token_files import writer; replace = os.replace\n"
        "def last(source, target): replace(source, target); os.kill(os.getpid(), signal.SIGKILL)\n"
        "writer.os.replace = last\n"
        "with writer.BinWriter(sys.argv[1]) as out: out.write([[1]]); out.commit({})"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.bin")], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a.bin").exists() and not (tmp_path / "a.bin.meta").exists()
    assert [name.rpartition(".")[2] for name in part_files(tmp_path)] == [
        "json",
        "meta",
    ]
    write(tmp_path / "a.bin")
    assert part_files(tmp_path) == []
    assert (tmp_path / "a.bin.meta").exists()


def test_only_parts_of_the_same_output_are_removed(tmp_path: Path) -> None:
    names = [
        ".a.bin.cache.h.00000000.part",
        ".a.bin.h.notes.part",
        ".a.bin.part",
        ".b.bin.h.00000000.part",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - 2 * parts.DEAD_SECONDS,) * 2)
    write(tmp_path / "a.bin")
    assert part_files(tmp_path) == names
