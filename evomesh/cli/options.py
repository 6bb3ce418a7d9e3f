"""Options that generate, eval, serve and chat share: which model, with which tokenizer, on which device."""

from __future__ import annotations

from typing import Annotated

import typer

_CHECKPOINT_HELP = "Save folder (its newest step), one step in it, or Hugging Face model folder."
CheckpointOption = Annotated[str, typer.Option(help=_CHECKPOINT_HELP)]
OptionalCheckpointOption = Annotated[str | None, typer.Option(help=_CHECKPOINT_HELP)]
CheckpointArgument = Annotated[str, typer.Argument(help=_CHECKPOINT_HELP)]
TokenizerPathOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="tokenizer.json, .model or their folder [default: data.tokenizer_path]."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ... [default: cuda if available].")]
ConfigFileOption = Annotated[
    str | None, typer.Option(help="Config file to load first, to register a custom model type.")
]
