"""The process that exports one checkpoint while a run trains.

It is not a thread of the run: an export takes memory, threads and random numbers, and a
library that it loads may crash. A process has its own of all these.

    argument    an ExportJob as JSON
    stdin       a pipe that nothing is written to: its end means that the run is gone
    stdout      one line of JSON, the ExportResult; everything else that is printed goes to stderr
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from evomesh.checkpoint.huggingface.export_job import END_S, ExportJob, ExportResult
from evomesh.outside_errors import as_user_error

LOWEST_PRIORITY = 19
FIRST_TO_END = "1000"  # of the processes that Linux ends when memory runs out


def run_export(job: ExportJob) -> ExportResult:
    """Export a checkpoint in this process, with the check of its logits."""
    # Loading torch takes seconds: not before this process has stepped back.
    from evomesh.checkpoint.huggingface.export import ExportOptions, export
    from evomesh.checkpoint.huggingface.exported_folder import ExportMark
    from evomesh.checkpoint.native.format import CheckpointError
    from evomesh.checkpoint.native.load import resolve

    found = resolve(job.checkpoint)
    if found.attempt != job.attempt:
        raise CheckpointError(
            f"it is of attempt {found.attempt}, not {job.attempt}: it was replaced",
            where=job.checkpoint,
            code="EVO-CKPT-011",
        )
    one_checkpoint = sum(file.size for file in found.files)
    _leave_room(job, one_checkpoint)
    lines: list[str] = []
    mark = ExportMark(job.run, job.step, job.attempt)
    options = ExportOptions(dtype=job.dtype, mark=mark)
    export(found, job.out, options, lines.append)
    return ExportResult(tuple(lines))


def _leave_room(job: ExportJob, one_checkpoint: int) -> None:
    """Refuse to take the room of the next checkpoint on the disk that both are on.

    Args:
        one_checkpoint: bytes of one; an export in the same dtype takes less.
    """
    from evomesh.checkpoint.native.format import CheckpointError
    from evomesh.quantities import readable

    save = Path(job.checkpoint.removeprefix("local:")).parent
    root = Path(job.out).parent
    if not save.is_dir() or save.stat().st_dev != root.stat().st_dev:
        return
    free = shutil.disk_usage(root).free
    if free < 2 * one_checkpoint:
        raise CheckpointError(
            f"{readable(free)} are free, and the next checkpoint needs {readable(one_checkpoint)} of them",
            where=job.out,
            code="EVO-CKPT-012",
        )


def main() -> None:
    """Run the job of the command line and print its result."""
    # Libraries print to stdout too; the result has it alone.
    results = os.dup(1)
    os.dup2(2, 1)
    _step_back()
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    try:
        job = ExportJob(**json.loads(sys.argv[1]))
        result = run_export(job)
    except KeyboardInterrupt:
        result = ExportResult(error="it was interrupted")
    except Exception as error:  # whatever it is, the run reports it
        result = ExportResult(error=_describe(error))
    with os.fdopen(results, "w", encoding="utf-8") as output:
        json.dump(asdict(result), output)


def _step_back() -> None:
    """Leave processors and memory to the run."""
    os.nice(LOWEST_PRIORITY)
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_END)


def _end_with_the_run() -> None:
    """Wait until the run closes its end of the pipe or dies, and stop then."""
    while os.read(0, 1):
        pass
    # As by Ctrl-C: the unfinished folder is deleted on the way out, if the main thread
    # is not stuck in a library.
    _thread.interrupt_main()
    time.sleep(END_S)
    os._exit(1)


def _describe(error: Exception) -> str:
    """Return one line that says what went wrong and where."""
    message = as_user_error(error)
    if message is None:
        first_line = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    return f"{message.where}: {message.found}" if message.where else message.found


if __name__ == "__main__":
    main()
