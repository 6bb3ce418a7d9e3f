"""Errors whose cause is outside the code, as messages: files, disks, memory, limits, encodings.

Code that opens a file knows best what it was for, and raises its own ``UserError``.
``as_user_error`` is the last net, under every command: whatever the system refused
becomes a message, and a traceback remains the mark of a bug.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
from pathlib import Path
from typing import IO

from evomesh.errors import EXIT_RESTART, EXIT_USER_ERROR, UserError

# Of a network or a network file system: the same command may work in a while.
_NETWORK = (
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.EREMOTEIO,
)
_NOT_READABLE = (errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
# Libraries that read their settings from the environment while they are loaded, and how
# the names of their variables begin.
_VARIABLES = {
    "torch": ("TORCH", "PYTORCH"),
    "transformers": ("TRANSFORMERS_", "HF_"),
    "huggingface_hub": ("HF_", "HUGGINGFACE_"),
    "datasets": ("HF_",),
    "gradio": ("GRADIO_",),
    "gradio_client": ("GRADIO_",),
}
TORCH_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # every command sets it, see `run`
_CPU_ALLOCATOR = re.compile(
    r"(?:not enough|can't allocate) memory: you tried to allocate (\d+) bytes"
)


def as_user_error(error: BaseException) -> UserError | None:
    """Return the message for an error that the system caused; None for a bug, which keeps its traceback."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return _system_error(error)
    if is_out_of_memory(error):
        return _out_of_memory(error)
    library = _library_being_loaded(error)
    if library:
        return _bad_setting(library, error)
    if isinstance(error, UnicodeEncodeError):
        return UserError(
            f"{error.object!r} cannot be written in the encoding {error.encoding}",
            expected="a locale that has these characters",
            fix="export LC_ALL=C.UTF-8   (or PYTHONUTF8=1)",
            code="EVO-SYS-006",
        )
    return None


def not_written(
    path: str | Path, error: OSError, *, expected: str = "", fix: str = ""
) -> UserError:
    """Return the message for a file or a folder of a command line that cannot be written."""
    return UserError(
        f"cannot be written: {error.strerror}",
        where=str(path),
        expected=expected,
        fix=fix,
        code="EVO-CLI-006",
    )


def not_installed(package: str, extra: str, *, where: str = "") -> UserError:
    """Return the message for a package that is missing; ``pip install 'evomesh[EXTRA]'`` brings it."""
    return UserError(
        f"{package} is not installed",
        where=where,
        fix=f"pip install 'evomesh[{extra}]'",
        code="EVO-CLI-007",
    )


def missing_module(error: ModuleNotFoundError, extra: str) -> Exception:
    """Return the message for a module of another package; one of ours that is missing is a bug."""
    if error.name is None or error.name.startswith("evomesh"):
        return error
    return not_installed(error.name, extra)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, or torch on a CPU or a GPU, could not get memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    is_of_torch = isinstance(error, RuntimeError)
    return is_of_torch and _CPU_ALLOCATOR.search(str(error)) is not None


def _library_being_loaded(error: BaseException) -> str:
    """Return the library of ``_VARIABLES`` whose import failed with this error, "" for any other error."""
    library = ""
    trace = error.__traceback__
    while trace is not None:
        # The code of a module, outside its functions, runs while it is loaded.
        if trace.tb_frame.f_code.co_name == "<module>":
            module = trace.tb_frame.f_globals.get("__name__", "")
            library = module.partition(".")[0]
        trace = trace.tb_next
    return library if library in _VARIABLES else ""


def _bad_setting(library: str, error: BaseException) -> UserError | None:
    """Return the message for a variable that a library does not accept; None where no variable of it is set."""
    prefixes = _VARIABLES[library]
    names = {name for name in os.environ if name.startswith(prefixes)}
    found = sorted(names - {TORCH_LOG_LEVEL})
    if not found:
        return None
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"{library} cannot be loaded: {reason}",
        where=f"environment ({', '.join(found)})",
        expected=f"values that {library} knows",
        fix=f"unset {' '.join(found)}   (or only the wrong one of them)",
        code="EVO-SYS-005",
    )


