"""``evomesh eval``: evaluate a checkpoint on tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.options import (
    CheckpointArgument,
    ConfigFileOption,
    DeviceOption,
    EmaOption,
    TokenizerPathOption,
)
from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.outside_errors import not_installed

if TYPE_CHECKING:
    from evomesh.checkpoint.restore import LoadedModel


TasksOption = Annotated[
    str,
    typer.Option(
        help="Task files (.yaml) or names of the harness's tasks, separated by commas."
    ),
]
FewShotOption = Annotated[
    int | None,
    typer.Option(
        min=0, help="Number of examples before each question [default: the task's]."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Evaluate at most this many examples per task."),
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Context length: maximum number of tokens read at once [default: as trained].",
    ),
]
BatchTokensOption = Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")]
ChatTemplateOption = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template",
        help="Format questions as user messages, with the tokenizer's chat template.",
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option(
        help="Text before every question; with the chat template, the system message."
    ),
]
OutputOption = Annotated[
    str | None, typer.Option(help="Write all results to this JSON file.")
]


def evaluate(
    ckpt: CheckpointArgument,
    tasks: TasksOption,
    tokenizer: TokenizerPathOption = None,
    num_fewshot: FewShotOption = None,
    limit: LimitOption = None,
    max_length: MaxLengthOption = None,
    batch_tokens: BatchTokensOption = 8192,
    apply_chat_template: ChatTemplateOption = False,
    system_instruction: SystemOption = None,
    output: OutputOption = None,
    ema: EmaOption = False,
    device: DeviceOption = "",
    config: ConfigFileOption = None,
) -> None:
    """Evaluate a checkpoint with lm-evaluation-harness."""
    _check_before(output)
    from evomesh.checkpoint.huggingface.config import rotary_scaling
    from evomesh.config.loader import load_config
    from evomesh.evaluate.native import HarnessModel
    from evomesh.evaluate.run import (
        format_table,
        load_tasks,
        run_tasks,
        write_results,
    )
    from evomesh.parallel.device import device_by_name

    loaded_tasks = load_tasks(_task_names(tasks))
    chosen_device = device_by_name(device)
    if config is not None:
        load_config(config)
    loaded = _load(ckpt, chosen_device, tokenizer, apply_chat_template, ema)
    trained_length = rotary_scaling(
        loaded.config.model, loaded.config.data.seq_len
    ).max_position
    model = HarnessModel(
        loaded.model,
        loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        context_length=max_length or trained_length,
        batch_tokens=batch_tokens,
    )
    results = run_tasks(
        model,
        loaded_tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        chat=apply_chat_template,
        system=system_instruction,
    )
    print(loaded.source)
    print(format_table(results))
    if output is not None:
        write_results(results, output)


def _task_names(tasks: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("no task given", where="--tasks", code="EVO-CLI-004")
    return names


def _check_before(output: str | None) -> None:
    """Refuse what would only be found after the model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise not_installed("lm-evaluation-harness", "eval")
    if output is not None and not expand_home(output).absolute().parent.is_dir():
        raise UserError(
            f"the folder of {output} does not exist",
            where="--output",
            code="EVO-CLI-006",
        )


def _load(
    ckpt: str, device: str, tokenizer: str | None, chat: bool, ema: bool
) -> LoadedModel:
    """Load the model and its tokenizer; a missing or broken chat template is refused here, before hours of work."""
    from evomesh.checkpoint.restore import load_model

    template = "tokenizer" if chat else "none"
    return load_model(ckpt, device, tokenizer=tokenizer, template=template, ema=ema)
