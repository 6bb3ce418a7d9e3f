"""``evomesh generate``: complete a prompt with a checkpoint, or answer folders of prompts."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.options import (
    ConfigFileOption,
    DeviceOption,
    EmaOption,
    LauncherOption,
    OptionalCheckpointOption,
    OverrideOption,
    PagedOption,
    RendezvousPortOption,
    TemplateOption,
    TokenizerPathOption,
    with_sampling_options,
)
from evomesh.cli.run import run
from evomesh.cli.usage import single_command
from evomesh.errors import UserError
from evomesh.generate.options import PagedMode, SamplingParams

if TYPE_CHECKING:
    from evomesh.checkpoint.restore import LoadedModel


ConfigArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help="Config whose generation section names model and prompts.",
    ),
]
PromptOption = Annotated[str | None, typer.Option(help="Prompt to complete.")]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Ask the prompt as a user's message, in the chat template; prints the answer alone.",
    ),
]
DynamicNtkOption = Annotated[
    bool | None,
    typer.Option(help="Dynamic NTK beyond the trained length [default: as trained]."),
]


@with_sampling_options
def generate(
    file: ConfigArgument = None,
    ckpt: OptionalCheckpointOption = None,
    prompt: PromptOption = None,
    chat: ChatOption = False,
    tokenizer: TokenizerPathOption = None,
    chat_template: TemplateOption = "auto",
    sampling: SamplingParams = SamplingParams(),  # noqa: B008  # frozen; replaced by its options
    dynamic_ntk: DynamicNtkOption = None,
    ema: EmaOption = False,
    device: DeviceOption = "",
    paged: PagedOption = "off",
    config: ConfigFileOption = None,
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
) -> None:
    """Complete a prompt, or answer folders of prompts.

    Takes either --ckpt and --prompt, or a CONFIG whose generation section names model and prompts. The options from
    --tokenizer to --config apply to a prompt, which is completed greedily unless a temperature is given; --set,
    --launcher and --port apply to CONFIG, which may run on many processes.
    """
    if file is not None:
        if ckpt is not None or prompt is not None:
            raise UserError(
                "CONFIG together with --ckpt or --prompt",
                expected="one of the two",
                fix="leave one out",
                code="EVO-CLI-004",
            )
        answer_prompt_folder(file, overrides, launcher, port)
        return
    if ckpt is None or prompt is None:
        raise UserError(
            _what_is_missing(ckpt, prompt),
            expected="evomesh generate CONFIG, or --ckpt DIR --prompt TEXT",
            code="EVO-CLI-004",
        )
    if not prompt:
        raise UserError(
            "the prompt is empty",
            where="--prompt",
            expected="some text to complete",
            code="EVO-GEN-002",
        )
    template = chat_template if chat else "none"
    loaded = _load(ckpt, tokenizer, template, device, config, dynamic_ntk, ema)
    if chat:
        answer_message(loaded, prompt, sampling, paged)
    else:
        complete_prompt(loaded, prompt, sampling, paged)


def _what_is_missing(ckpt: str | None, prompt: str | None) -> str:
    """Say which of the options that belong together was left out."""
    if ckpt is not None:
        return "--ckpt without --prompt"
    if prompt is not None:
        return "--prompt without --ckpt"
    return "neither CONFIG nor --ckpt and --prompt"


def answer_prompt_folder(
    config: str, overrides: list[str] | None, launcher: str, port: int
) -> None:
    """Answer the prompts of a config's generation section."""
    from evomesh.config.loader import load_config
    from evomesh.train.generation import run_generation_section

    run_generation_section(load_config(config, overrides or []), launcher, port)


def complete_prompt(
    loaded: LoadedModel,
    prompt: str,
    sampling: SamplingParams,
    paged: PagedMode = "off",
) -> None:
    """Print a prompt and its completion as it is generated, or several completions one after the other."""
    from evomesh.data.tokenizer import encode_prompt

    ids = encode_prompt(loaded.tokenizer, prompt)
    if not ids:
        raise UserError(
            f"the prompt {prompt!r} has no tokens",
            where="--prompt",
            expected="some text to complete",
            code="EVO-GEN-002",
        )
    _print_answers(loaded, ids, sampling, start=0, paged=paged)


