"""``evomesh ckpt``: list, verify, compare, rewrite, average and delete checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.command_names import CommandGroup
from evomesh.errors import UserError
from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.checkpoint.native.find import Candidate

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)

PathArgument = Annotated[
    str, typer.Argument(help="Save folder, step in it, or step folder; local or S3.")
]


@app.callback()
def ckpt() -> None:
    """List, verify, prune, pin, diff, reshard and average checkpoints."""


def _candidates(path: str) -> list[Candidate]:
    from evomesh.checkpoint.native.find import locate

    lookup = locate(path)
    if not lookup.candidates:
        raise UserError(lookup.problem, fix=lookup.fix, code="EVO-CKPT-001")
    return lookup.candidates


@app.command("ls")
def list_(path: PathArgument) -> None:
    """List checkpoints, newest first. Also shows interrupted and damaged ones."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("step", "kind", "size", "tensors", "layout", "written", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("folder", overflow="fold")
    for candidate in _candidates(path):
        for row in _rows(candidate):
            table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        # rich would wrap the lines of a pipe at 80 columns.
        console = Console(width=200)
    console.print(table)


def _rows(candidate: Candidate) -> list[list[str]]:
    """Return the table rows of one step folder: a damaged one has a second row with the reason."""
    from evomesh.checkpoint.native.retention import PIN
    from evomesh.checkpoint.native.verify import verify
    from evomesh.quantities import readable

    step = str(candidate.step)
    try:
        record = verify(candidate).record
    except UserError as error:
        state = "DAMAGED" if candidate.committed else "interrupted"
        reason = f"{candidate.folder}: {error.found}"
        return [
            [step, "", "", "", "", "", state, ""],
            ["", "", "", "", "", "", "", reason],
        ]
    axes = [f"{axis}{size}" for axis, size in record.layout.items() if size > 1]
    layout = " ".join(axes) or "1 process"
    is_pinned = candidate.storage.exists(candidate.folder + PIN)
    return [
        [
            step,
            "snapshot" if record.snapshot else "normal",
            readable(record.tensor_bytes),
            str(record.tensors),
            layout,
            record.created,
            "committed pinned" if is_pinned else "committed",
            candidate.folder,
        ]
    ]


@app.command()
def verify(
    path: PathArgument,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Check records and file sizes only; read no data."
        ),
    ] = False,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also look for NaN and infinity in every tensor."),
    ] = False,
) -> None:
    """Check every byte of every checkpoint at PATH. Exit code 2 if one is damaged, or if there is none."""
    from evomesh.checkpoint.native import verify as verification
    from evomesh.checkpoint.native.compare import tensors_not_finite
    from evomesh.quantities import readable

    num_checkpoints = 0
    damaged: list[str] = []
    newest_finite: int | None = None
    for candidate in _candidates(path):
        folder = candidate.folder
        if not candidate.committed:
            print(f"{folder}: interrupted save, not a checkpoint")
            continue
        num_checkpoints += 1
        try:
            checkpoint = verification.verify(candidate, "record" if quick else "data")
        except UserError as error:
            damaged.append(folder)
            print(f"{folder}: DAMAGED: {error.found}")
            continue
        record = checkpoint.record
        print(
            f"{folder}: good, {counted(record.tensors, 'tensor', '')}, {readable(record.tensor_bytes)}"
        )
        if not deep:
            continue
        bad_tensors = list(tensors_not_finite(checkpoint))
        for line in bad_tensors:
            print(f"  {line}")
        if bad_tensors:
            damaged.append(folder)
        elif newest_finite is None:
            newest_finite = checkpoint.step
            print(f"  all values are finite; the newest such step is {newest_finite}")
    if damaged:
        raise UserError(
            f"{len(damaged)} damaged: {', '.join(damaged)}",
            fix="none needed to resume: it uses the newest intact checkpoint",
            code="EVO-CKPT-003",
        )
    if not num_checkpoints:
        raise UserError(
            f"no checkpoint in {path}, only interrupted saves",
            expected="at least one step folder with a commit.json",
            code="EVO-CKPT-001",
        )


