"""Errors of the system become messages; bugs stay exceptions."""

from __future__ import annotations

import errno
import os
import resource
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from evomesh.checkpoint.native.store_errors import as_checkpoint_error
from evomesh.cli.run import run
from evomesh.errors import UserError
from evomesh.outside_errors import as_user_error, missing_module
from tests.support.interpreter import Interpreter


def raised(action: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.ENOSPC, ["No space left on device", "free space"], 2),
        (errno.EDQUOT, ["quota", "free space or quota"], 2),
        (errno.EACCES, ["Permission denied", "permissions"], 2),
        (errno.EROFS, ["Read-only file system", "mounted for writing"], 2),
        (errno.EMFILE, ["Too many open files", "ulimit -n"], 2),
        (errno.EFBIG, ["File too large", "ulimit -f"], 2),
        (errno.EIO, ["Input/output error"], 2),
        (errno.ENAMETOOLONG, ["File name too long"], 2),
        (errno.ELOOP, ["symbolic links"], 2),
        (errno.ESTALE, ["Stale file handle", "rerun"], 75),
        (errno.ECONNRESET, ["Connection reset", "rerun"], 75),
        (errno.ETIMEDOUT, ["timed out", "rerun"], 75),
    ],
)
def test_system_errors_name_the_file_and_help(
    number: int, words: list[str], code: int
) -> None:
    message = as_user_error(OSError(number, os.strerror(number), "some/file"))
    assert message is not None and message.exit_code == code
    for word in ["some/file", *words]:
        assert word in str(message)


def test_checkpoints_give_the_same_help() -> None:
    limit = OSError(errno.EFBIG, os.strerror(errno.EFBIG), "ckpts/step-00000004/x")
    assert "ulimit -f" in as_checkpoint_error(limit, "ckpts/step-00000004").fix


def test_no_folder_for_temporary_files() -> None:
    with mock.patch.object(tempfile, "_candidate_tempdir_list", lambda: ["/none"]):
        message = as_user_error(raised(tempfile._get_default_tempdir))
    assert message is not None and "TMPDIR" in message.fix


def test_real_errors(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for action in (
        (tmp_path / "b").read_bytes,
        (tmp_path / "a/b").read_bytes,
        tmp_path.read_bytes,
        lambda: (tmp_path / "a").rename(tmp_path / "no/b"),
        (tmp_path / "a").mkdir,
        (tmp_path / ("x" * 300)).touch,
    ):
        message = as_user_error(raised(action))
        assert message is not None and str(tmp_path) in str(message)


def test_memory_errors_have_numbers() -> None:
    huge = raised(lambda: torch.empty(10**15))
    message = as_user_error(huge)
    assert message is not None and message.exit_code == 2
    assert "4,000,000.0 GB were asked for" in str(
        message
    ) and "are free on this machine" in str(message)
    for error in (
        MemoryError(),
        MemoryError("Unable to allocate 7 PiB for an array"),
        torch.OutOfMemoryError("CUDA"),
    ):
        message = as_user_error(error)
        assert (
            message is not None
            and "out of memory" in str(message)
            and "evomesh plan" in message.fix
        )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("x"),
        RuntimeError("shape mismatch"),
        AssertionError(),
        TypeError("x"),
    ],
)
def test_bugs_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Restored afterwards.
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    assert as_user_error(error) is None
    assert raised(lambda: run(lambda: (_ for _ in ()).throw(error))) is error


def load(source: str, name: str) -> Callable[[], object]:
    """Return an action that runs source as the code of a module that is being imported."""
    code = compile(source, f"{name}.py", "exec")
    return lambda: exec(code, {"__name__": name})


def test_a_variable_that_a_library_refuses_while_it_is_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in os.environ:
        if name.startswith(("TORCH", "PYTORCH")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_LOGS", "nonsense")
    parse = "def parse():\n raise ValueError('\\nbad log settings\\nall, aot')\nparse()"
    message = as_user_error(raised(load(parse, "torch._logging")))
    assert message is not None and message.exit_code == 2
    assert "torch cannot be loaded: bad log settings" in message.found
    assert "TORCH_LOGS" in message.where and "unset TORCH_LOGS" in message.fix
    # The same error of a module of ours, or of torch without a variable, is a bug.
    assert as_user_error(raised(load(parse, "evomesh.x"))) is None
    monkeypatch.delenv("TORCH_LOGS")
    assert as_user_error(raised(load(parse, "torch._logging"))) is None


def test_a_missing_package_is_a_message_and_a_missing_module_of_ours_a_bug() -> None:
    theirs = missing_module(ModuleNotFoundError(name="uvicorn"), "serve")
    assert isinstance(theirs, UserError)
    assert (theirs.found, theirs.fix) == (
        "uvicorn is not installed",
        "pip install 'evomesh[serve]'",
    )
    for name in ("evomesh.serve.application", None):
        ours = ModuleNotFoundError(name=name)
        assert missing_module(ours, "serve") is ours


def test_messages_of_our_own_stay_as_they_are() -> None:
    error = UserError("found")
    assert as_user_error(error) is error


def print_odd_characters() -> None:
    sys.stdout.reconfigure(encoding="latin-1", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="strict")

    def command() -> None:
        print("配置 é \udcff")
        raise UserError("配置")

    run(command)


def test_characters_that_a_terminal_lacks_are_escaped(interpreter: Interpreter) -> None:
    finished = interpreter.run(print_odd_characters)
    assert finished.returncode == 2
    assert finished.stdout.startswith(r"\u914d\u7f6e ")
    assert finished.stderr == "error: \\u914d\\u7f6e\n"


def write_to_a_full_disk() -> None:
    sys.stdout = open("/dev/full", "w")  # noqa: SIM115
    run(lambda: print("x"))


def test_a_full_standard_output_is_a_message(interpreter: Interpreter) -> None:
    finished = interpreter.run(write_to_a_full_disk)
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: standard output: cannot write: No space left on device\n"
        "  explain: evomesh explain EVO-SYS-002\n"
    )


def fail_in_a_thread() -> None:
    def command() -> None:
        for error in (
            OSError(errno.ENOSPC, "No space left on device", "f"),
            ZeroDivisionError("a bug"),
        ):
            thread = threading.Thread(
                target=lambda error=error: (_ for _ in ()).throw(error), name="writer"
            )
            thread.start()
            thread.join()

    run(command)


def test_threads_that_the_system_fails_leave_one_line(interpreter: Interpreter) -> None:
    finished = interpreter.run(fail_in_a_thread)
    assert finished.returncode == 0
    assert (
        finished.stderr.count("Traceback") == 1
        and "ZeroDivisionError" in finished.stderr
    )
    assert (
        "warning: writer ended: cannot read or write f: No space left on device"
        in finished.stderr
    )


def open_too_many_files() -> None:
    def command() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        kept = [open(__file__) for _ in range(100)]  # noqa: SIM115
        print(len(kept))

    run(command)


def test_the_limit_of_open_files_is_named(interpreter: Interpreter) -> None:
    finished = interpreter.run(open_too_many_files)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr
    assert "(now 64, hard limit 64): ulimit -n" in finished.stderr
