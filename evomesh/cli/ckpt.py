"""``evomesh ckpt``: look at, verify, compare, rewrite and delete checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.checkpoint.native.find import Candidate

app = typer.Typer(no_args_is_help=True, add_completion=False)

PathArgument = Annotated[str, typer.Argument(help="Save folder, step in it, or step folder; local or s3.")]


@app.callback()
def ckpt() -> None:
    """List, verify, compare, reshard and delete checkpoints."""


def _choices(path: str) -> list[Candidate]:
    from evomesh.checkpoint.native.find import locate

    place = locate(path)
    if not place.choices:
        raise UserError(place.problem, fix=place.fix)
    return place.choices


@app.command("ls")
def list_(path: PathArgument) -> None:
    """List checkpoints, newest first, with those that an interrupted save left behind."""
    from rich.console import Console
    from rich.table import Table

    from evomesh.checkpoint.native.disk_space import readable
    from evomesh.checkpoint.native.retention import PIN, check

    table = Table(box=None, pad_edge=False)
    for column in ("step", "kind", "size", "tensors", "layout", "written", "state", "folder"):
        table.add_column(column, overflow="fold", no_wrap=column != "folder")
    for choice in _choices(path):
        try:
            body = check(choice, data=False).body
        except UserError as error:
            table.add_row(
                str(choice.step), "", "", "", "", "", "DAMAGED" if choice.committed else "interrupted", ""
            )
            table.add_row("", "", "", "", "", "", "", f"{choice.folder}: {error.found}")
            continue
        layout = " ".join(f"{axis}{size}" for axis, size in body["layout"].items() if size > 1) or "1 process"
        pinned = " pinned" if choice.storage.exists(choice.folder + PIN) else ""
        table.add_row(
            str(choice.step),
            "snapshot" if body.get("snapshot") else "normal",
            readable(body["tensor_bytes"]),
            str(body["tensors"]),
            layout,
            body["created"],
            f"committed{pinned}",
            choice.folder,
        )
    Console(width=None if Console().is_terminal else 200).print(table)


@app.command()
def verify(
    path: PathArgument,
    quick: Annotated[
        bool, typer.Option("--quick", help="Records and file sizes only; read no data.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also look for NaN and infinity in every tensor.")
    ] = False,
) -> None:
    """Read every byte of every checkpoint at PATH and check it against its hash. Exit code 2 when one is damaged."""
    from evomesh.checkpoint.native.compare import poisoned
    from evomesh.checkpoint.native.disk_space import readable
    from evomesh.checkpoint.native.retention import check

    damaged, finite = [], None
    for choice in _choices(path):
        if not choice.committed:
            print(f"{choice.folder}: interrupted save, not a checkpoint")
            continue
        try:
            found = check(choice, data=not quick)
        except UserError as error:
            damaged.append(choice.folder)
            print(f"{choice.folder}: DAMAGED: {error.found}")
            continue
        print(
            f"{choice.folder}: good, {found.body['tensors']} tensors, {readable(found.body['tensor_bytes'])}"
        )
        lines = list(poisoned(found)) if deep else []
        for line in lines:
            print(f"  {line}")
        if lines:
            damaged.append(choice.folder)
        elif deep and finite is None:
            finite = found.step
            print(f"  all values are finite; the newest such step is {finite}")
    if damaged:
        raise UserError(
            f"{len(damaged)} damaged: {', '.join(damaged)}", fix="resume takes the newest good one by itself"
        )


@app.command()
def prune(
    path: PathArgument,
    keep_last: Annotated[int, typer.Option(min=2, help="Newest checkpoints to keep.")],
    keep_every: Annotated[int | None, typer.Option(min=1, help="Also keep steps that this divides.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, delete nothing.")] = False,
) -> None:
    """Delete old checkpoints; pinned ones and the newest two that verify always stay."""
    from evomesh.checkpoint.native.find import candidates
    from evomesh.checkpoint.native.retention import Retention, drop
    from evomesh.storage.base import join
    from evomesh.storage.urls import open_storage

    storage, root = open_storage(path)
    lock = None if dry_run else storage.lock(join(root, ".writer"), "evomesh ckpt prune")
    choices = [c for c in candidates(storage, root) if c.committed]
    gone = Retention(keep_last, keep_every).to_drop(choices)
    for choice in gone:
        if not dry_run:
            drop(choice)
        print(f"{'would delete' if dry_run else 'deleted'} {choice.folder}")
    print(f"{len(choices) - len(gone)} checkpoints stay in {path}")
    if lock is not None:
        lock.release()


@app.command()
def pin(
    path: PathArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Let retention have it again.")] = False,
) -> None:
    """Keep a checkpoint for ever, whatever the retention says."""
    from evomesh.checkpoint.native.retention import PIN

    choice = _choices(path)[0]
    if undo:
        choice.storage.delete(choice.folder + PIN)
    elif not choice.storage.exists(choice.folder + PIN):
        choice.storage.create(choice.folder + PIN).finish()
    print(f"{'no longer pinned' if undo else 'pinned'}: {choice.folder}")


@app.command()
def diff(a: PathArgument, b: PathArgument) -> None:
    """What differs between two checkpoints: config, state and, element by element, tensors. Exit code 1 if anything."""
    from evomesh.checkpoint.native.compare import differences
    from evomesh.checkpoint.native.find import resolve
    from evomesh.checkpoint.native.retention import check

    first, second = (resolve(path, lambda choice: check(choice, data=False), print) for path in (a, b))
    lines = list(differences(first, second))
    for line in lines:
        print(line)
    if lines:
        raise typer.Exit(1)
    print("equal")


@app.command()
def reshard(
    path: PathArgument,
    out: Annotated[str, typer.Argument(help="Save folder for the result.")],
    gpus: Annotated[int, typer.Option(min=1, help="Processes of the new layout.")],
    tensor: Annotated[int, typer.Option(min=1)] = 1,
    pipeline: Annotated[int, typer.Option(min=1)] = 1,
    weight: Annotated[int, typer.Option(min=1, help="With --mode isp.")] = 1,
    zero1: Annotated[int, typer.Option(help="<= 0: over all data-parallel ranks.")] = -1,
    mode: Annotated[str, typer.Option(help="mtp, msp, fsp or isp.")] = "mtp",
) -> None:
    """Rewrite a checkpoint so that each rank of another layout reads one file. Loading works without it too."""
    from evomesh.checkpoint.native.find import resolve
    from evomesh.checkpoint.native.reshard import reshard as rewrite
    from evomesh.checkpoint.native.retention import check
    from evomesh.config.record import config_from_dict
    from evomesh.config.schema import ParallelConfig

    found = resolve(path, lambda choice: check(choice, data=False), print)
    layout = ParallelConfig.model_validate(
        {
            "tensor": {"size": tensor, "mode": mode},
            "pipeline": {"size": pipeline},
            "weight": {"size": weight},
            "zero1": {"size": zero1},
        }
    )
    print(f"wrote {rewrite(found, out, config_from_dict(found.config).model, layout, gpus)}")