def answer_message(
    loaded: LoadedModel,
    text: str,
    sampling: SamplingParams,
    paged: PagedMode = "off",
) -> None:
    """Print the model's answer to a user's message as it is generated, or several answers.

    Raises:
        UserError: the model has no chat template, or the template rejects the message.
    """
    from evomesh.data.chat_message import ChatMessage

    if loaded.template is None:
        raise UserError(
            "the tokenizer has no chat template: this model only completes text",
            where="--chat",
            fix="leave --chat out, or give the template that the model was trained with: --chat-template chatml, or a "
            "tokenizer folder that has one with --tokenizer",
            code="EVO-TOKEN-007",
        )
    ids = loaded.template.encode_prompt([ChatMessage("user", text, train=False)])
    _print_answers(loaded, ids, sampling, start=len(ids), paged=paged)


def shim(
    config: Annotated[str, typer.Option("--config", help="A Python config file.")],
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
) -> None:
    """Answer the prompts of a config's generation section: generate.py --config CONFIG."""
    answer_prompt_folder(config, overrides, launcher, port)


def shim_main() -> None:
    """Run the repository's ``generate.py``."""
    run(single_command(shim))


def _load(
    ckpt: str,
    tokenizer: str | None,
    template: str,
    device: str,
    config: str | None,
    dynamic_ntk: bool | None,
    ema: bool,
) -> LoadedModel:
    from evomesh.checkpoint.restore import load_model
    from evomesh.config.loader import load_config
    from evomesh.models.language_model import has_rotary_types, with_rotary_type
    from evomesh.parallel.device import device_by_name

    chosen_device = device_by_name(device)
    if config is not None:
        load_config(config)
    loaded = load_model(
        ckpt, chosen_device, tokenizer=tokenizer, template=template, ema=ema
    )
    if dynamic_ntk is None:
        return loaded
    if not has_rotary_types(loaded.model):
        scaling = loaded.config.model.rope_scaling
        reason = (
            f"has rope_scaling of type {scaling.type!r}"
            if scaling
            else "has no rotary embedding"
        )
        raise UserError(
            f"this model {reason}: dynamic NTK cannot be switched",
            where="--dynamic-ntk",
            fix="leave it out",
            code="EVO-GEN-003",
        )
    return replace(
        loaded,
        model=with_rotary_type(loaded.model, "dynamic" if dynamic_ntk else "origin"),
    )


def _print_answers(
    loaded: LoadedModel,
    ids: list[int],
    sampling: SamplingParams,
    start: int,
    paged: PagedMode,
) -> None:
    """Print what follows a prompt of ids.

    Args:
        start: number of leading ids that are not printed.
    """
    if not sampling.eos_ids:
        sampling = replace(sampling, eos_ids=loaded.eos_ids)
    if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
        _print_completions(loaded, ids, sampling, start, paged)
    else:
        _print_stream(loaded, ids, sampling, start, paged)


def _print_stream(
    loaded: LoadedModel,
    ids: list[int],
    sampling: SamplingParams,
    start: int,
    paged: PagedMode,
) -> None:
    """Print the prompt from ``start``, then its completion token by token."""
    from evomesh.generate.decode import stream_tokens

    decode = loaded.tokenizer.decode
    visible = ids[start:]
    shown = decode(visible)  # the text that is printed already
    tokens = stream_tokens(loaded.model, [ids], sampling, paged=paged)
    # What is refused is refused before the prompt is shown.
    first = list(islice(tokens, 1))
    _print_now(shown)
    for new in chain(first, tokens):
        if new.finish == "stop":
            break
        visible.append(new.token)
        # All tokens are decoded together, since a character may take several: an
        # incomplete one is shown later.
        text = decode(visible)
        is_complete = not text.endswith("\ufffd")
        if is_complete and text.startswith(shown):
            added = text.removeprefix(shown)
            _print_now(added)
            shown = text
    text = decode(visible)
    rest = text[len(shown) :]
    _print_now(f"{rest}\n")


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _print_completions(
    loaded: LoadedModel,
    ids: list[int],
    sampling: SamplingParams,
    start: int,
    paged: PagedMode,
) -> None:
    """Print every completion after the prompt, once all are complete."""
    from evomesh.generate.decode import generate_tokens

    prompts = [ids]
    (completions,) = generate_tokens(loaded.model, prompts, sampling, paged=paged)
    for number, completion in enumerate(completions, 1):
        if len(completions) > 1:
            print(f"--- answer {number} of {len(completions)}")
        visible = ids[start:]
        for token in completion:
            if token not in sampling.eos_ids:
                visible.append(token)
        text = loaded.tokenizer.decode(visible)
        print(text)