@app.command()
def prune(
    path: PathArgument,
    keep_last: Annotated[
        int, typer.Option(min=2, help="Number of newest checkpoints to keep.")
    ],
    keep_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Also keep checkpoints whose step is a multiple of this."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be deleted; delete nothing."),
    ] = False,
) -> None:
    """Delete old checkpoints. Keeps pinned ones and the newest two that verify."""
    from evomesh.checkpoint.native.find import candidates
    from evomesh.checkpoint.native.retention import Retention, delete_checkpoint
    from evomesh.storage.base import join
    from evomesh.storage.urls import open_storage

    storage, root = open_storage(path)
    lock = (
        None if dry_run else storage.lock(join(root, ".writer"), "evomesh ckpt prune")
    )
    committed = [
        candidate for candidate in candidates(storage, root) if candidate.committed
    ]
    retention = Retention(keep_last, keep_every)
    unneeded = retention.to_delete(committed)
    action = "would delete" if dry_run else "deleted"
    for candidate in unneeded:
        if not dry_run:
            delete_checkpoint(candidate)
        print(f"{action} {candidate.folder}")
    kept = len(committed) - len(unneeded)
    verb = "stays" if kept == 1 else "stay"
    print(f"{counted(kept, 'checkpoint')} {verb} in {path}")
    if lock is not None:
        lock.release()


@app.command()
def pin(
    path: PathArgument,
    undo: Annotated[
        bool, typer.Option("--undo", help="Unpin: retention may delete it again.")
    ] = False,
) -> None:
    """Exempt a checkpoint from retention."""
    from evomesh.checkpoint.native.retention import PIN

    candidate = _candidates(path)[0]
    marker = candidate.folder + PIN
    if undo:
        candidate.storage.delete(marker)
    elif not candidate.storage.exists(marker):
        candidate.storage.create(marker).finish()
    state = "no longer pinned" if undo else "pinned"
    print(f"{state}: {candidate.folder}")


@app.command()
def diff(a: PathArgument, b: PathArgument) -> None:
    """Compare two checkpoints: config, state and every element. Exit code 1 if they differ."""
    from evomesh.checkpoint.native.compare import differences
    from evomesh.checkpoint.native.load import resolve

    first = resolve(a, report=print)
    second = resolve(b, report=print)
    lines = list(differences(first, second))
    for line in lines:
        print(line)
    if lines:
        raise typer.Exit(1)
    print("equal")


@app.command()
def reshard(
    path: PathArgument,
    out: Annotated[str, typer.Argument(help="Save folder to write to.")],
    gpus: Annotated[
        int, typer.Option(min=1, help="Number of processes of the new layout.")
    ],
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    weight: Annotated[
        int, typer.Option(min=1, help="Weight-parallel size, with --mode isp.")
    ] = 1,
    zero1: Annotated[
        int, typer.Option(help="ZeRO-1 size; <= 0: all data-parallel ranks.")
    ] = -1,
    mode: Annotated[
        str, typer.Option(help="Tensor mode: mtp, msp, fsp or isp.")
    ] = "mtp",
) -> None:
    """Rewrite a checkpoint for another layout. Each rank of it then reads one file; loading does not require it."""
    from evomesh.checkpoint.native.load import resolve
    from evomesh.checkpoint.native.reshard import reshard as rewrite
    from evomesh.config.record import config_from_dict
    from evomesh.config.schema import ParallelConfig

    source = resolve(path, report=print)
    layout = ParallelConfig.model_validate(
        {
            "tensor": {"size": tensor, "mode": mode},
            "pipeline": {"size": pipeline},
            "weight": {"size": weight},
            "zero1": {"size": zero1},
        }
    )
    model = config_from_dict(source.config).model
    folder = rewrite(source, out, model, layout, gpus)
    print(f"wrote {folder}")


@app.command()
def average(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Two or more checkpoints: save folder, step in it, or step folder."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Save folder to write to.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="One number for each checkpoint, such as 1,1,2 [default: all the same]."
        ),
    ] = None,
) -> None:
    """Average the weights of checkpoints of one model, saved in any layouts. Writes weights only."""
    from evomesh.checkpoint.native.average import average as write_average
    from evomesh.checkpoint.native.load import resolve

    shares = None if weights is None else _numbers(weights)
    checkpoints = [resolve(path, "data", report=print) for path in paths]
    folder = write_average(checkpoints, shares, out)
    for checkpoint in checkpoints:
        print(f"read {checkpoint.folder}")
    print(f"wrote {folder}")


def _numbers(text: str) -> list[float]:
    """Parse ``1,1,2``."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"found {text!r}",
            where="--weights",
            expected="numbers, such as 1,1,2",
            code="EVO-CLI-002",
        ) from None
