"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TextIO, cast

from evomesh.config.redact import RedactingStream, redact_text
from evomesh.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_READER_LEFT, UserError
from evomesh.outside_errors import TORCH_LOG_LEVEL, as_user_error, code_for, discard

SAME_ERROR = "the same error as of another rank"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun looks for the message that it prints last
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPIN_COUNT = 3000  # about 10 microseconds; see "A busy machine" in docs/performance.md


class OutputStream(RedactingStream):
    """Standard output or error: hides secrets and remembers whether its reader closed the pipe (``| head``)."""

    reader_left = False

    def write(self, text: str) -> int:
        """Write text; a closed pipe raises as ever."""
        with self._noting_closed_pipe():
            return super().write(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._noting_closed_pipe():
            self._stream.flush()

    @contextlib.contextmanager
    def _noting_closed_pipe(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.reader_left = True
            raise


def run(
    command: Callable[[], object], *, trains: bool = False, is_rank: bool = True
) -> None:
    """Call ``command``; an error whose cause is not a bug is printed without a traceback and ends the process.

    A command whose reader closed the pipe ends as ``cat`` would, without a word and
    with the shell's code for SIGPIPE. A training run does not: it trains for its
    checkpoints, not for its reader, and ends with its own code.

    Args:
        trains: watch for signals from now on: they end the process with 75 or 130, see ``StopRequest``.
        is_rank: this process trains itself; False if it starts those that do.
    """
    # Torch reads it when it is loaded. Its warnings of a lost connection are pages of
    # C++ stack frames; `peer_watch` names the rank instead.
    os.environ.setdefault(TORCH_LOG_LEVEL, "ERROR")
    _limit_spinning()
    _accept_any_text()
    _hide_secrets()
    threading.excepthook = _report_thread_error
    if trains:
        from evomesh.train.signals import StopRequest, end_with_supervisor

        StopRequest(is_rank=is_rank).watch()
        end_with_supervisor()
    with _end_before_threads_are_ended():
        _run_to_its_end(command, trains=trains)


def _run_to_its_end(command: Callable[[], object], *, trains: bool) -> None:
    """Call ``command`` and turn what it raises into a message and an exit code."""
    # typer and rich replace the streams and raise SystemExit(1) where a pipe is closed, so
    # that neither the exception nor sys.stdout tells: ask the streams that they replaced.
    streams: list[object] = [sys.stdout, sys.stderr]
    try:
        _call(command)
    except KeyboardInterrupt:
        _end(EXIT_INTERRUPTED)
    except (SystemExit, OSError) as ended:
        if not trains:
            _end_without_reader(streams)
        if isinstance(ended, SystemExit):
            if trains and _is_in_world():
                _end(_exit_code(ended))
            raise
        _report(ended)
    except Exception as error:
        _report(error)
    if not trains:
        _end_without_reader(streams)
    elif _is_in_world():  # see launch: gloo's groups are not destroyed
        _end(0)


@contextlib.contextmanager
def _end_before_threads_are_ended() -> Iterator[None]:
    """Let the process end after its exit functions if the ``with`` block leaves daemon threads behind.

    When Python before 3.14 shuts down, it ends every daemon thread as soon as that thread
    asks for the interpreter's lock. Where the thread is in C++ code of torch, which asks on
    its way back, the whole process aborts instead, with SIGABRT for an exit code.
    """
    earlier = set(threading.enumerate())
    ending = _Ending()
    # Exit functions run in reverse order. Those of torch and of others come later than
    # this one, and so run before it.
    atexit.register(ending.end)
    try:
        yield
    except SystemExit as ended:
        ending.exit_code = _exit_code(ended)
        raise
    except BaseException:
        ending.exit_code = EXIT_BUG
        raise
    finally:
        left = set(threading.enumerate()) - earlier
        if not any(thread.daemon for thread in left):
            atexit.unregister(ending.end)


class _Ending:
    """The last exit function of a process."""

    exit_code = 0

    def end(self) -> None:
        """End the process at once."""
        _flush_and_exit(self.exit_code)


def _exit_code(ended: SystemExit) -> int:
    """Return the code that Python would end with."""
    if ended.code is None:
        return 0
    return ended.code if isinstance(ended.code, int) else EXIT_BUG


def _call(command: Callable[[], object]) -> None:
    """Call ``command`` and write out what it printed, also where it ends the process itself."""
    try:
        command()
    except SystemExit:
        _flush_output()
        raise
    _flush_output()


def _end_without_reader(streams: Sequence[object]) -> None:
    """End the process quietly if the reader of one of its streams has closed the pipe."""
    outputs = [stream for stream in streams if isinstance(stream, OutputStream)]
    if not any(output.reader_left for output in outputs):
        return
    # The other stream may lead into the same pipe (2>&1), which Python flushes at exit.
    for output in outputs:
        discard(cast(TextIO, output))
    _end(EXIT_READER_LEFT)


def _report(error: Exception) -> None:
    """Print an error as a message and end the process; raise a bug again, for its traceback."""
    message = as_user_error(error)
    if message is not None and not os.environ.get("EVOMESH_DEBUG"):
        _fail(message)
    _write_error_file(traceback.format_exc())
    if not _is_in_world():
        raise error
    traceback.print_exc()
    _end(EXIT_BUG)


def _fail(message: UserError) -> None:
    """Print the message, unless another rank prints the same one, and end with its exit code."""
    text = redact_text(_words_of(message))
    if message.printed_elsewhere:
        _write_error_file(SAME_ERROR, seconds_later=60)
    else:
        _write_error_file(text)
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
    _end(message.exit_code)


def _words_of(message: UserError) -> str:
    """Return what is printed, in the language of the user."""
    from evomesh.error_codes.words import chosen_language, printed

    encoding = getattr(sys.stderr, "encoding", None)
    return printed(message, chosen_language(encoding=encoding))


def _end(exit_code: int) -> None:
    """End the process; at once where it is in a process group, which other ranks may never leave with it."""
    if _is_in_world():
        _flush_and_exit(exit_code)
    sys.exit(exit_code)


def _flush_and_exit(exit_code: int) -> NoReturn:
    """End the process without the shutdown of Python."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def _is_in_world() -> bool:
    """Return whether this process is in a process group; it is not before the module that makes one is imported."""
    process_group = sys.modules.get("evomesh.parallel.process_group")
    return process_group is not None and process_group.in_world()


def _limit_spinning() -> None:
    """Let OpenMP threads sleep soon when they wait for each other, unless the user has chosen how they wait.

    They wait at the end of every operator, by default in a loop that takes the core from
    the very thread that they wait for if other programs use the cores too. GNU's OpenMP,
    which torch's CPU builds bring along, reads the variable when torch is loaded.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _accept_any_text() -> None:
    """Let streams escape the characters that their encoding lacks, such as those of a file name in a log line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _hide_secrets() -> None:
    """Hide secrets in all that is printed from now on, tracebacks included."""
    if sys.stdout is not None and not isinstance(sys.stdout, OutputStream):
        sys.stdout = cast(TextIO, OutputStream(sys.stdout))
    if sys.stderr is not None and not isinstance(sys.stderr, OutputStream):
        sys.stderr = cast(TextIO, OutputStream(sys.stderr))


def _flush_output() -> None:
    """Write what the standard output still holds; a full disk is an error, and a closed pipe is noted by the stream."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        raise UserError(
            f"cannot write: {error.strerror}",
            where="standard output",
            code=code_for(error.errno),
        ) from None


def _report_thread_error(args: threading.ExceptHookArgs) -> None:
    """Print one line for a background thread that the system failed; a traceback for a bug."""
    message = None
    if args.exc_value is not None:
        message = as_user_error(args.exc_value)
    if message is None:
        threading.__excepthook__(args)
        return
    if sys.stderr is None:
        return
    name = "a thread"
    if args.thread is not None:
        name = args.thread.name
    line = redact_text(f"warning: {name} ended: {message}")
    # Not even standard error may be left to write to: a closed pipe, a full disk.
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _write_error_file(text: str, seconds_later: int = 0) -> None:
    """Leave the error where torchrun reads it; torchrun prints that of the rank that failed first, after all output.

    Args:
        seconds_later: what to add to the time of an error that is not the first one, so
            that torchrun does not take it for the cause.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    details = {"py_callstack": text, "timestamp": str(int(time.time()) + seconds_later)}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": details}}, file)