def _system_error(error: OSError) -> UserError:
    names = []
    for name in (error.filename, error.filename2):
        if isinstance(name, str | bytes):  # a file descriptor is a number
            names.append(os.fsdecode(name))
    reason = error.strerror or str(error) or type(error).__name__
    if len(names) == 2:
        reason = f"cannot move {names[0]} to {names[1]}: {reason}"
    elif names:
        reason = f"cannot read or write {names[0]}: {reason}"
    fix = fix_for(error.errno)
    if "temporary directory" in reason:  # tempfile's, which found none to write to
        fix = "export TMPDIR=FOLDER, one with free space; see also: ulimit -f"
    return UserError(
        reason,
        fix=fix,
        exit_code=EXIT_RESTART if is_outage(error.errno) else EXIT_USER_ERROR,
        code=code_for(error.errno),
    )


def is_outage(number: int | None) -> bool:
    """Return True for errors of a network or a server that may answer again in a while."""
    return number in _NETWORK


def code_for(number: int | None) -> str:
    """Return the code of a system error."""
    if number in _FULL or number == errno.EFBIG:
        return "EVO-SYS-002"
    return "EVO-SYS-003" if is_outage(number) else "EVO-SYS-001"


def fix_for(number: int | None) -> str:
    """Return what helps against a system error, "" where the message is all there is to say."""
    if number in _NOT_READABLE:
        return f"change its permissions, or run as a user who may use it (this is user number {os.geteuid()})"
    if number in _FULL:
        return "free space or quota there, or choose another folder"
    if number == errno.EFBIG:
        return "raise the limit of file sizes: ulimit -f unlimited"
    if number == errno.EROFS:
        return "choose a folder on a file system that is mounted for writing"
    if number in _TOO_MANY_FILES:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"raise the limit of open files (now {soft}, hard limit {hard}): ulimit -n 65536, or limits.conf"
    if number in _NETWORK:
        return (
            "rerun the same command once the network or the file system answers again"
        )
    return ""


def _out_of_memory(error: BaseException) -> UserError:
    wanted = _CPU_ALLOCATOR.search(str(error))
    # CUDA's own sentence has all its numbers, and so has NumPy's.
    detail = str(error).partition("\n")[0]
    if wanted is not None:
        detail = f"{gigabytes(int(wanted[1]))} were asked for"
    found = f"out of memory: {detail}" if detail else "out of memory"
    return UserError(
        f"{found}; {_memory_of_the_machine()}",
        expected="a model, a batch and data that fit",
        fix="see what a run needs: evomesh plan CONFIG; shard over more ranks, or lower data.micro_bsz, "
        "data.seq_len or the model's size",
        code="EVO-SYS-004",
    )


def _memory_of_the_machine() -> str:
    """Return what is free of the machine's memory, and the limit of this process if it has one."""
    words = []
    try:
        rows = read_meminfo()
        available = rows["MemAvailable"]
        total = rows["MemTotal"]
        words.append(
            f"{gigabytes(available)} of {gigabytes(total)} are free on this machine"
        )
    except (OSError, ValueError, KeyError):
        words.append("the machine does not report its memory")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        words.append(f"this process is limited to {gigabytes(limit)} (ulimit -v)")
    return ", ".join(words)


def read_meminfo() -> dict[str, int]:
    """Return the rows of /proc/meminfo, in bytes by name.

    Raises:
        OSError, ValueError: the system has no such file, or one of another form.
    """
    sizes = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            # "SwapFree:       19845120 kB"; counts of pages have no unit.
            name, _, row = line.partition(":")
            number, *unit = row.split()
            size = int(number)
            if unit:
                size *= 1024
            sizes[name] = size
    return sizes


def gigabytes(count: int) -> str:
    """Return a number of bytes in GB, as ``1.5 GB``."""
    return f"{count / 1e9:,.1f} GB"


def discard(stream: IO[str]) -> None:
    """Send what is written to a stream from now on to nowhere, so that Python's flush at exit cannot fail either."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
