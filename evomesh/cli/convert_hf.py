"""``evomesh convert to-hf | from-hf | check``: Hugging Face folders."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.checkpoint.huggingface.export import ExportOptions

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ARCHS, ROTARY = ("llama", "internlm2"), ("origin", "dynamic")


def shard_bytes(text: str) -> int:
    """``5GB``, ``500MB``, ``1GiB`` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"found {text!r}", where="--max-shard-size", expected="a size such as 5GB or 500MB")
    return max(1, int(float(match[1]) * UNITS[match[2].upper()]))


def choice(value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise UserError(f"found {value!r}", where=where, expected=f"one of {', '.join(allowed)}")


def write_folder(ckpt: str, out: str, options: ExportOptions) -> None:
    """Exports the newest checkpoint that ``ckpt`` means and that verifies."""
    from evomesh.checkpoint.huggingface.export import export
    from evomesh.checkpoint.native.load import resolve

    choice(options.arch, ARCHS, "--arch")
    if options.rotary_type is not None:
        choice(options.rotary_type, ROTARY, "--rotary-type")
    found = resolve(ckpt, report=print)
    export(found, out, options, print)


def to_hf(
    ckpt: Annotated[str, typer.Argument(help="Save folder, step in it, or step folder; local or s3.")],
    out: Annotated[str, typer.Argument(help="New folder for the model; local or s3.")],
    arch: Annotated[
        str, typer.Option(help="llama (stock transformers) or internlm2 (its own naming).")
    ] = "llama",
    dtype: Annotated[
        str | None, typer.Option(help="float64|float32|bfloat16|float16 [default: as trained].")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 2GB.")] = "5GB",
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer file or folder, or none [default: data.tokenizer_path].")
    ] = None,
    rotary_type: Annotated[str | None, typer.Option(help="origin or dynamic [default: as trained].")] = None,
    scaling_factor: Annotated[float | None, typer.Option(min=1.0, help="Of dynamic NTK.")] = None,
    max_pos: Annotated[
        int | None, typer.Option(min=1, help="max_position_embeddings [default: as trained].")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file [default: the tokenizer's own].")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Reload the folder and compare logits with the native model.")
    ] = True,
) -> None:
    """Write a checkpoint as a Hugging Face folder, reload it and compare its logits with the native model's."""
    from evomesh.checkpoint.huggingface.export import ExportOptions

    options = ExportOptions(
        arch=arch,  # type: ignore[arg-type]  # checked in write_folder
        dtype=dtype,
        max_shard_bytes=shard_bytes(max_shard_size),
        tokenizer=tokenizer,
        rotary_type=rotary_type,  # type: ignore[arg-type]
        scaling_factor=scaling_factor,
        max_position=max_pos,
        chat_template=chat_template,
        compare=compare,
    )
    write_folder(ckpt, out, options)


def from_hf(
    hf: Annotated[
        str,
        typer.Argument(
            help="Folder with config.json and weights, local or s3, or an id in the local hub cache."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Save folder for the checkpoint (step 0); local or s3.")],
    dtype: Annotated[str | None, typer.Option(help="Of the parameters [default: the folder's].")] = None,
    compare: Annotated[bool, typer.Option(help="Compare logits with transformers.")] = True,
) -> None:
    """Read a Hugging Face folder (Llama, InternLM, InternLM2) as a checkpoint with weights only."""
    from evomesh.checkpoint.huggingface.to_native import from_hf as convert

    convert(hf, out, dtype, compare, print)


def check(
    folder: Annotated[str, typer.Argument(help="Hugging Face folder.")],
) -> None:
    """Run the hand-over checklist of docs/handover.md on a folder. Exit code 2 when a point fails."""
    from evomesh.checkpoint.huggingface.checklist import checklist

    failed = 0
    for point in checklist(folder):
        print(f"{'good' if point.good else 'BAD '}  {point.name}: {point.words}")
        failed += not point.good
    if failed:
        raise UserError(
            f"{failed} of the points above failed", where=folder, fix="export it again: evomesh convert to-hf"
        )
