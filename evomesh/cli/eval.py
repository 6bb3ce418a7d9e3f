"""``evomesh eval``: scores of a checkpoint on tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.evaluate.native import HarnessModel


def evaluate(
    ckpt: Annotated[
        str, typer.Argument(help="Save folder, step in it, or Hugging Face model folder; local or s3.")
    ],
    tasks: Annotated[
        str, typer.Option(help="Task files (.yaml) or names of the harness's tasks, with commas.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="tokenizer.json, .model or their folder [default: data.tokenizer_path]."),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before a question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens read at once [default: as trained].")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one run of the model.")] = 8192,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Ask as a user of the tokenizer's own chat template."),
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="Text before all; with the template, its system turn.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="File for all results, as JSON.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... [default: cuda where there is one].")] = "",
    config: Annotated[
        str | None, typer.Option(help="Config file to read first: it registers a model type of your own.")
    ] = None,
) -> None:
    """Score a checkpoint with lm-evaluation-harness, through the native model."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed", fix="pip install 'evomesh[eval]'")
    if output is not None and not Path(output).expanduser().absolute().parent.is_dir():
        raise UserError(f"no folder for {output}", where="--output")
    from evomesh.cli.device import choose_device
    from evomesh.config.loader import load_config
    from evomesh.evaluate.run import evaluate as run
    from evomesh.evaluate.run import find_tasks, table, write

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("no task", where="--tasks")
    manager = find_tasks(names)
    chosen = choose_device(device)
    if config is not None:
        load_config(config)
    source, model = _native(ckpt, chosen, tokenizer, max_length, batch_tokens, apply_chat_template)
    results = run(
        model,
        names,
        manager,
        num_fewshot=num_fewshot,
        limit=limit,
        chat=apply_chat_template,
        system=system_instruction,
    )
    print(source)
    print(table(results))
    if output is not None:
        write(results, output)


def _native(
    ckpt: str, device: str, tokenizer: str | None, max_length: int | None, batch_tokens: int, chat: bool
) -> tuple[str, HarnessModel]:
    """Where the model comes from, in words, and the model as the harness sees it."""
    from evomesh.checkpoint.huggingface.config import rotary_of
    from evomesh.checkpoint.huggingface.tokenizer import refuse_larger, special_ids
    from evomesh.checkpoint.restore import restore_model
    from evomesh.data.chat import JinjaTemplate
    from evomesh.data.tokenizer import load_tokenizer
    from evomesh.evaluate.native import HarnessModel

    restored = restore_model(ckpt, device)
    path = tokenizer or restored.config.data.tokenizer_path
    if path is None:
        raise UserError(
            "the checkpoint's config names no tokenizer", where=ckpt, fix="give one with --tokenizer PATH"
        )
    text = load_tokenizer(path)
    vocab_size = restored.config.model.vocab_size
    refuse_larger(text, vocab_size)
    if chat:
        JinjaTemplate(text)  # says what is wrong with it before hours of work
    model = HarnessModel(
        restored.model,
        text,
        eos_ids=special_ids(text, restored.config.generation, vocab_size).eos,
        max_length=max_length or rotary_of(restored.config).max_position,
        batch_tokens=batch_tokens,
    )
    return restored.source, model
