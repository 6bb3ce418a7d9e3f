"""Chat templates by name, and the ids that end an answer.

A leading bos keeps its sign, as in InternEvo's alpaca_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from evomesh.config.schema import GenerationConfig
from evomesh.data.chat_message import ChatTemplate
from evomesh.data.chat_styles import INTERNLM, STYLES, TEMPLATED_STYLES, style_source
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.instruction_styles import INSTRUCTION_STYLES
from evomesh.data.instruction_template import InstructionTemplate
from evomesh.data.style_template import InternlmTemplate, StyleTemplate
from evomesh.data.tokenizer import Tokenizer, check_embedded
from evomesh.errors import UserError


def build_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return a built-in template by name, or the one of the tokenizer's folder ("tokenizer").

    Raises:
        UserError: the name is unknown, or the template and the tokenizer do not match.
    """
    if name == "tokenizer":
        return JinjaTemplate(tokenizer)
    if name in INSTRUCTION_STYLES:
        return InstructionTemplate(INSTRUCTION_STYLES[name], name, tokenizer)
    if name not in STYLES:
        choices = ", ".join([*STYLES, "tokenizer", *INSTRUCTION_STYLES])
        raise UserError(
            f"no chat template {name!r}",
            where="--chat-template",
            expected=f"one of {choices}",
            code="EVO-TOKEN-007",
        )
    style = STYLES[name]
    is_internlm = style is INTERNLM
    build = InternlmTemplate if is_internlm else StyleTemplate
    return build(style, name, tokenizer)


def choose_template(
    name: str, tokenizer: Tokenizer, trained: str | None = None
) -> ChatTemplate | None:
    """Return the template that ``name`` asks for; None for "none", and for "auto" where there is none.

    Args:
        trained: the built-in template of the training data (``data.chat_template``), which "auto" means where the
            tokenizer has none.
    Raises:
        UserError: unknown name, or the tokenizer does not fit.
    """
    if name == "auto":
        name = "tokenizer" if tokenizer.chat_template else trained or "none"
    return None if name == "none" else build_template(name, tokenizer)


def portable_source(name: str, tokenizer: Tokenizer) -> str | None:
    """Return the Jinja template of a built-in style, with the names that the tokenizer gives its marks.

    None where no template gives the style's ids: for ``internlm`` and XTuner's, whose parts are encoded apart, and for
    a tokenizer that does not recognize the marks in text.

    Raises:
        UserError: the tokenizer lacks one of the marks.
    """
    template = build_template(name, tokenizer)
    if name not in TEMPLATED_STYLES or not isinstance(template, StyleTemplate):
        return None
    source = style_source(STYLES[name])
    for mark, token_id in template.special_ids.items():
        if not tokenizer.is_added(token_id):
            return None
        source = source.replace(mark, tokenizer.token_name(token_id))
    return source


def turn_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an assistant's turn in the tokenizer's own chat template."""
    if not tokenizer.chat_template:
        return ()
    return JinjaTemplate(tokenizer).eos_ids


def end_of_answer_ids(
    tokenizer: Tokenizer | None,
    generation: GenerationConfig | None,
    vocab_size: int,
    template: ChatTemplate | None = None,
) -> tuple[int, ...]:
    """Return every id that ends a generated answer: the one rule for generate, serve, eval and export.

    In this order, without repetition: the tokenizer's eos, the turn ends of the chat
    template, and the ids of the config's ``generation`` section (``eos_id``,
    ``additional_eos_token_list``).

    Args:
        tokenizer: None where there is none; its eos and its template then contribute nothing.
        generation: the config's section, None where it has none.
        vocab_size: rows of the model's embedding.
        template: the template in use; None: the tokenizer's own, if it has one.

    Raises:
        UserError: one of the ids has no row in the embedding; an answer would never end with it.
    """
    # The ids, by what names them.
    ids_of: dict[str, Sequence[int]] = {}
    if tokenizer is not None:
        eos_id = tokenizer.eos_id
        turn_ends = turn_end_ids(tokenizer) if template is None else template.eos_ids
        ids_of["the tokenizer's eos"] = [] if eos_id is None else [eos_id]
        ids_of["the end of an answer in the chat template"] = turn_ends
    if generation is not None:
        more_ids = generation.additional_eos_token_list
        ids_of["generation.eos_id"] = generation.eos_id
        ids_of["generation.additional_eos_token_list"] = more_ids
    distinct: dict[int, None] = {}  # a set that keeps the order
    for name, ids in ids_of.items():
        for token in ids:
            check_embedded(token, vocab_size, name)
            distinct[token] = None
    return tuple(distinct)
