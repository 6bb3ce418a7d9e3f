"""Python stacks of another process, as ``faulthandler`` writes them when it receives a signal."""

from __future__ import annotations

import re
from dataclasses import dataclass

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_ONE_THREAD = "Stack (most recent call first)"  # that of the main thread alone
_CALL = re.compile(r'File "(.+)", line (\d+) in (.+)')
# torch compiles in the middle of a step, for as long as it takes.
_COMPILERS = ("/torch/_dynamo/", "/torch/_inductor/", "/torch/_functorch/", "/triton/")
# What runs a compiled graph is in the same packages.
_GRAPH_RUNNERS = (
    "/torch/_dynamo/eval_frame.py",
    "/torch/_dynamo/external_utils.py",
    "/torch/_functorch/aot_autograd.py",
    "/torch/_functorch/_aot_autograd/runtime_wrappers.py",
    "/torch/_functorch/_aot_autograd/utils.py",
    "/torch/_inductor/output_code.py",
    "/torch/_inductor/utils.py",
)
_DEBUGGERS = ("/pdb.py", "/bdb.py", "/debugpy/", "/pydevd")
_DATA = "/evomesh/data/"
_COMMUNICATION = ("/torch/distributed/", "/torchinductor_", *_GRAPH_RUNNERS)
INNERMOST = 4  # calls of a stack that tell what it waits in


@dataclass(frozen=True)
class Call:
    """One line of a stack."""

    path: str
    line: int
    function: str

    def __str__(self) -> str:
        parts = self.path.split("/")
        short = "/".join(parts[-3:])
        return f"{short}:{self.line} in {self.function}"


@dataclass(frozen=True)
class Stacks:
    """The stacks of all threads of a process, innermost call first.

    Attributes:
        main: of the main thread; empty where it is not known.
        others: of the other threads.
    """

    main: tuple[Call, ...] = ()
    others: tuple[tuple[Call, ...], ...] = ()

    @property
    def is_compiling(self) -> bool:
        return any(_compiles(call) for call in self.main)

    @property
    def is_in_debugger(self) -> bool:
        return any(part in call.path for call in self.main for part in _DEBUGGERS)

    @property
    def is_in_communication(self) -> bool:
        """Return whether the main thread waits in torch's communication, or in a compiled graph, which may."""
        innermost = self.main[:INNERMOST]
        return any(part in call.path for call in innermost for part in _COMMUNICATION)

    @property
    def data_worker(self) -> Call | None:
        """Return where a background thread that reads data is; None: there is none, or it has nothing to do."""
        for stack in self.others:
            if any(_DATA in call.path for call in stack):
                return stack[0]
        return None


def _compiles(call: Call) -> bool:
    is_compiler = any(part in call.path for part in _COMPILERS)
    return is_compiler and not call.path.endswith(_GRAPH_RUNNERS)


def _thread_of(line: str, main_thread: int) -> int | None:
    """Return the thread whose stack begins with the next line, None if none does."""
    if line.startswith(_ONE_THREAD):
        return main_thread
    found = _THREAD.search(line)
    return int(found[1], 16) if found is not None else None


def parse_stacks(text: str, main_thread: int) -> Stacks:
    """Return the newest stacks in what ``faulthandler`` has written.

    Args:
        main_thread: identity of the main thread.
    """
    threads: dict[int, list[Call]] = {}
    current: list[Call] = []
    for line in text.splitlines():
        thread = _thread_of(line, main_thread)
        if thread is not None:
            current = []
            threads[thread] = current
            continue
        found = _CALL.search(line)
        if found is not None:
            file, line_number, function = found.groups()
            call = Call(file, int(line_number), function)
            current.append(call)
    main = threads.pop(main_thread, [])
    others = map(tuple, threads.values())
    return Stacks(tuple(main), tuple(others))
