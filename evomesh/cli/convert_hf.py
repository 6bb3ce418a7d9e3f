"""``evomesh convert to-hf | from-hf | check | push``: Hugging Face folders."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from evomesh.cli.options import EmaOption
from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.checkpoint.huggingface.export import ExportOptions

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def shard_bytes(text: str) -> int:
    """Parse a size: ``5GB``, ``500MB``, ``1GiB`` or a number of bytes."""
    size = 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is not None:
        number, unit = match.groups()
        size = float(number) * UNITS.get(unit.upper(), 0)
    if size <= 0:
        raise UserError(
            f"found {text!r}",
            where="--max-shard-size",
            expected="a size such as 5GB or 500MB",
            code="EVO-CLI-002",
        )
    return max(1, int(size))


def refuse_other(value: str, allowed: tuple[str, ...], where: str) -> None:
    """Check an option against its choices.

    Raises:
        UserError: it is none of them.
    """
    if value not in allowed:
        raise UserError(
            f"found {value!r}",
            where=where,
            expected=f"one of {', '.join(allowed)}",
            code="EVO-CLI-002",
        )


def write_folder(ckpt: str, out: str, options: ExportOptions) -> None:
    """Export the newest valid checkpoint at ``ckpt``."""
    from evomesh.checkpoint.detect import CONVERSIONS, KINDS, kind_at
    from evomesh.checkpoint.huggingface.config import CLASSES
    from evomesh.checkpoint.huggingface.export import export
    from evomesh.checkpoint.native.load import resolve
    from evomesh.config.schema import RotaryType

    architectures = tuple(CLASSES)
    if options.arch is not None:
        refuse_other(options.arch, architectures, "--arch")
    if options.rotary_type is not None:
        rotary_types = get_args(RotaryType)
        refuse_other(options.rotary_type, rotary_types, "--rotary-type")
    kind = kind_at(ckpt)
    if kind in CONVERSIONS:
        raise UserError(
            f"{KINDS[kind]}, not one of evomesh",
            where=ckpt,
            fix=CONVERSIONS[kind],
            code="EVO-CKPT-009",
        )
    checkpoint = resolve(ckpt, report=print)
    export(checkpoint, out, options, report=print)


CkptArgument = Annotated[
    str,
    typer.Argument(help="Save folder, a step in it, or a step folder; local or S3."),
]
OutArgument = Annotated[
    str, typer.Argument(help="New folder for the model; local or S3.")
]
ArchOption = Annotated[
    str | None,
    typer.Option(
        help="llama, qwen2, qwen3, mistral, olmo2, phi3, smollm3, gemma, gemma2, gemma3_text (built into transformers) "
        "or internlm2, internlm3, baichuan (names and settings of their remote code) "
        "[default: the model's own, else llama]."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float64|float32|bfloat16|float16 [default: as trained]."),
]
MaxShardSizeOption = Annotated[
    str, typer.Option(help="Maximum size of a weight file, such as 2GB.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        help="Tokenizer file or folder, or none [default: data.tokenizer_path]."
    ),
]
RotaryTypeOption = Annotated[
    str | None, typer.Option(help="origin or dynamic [default: as trained].")
]
ScalingFactorOption = Annotated[
    float | None,
    typer.Option(min=1.0, help="Scaling factor of dynamic NTK [default: as trained]."),
]
MaxPosOption = Annotated[
    int | None,
    typer.Option(min=1, help="max_position_embeddings [default: as trained]."),
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(help="Jinja template file [default: the tokenizer's template]."),
]
CompareOption = Annotated[
    bool,
    typer.Option(
        help="Reload the folder and compare its logits with the native model's."
    ),
]


def to_hf(
    ckpt: CkptArgument,
    out: OutArgument,
    arch: ArchOption = None,
    dtype: DtypeOption = None,
    max_shard_size: MaxShardSizeOption = "5GB",
    tokenizer: TokenizerOption = None,
    rotary_type: RotaryTypeOption = None,
    scaling_factor: ScalingFactorOption = None,
    max_pos: MaxPosOption = None,
    chat_template: ChatTemplateOption = None,
    compare: CompareOption = True,
    ema: EmaOption = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder. Compares its logits with the native model's."""
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
        ema=ema,
    )
    write_folder(ckpt, out, options)


def from_hf(
    hf: Annotated[
        str,
        typer.Argument(
            help="Folder with config.json and weights, local or S3, or the id of a model in the local hub cache."
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(help="Save folder for the checkpoint (step 0); local or S3."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Parameter dtype [default: the folder's].")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Compare logits with transformers.")
    ] = True,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer file or folder that the checkpoint names, or none [default: the folder's]."
        ),
    ] = None,
) -> None:
    """Import a Hugging Face folder as a checkpoint, weights only.

    Reads folders whose model_type is llama, qwen2, qwen3, mistral, olmo2, phi3, smollm3, gemma, gemma2, gemma3_text,
    baichuan, internlm, internlm2 or internlm3.
    """
    from evomesh.checkpoint.huggingface.to_native import from_hf as convert

    convert(hf, out, dtype, compare, print, tokenizer)


def push(
    folder: Annotated[str, typer.Argument(help="Hugging Face folder, on this disk.")],
    repo: Annotated[
        str, typer.Argument(help="Repository on the hub, OWNER/NAME; made if need be.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch to commit to; made if need be [default: main]."),
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Commit message [default: names the folder].")
    ] = None,
) -> None:
    """Upload a model folder to the Hugging Face hub. Checks it first; takes the token of hf auth login, or HF_TOKEN."""
    from evomesh.checkpoint.huggingface.push import PushOptions
    from evomesh.checkpoint.huggingface.push import push as upload

    options = PushOptions(private, revision, message)
    upload(folder, repo, options, report=print)


def check(
    folder: Annotated[str, typer.Argument(help="Hugging Face folder.")],
) -> None:
    """Check that a model folder is ready for inference. Exit code 2 if a check fails."""
    from evomesh.checkpoint.huggingface.checklist import checklist

    items = checklist(folder)
    for item in items:
        result = "passed" if item.passed else "FAILED"
        print(f"{result}  {item.name}: {item.detail}")
    failed = [item for item in items if not item.passed]
    if failed:
        fixes = dict.fromkeys(item.fix for item in failed if item.fix)
        raise UserError(
            f"{len(failed)} of the checks above failed",
            where=folder,
            fix="; ".join(fixes) or "export it again: evomesh convert to-hf",
            code="EVO-HF-007",
        )
