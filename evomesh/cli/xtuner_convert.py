"""``evomesh xtuner convert pth_to_hf | merge | split``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.command_names import CommandGroup
from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.checkpoint.huggingface.export import ExportOptions
    from evomesh.config.schema import Config

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)

CfgOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="Override a value of the config; repeatable."
    ),
]


@app.command("pth_to_hf")
def pth_to_hf(
    config: Annotated[
        str,
        typer.Argument(help="The training's config; it is copied to xtuner_config.py."),
    ],
    source: Annotated[
        str,
        typer.Argument(
            help="Work folder or one checkpoint in it, of evomesh or of XTuner (iter_N.pth, file or folder)."
        ),
    ],
    save_dir: Annotated[str, typer.Argument(help="New folder.")],
    fp32: Annotated[
        bool, typer.Option("--fp32", help="Write float32 [default: as trained].")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Maximum size of a weight file.")
    ] = "2GB",
    safe_serialization: Annotated[
        bool,
        typer.Option(
            "--safe-serialization", help="Accepted: weights are always safetensors."
        ),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer file or folder.")
    ] = None,
    cfg_options: CfgOptions = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, with the config beside it."""
    from evomesh.checkpoint.detect import kind_at
    from evomesh.checkpoint.huggingface.export import ExportOptions
    from evomesh.cli.config import find_named_config
    from evomesh.cli.convert_hf import shard_bytes, write_folder
    from evomesh.config.loader import load_config
    from evomesh.storage.base import join
    from evomesh.storage.urls import open_storage

    config = find_named_config(config)
    training = load_config(config, cfg_options or []).config
    named = training.data.tokenizer_path
    options = ExportOptions(
        dtype="float32" if fp32 else None,
        max_shard_bytes=shard_bytes(max_shard_size),
        tokenizer=tokenizer or (named if named and Path(named).exists() else None),
    )
    if kind_at(source) == "xtuner":
        _write_from_xtuner(source, save_dir, training, options)
    else:
        write_folder(source, save_dir, options)
    storage, folder = open_storage(save_dir)
    writer = storage.create(join(folder, "xtuner_config.py"))
    writer.write(Path(config).read_bytes())
    writer.finish()


def _write_from_xtuner(
    source: str, target: str, training: Config, options: ExportOptions
) -> None:
    """Export a checkpoint of XTuner, by way of one of evomesh that is removed again."""
    from evomesh.checkpoint.deepspeed.to_native import from_xtuner
    from evomesh.cli.convert_hf import write_folder

    with _folder_beside(target) as folder:
        from_xtuner(source, folder, training, options.dtype, print)
        write_folder(folder, target, options)


@contextmanager
def _folder_beside(target: str) -> Iterator[str]:
    """Make a folder next to ``target``, on the same disk, for as long as it is used."""
    beside = Path(target).resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=beside) as folder:
        yield folder


@app.command(
    "merge", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def merge() -> None:
    """Refuse: adapters are not part of evomesh."""
    raise UserError(
        "LoRA adapters are not part of evomesh, which trains all weights",
        where="convert merge",
        fix="merge the adapter with XTuner or peft; evomesh reads the merged folder",
        code="EVO-CONFIG-009",
    )


@app.command("split")
def split(
    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, or the id of a model in the local cache."
        ),
    ],
    target: Annotated[str, typer.Argument(help="New folder.")],
    max_shard_size: Annotated[
        str, typer.Option(help="Maximum size of a weight file.")
    ] = "2GB",
) -> None:
    """Write the model of a Hugging Face folder in weight files of a given size."""
    from evomesh.checkpoint.huggingface.export import ExportOptions
    from evomesh.checkpoint.huggingface.to_native import from_hf
    from evomesh.cli.convert_hf import shard_bytes, write_folder

    options = ExportOptions(max_shard_bytes=shard_bytes(max_shard_size))
    with _folder_beside(target) as folder:
        from_hf(source, folder, None, False, lambda line: None)
        write_folder(folder, target, options)
