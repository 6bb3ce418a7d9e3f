"""Encode conversations as token ids in which only the answers are targets.

Masked tokens are stored as negative ids: input, but not targets. A leading bos keeps its sign, as in InternEvo's
alpaca_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from evomesh.config.schema import GenerationConfig
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatMessage:
    """A message of a conversation.

    Attributes:
        role: one of ``ROLES``.
        text: its content.
        train: whether its text is a target.
    """

    role: str
    text: str
    train: bool


class ChatTemplate(Protocol):
    """A rule that renders conversations as token ids."""

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation; those of tokens that are not targets are negative."""
        ...

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation up to where the assistant's answer starts; all are positive."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the ids that end a generated answer."""
        ...

    @property
    def ending(self) -> list[int]:
        """Return the ids that every conversation ends with, even a truncated one."""
        ...


@dataclass(frozen=True)
class TurnStyle:
    """The rendering of one role's messages.

    Attributes:
        opening: fragments before the text; never targets.
        closing: fragments after the text; targets if the message is one.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]


@dataclass(frozen=True)
class ChatStyle:
    """A built-in chat template, made of fragments.

    A fragment that is the exact name of a special token becomes that token's id; other fragments are encoded as text.

    Attributes:
        turns: by role.
        special: fragments that must be single tokens of the tokenizer.
        eos: whether the conversation ends with eos (a target).
        separator: fragments after every message; never targets.
    """

    turns: dict[str, TurnStyle]
    special: tuple[str, ...]
    eos: bool
    separator: tuple[str, ...] = ()


# InternLM: <|User|>:text<eoh>\n<|Bot|>:answer<eoa>\n and one eos at the end of the conversation
INTERNLM = ChatStyle(
    {
        "system": TurnStyle(("<|System|>:",), ("\n",)),
        "user": TurnStyle(("<|User|>:",), ("<eoh>", "\n")),
        "assistant": TurnStyle(("<|Bot|>:",), ("<eoa>", "\n")),
    },
    ("<eoh>", "<eoa>"),
    eos=True,
)
# ChatML in InternLM2's version
CHATML = ChatStyle(
    {role: TurnStyle(("<|im_start|>", f"{role}\n"), ("<|im_end|>",)) for role in ROLES},
    ("<|im_start|>", "<|im_end|>"),
    eos=False,
    separator=("\n",),
)
LLAMA3 = ChatStyle(
    {
        role: TurnStyle(("<|start_header_id|>", role, "<|end_header_id|>", "\n\n"), ("<|eot_id|>",))
        for role in ROLES
    },
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    eos=False,
)
STYLES = {"internlm": INTERNLM, "chatml": CHATML, "llama3": LLAMA3}
# Text to InternEvo's tokenizer, special tokens of others.
ROLE_MARKS = ("<|System|>", "<|User|>", "<|Bot|>")
# Names of the same special tokens in published InternLM2 tokenizers.
TOKEN_ALIASES = {"<|im_start|>": ("[UNUSED_TOKEN_146]",), "<|im_end|>": ("[UNUSED_TOKEN_145]",)}
# InternEvo's tokenizer does not name these tokens; alpaca_tokenizer.py writes their ids. It is known by its size.
INTERNEVO_TOKEN_IDS = {103168: {"<eoh>": 103167, "<eoa>": 103166}}
# Tokens with which published chat models end an answer.
TURN_ENDS = ("<|im_end|>", *TOKEN_ALIASES["<|im_end|>"], "<eoa>", "<|eot_id|>", "<|end|>", "<|eom_id|>")


class StyleTemplate:
    """One of ``STYLES`` with the ids of a tokenizer.

    Raises:
        UserError: the tokenizer lacks a special token of the style.
    """

    def __init__(self, style: ChatStyle, name: str, tokenizer: Tokenizer) -> None:
        self.style = style
        self.tokenizer = tokenizer
        self.special_ids: dict[str, int] = {}
        for token in style.special:
            token_id = _find_special_id(token, tokenizer)
            if token_id is None:
                token_names = " or ".join((token, *TOKEN_ALIASES.get(token, ())))
                others = "|".join(sorted(set(STYLES) - {name}))
                raise UserError(
                    f"the tokenizer has no token {token_names}, which the chat template {name!r} needs",
                    where=str(tokenizer.path),
                    fix=f"use another template: --chat-template {others}|tokenizer",
                )
            self.special_ids[token] = token_id

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self._encode_turns(messages) + self.ending

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids = [abs(token) for token in self._encode_turns(messages)]
        return ids + self._encode_fragments(self.style.turns["assistant"].opening)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        closing = self.style.turns["assistant"].closing
        return tuple(self.special_ids[token] for token in closing if token in self.special_ids)

    @property
    def ending(self) -> list[int]:
        if self.style.eos and self.tokenizer.eos_id is not None:
            return [self.tokenizer.eos_id]
        return []

    def _encode_turns(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        for message in messages:
            turn = self.style.turns[message.role]
            if self.style is INTERNLM and message.role == "user":
                # alpaca_tokenizer.py encodes the user's role mark and text as one string
                ids += mask(self._encode_text("".join(turn.opening) + message.text))
                ids += mask(self._encode_fragments(turn.closing))
                continue
            ids += mask(self._encode_fragments(turn.opening))
            body = self.tokenizer.encode(message.text) + self._encode_fragments(turn.closing)
            ids += body if message.train else mask(body)
            ids += mask(self._encode_fragments(self.style.separator))
        return ids

    def _encode_fragments(self, fragments: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for fragment in fragments:
            if fragment in self.special_ids:
                ids.append(self.special_ids[fragment])
            else:
                ids += self._encode_text(fragment)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Return the ids of text; a leading role mark becomes one id if the tokenizer has a token of that name.

        Sentencepiece does not recognize its control symbols in text, so the token is looked up by name.
        """
        ids = self.tokenizer.encode(text)
        mark = next((mark for mark in ROLE_MARKS if text.startswith(mark)), None)
        mark_id = None if mark is None else self.tokenizer.token_id(mark)
        if mark is None or mark_id is None or mark_id in ids[:2]:
            return ids
        return [mark_id, *self.tokenizer.encode(text[len(mark) :])]


def _find_special_id(token: str, tokenizer: Tokenizer) -> int | None:
    for name in (token, *TOKEN_ALIASES.get(token, ())):
        token_id = tokenizer.token_id(name)
        if token_id is not None:
            return token_id
    return INTERNEVO_TOKEN_IDS.get(tokenizer.vocab_size, {}).get(token)


class JinjaTemplate:
    """The template in a tokenizer's folder.

    The target of a trained message is what its rendering appends to the generation prompt.

    Raises:
        UserError: the folder has no template, or a trained message changes what was rendered before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not tokenizer.chat_template:
            raise UserError(
                "no chat template",
                where=str(tokenizer.path.parent),
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                fix=f"use a built-in one: --chat-template {'|'.join(STYLES)}",
            )
        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        self._template = environment.from_string(tokenizer.chat_template)
        special_ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._special_tokens = {
            name: "" if token_id is None else tokenizer.decode([token_id])
            for name, token_id in special_ids.items()
        }

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        # The conversation is rendered once per message; what a rendering adds to the one before is the message.
        ids: list[int] = []
        rendered = ""
        for number, message in enumerate(messages):
            if message.train:
                prompt = self._render(messages[:number], rendered, add_generation_prompt=True)
                ids += mask(self.tokenizer.encode(prompt[len(rendered) :]))
                rendered = prompt
            text = self._render(messages[: number + 1], rendered)
            added = self.tokenizer.encode(text[len(rendered) :])
            ids += added if message.train else mask(added)
            rendered = text
        return ids

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.encode(self._render(messages, "", add_generation_prompt=True))
        # Templates are programs: they can raise anything on input that they do not expect.
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template rejects the conversation: {error}") from None

    def render(self, turns: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the text of turns of role and content.

        Args:
            add_generation_prompt: render up to where the assistant's answer starts; else up to the end of the last
                turn's content, so that a model can continue it.
        """
        messages = [ChatMessage(turn["role"], turn["content"], train=False) for turn in turns]
        text = self._render(messages, "", add_generation_prompt)
        if add_generation_prompt or not turns:
            return text
        last = turns[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return turn_end_ids(self.tokenizer)

    @property
    def ending(self) -> list[int]:
        return []

    def _render(
        self, messages: Sequence[ChatMessage], rendered: str, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of messages, of which ``rendered`` is the beginning."""
        text = rendered
        if messages:
            turns = [{"role": message.role, "content": message.text} for message in messages]
            text = self._template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        if not text.startswith(rendered):
            raise UserError(
                "the chat template changes earlier messages when a later one is added, so targets are ambiguous",
                where=str(self.tokenizer.path.parent),
                fix=f"use a built-in one: --chat-template {'|'.join(STYLES)}",
            )
        return text


def _raise_template_error(message: str) -> NoReturn:
    raise UserError(f"the chat template rejects the conversation: {message}")


def mask(ids: Sequence[int]) -> list[int]:
    """Return ids as inputs that are not targets."""
    return [-token for token in ids]


def build_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return a built-in template by name, or the one of the tokenizer's folder ("tokenizer").

    Raises:
        UserError: the name is unknown, or the template and the tokenizer do not match.
    """
    if name == "tokenizer":
        return JinjaTemplate(tokenizer)
    if name not in STYLES:
        choices = ", ".join([*STYLES, "tokenizer"])
        raise UserError(f"no chat template {name!r}", where="--chat-template", expected=f"one of {choices}")
    return StyleTemplate(STYLES[name], name, tokenizer)


def choose_template(name: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template that ``name`` asks for; None for "none", and for "auto" where the tokenizer has none.

    Raises:
        UserError: unknown name, or the tokenizer does not fit.
    """
    if name == "none" or (name == "auto" and not tokenizer.chat_template):
        return None
    return build_template("tokenizer" if name == "auto" else name, tokenizer)


def turn_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an assistant's turn in the tokenizer's own chat template."""
    known = [tokenizer.token_id(name) for name in TURN_ENDS if name in tokenizer.chat_template]
    return tuple(token for token in known if token is not None)


def end_of_answer_ids(
    tokenizer: Tokenizer | None,
    generation: GenerationConfig | None,
    vocab_size: int,
    template: ChatTemplate | None = None,
) -> tuple[int, ...]:
    """Return every id that ends a generated answer: the one rule for generate, serve, eval and export.

    In this order, without repetition: the tokenizer's eos, the turn ends of the chat template, and the ids of the
    config's ``generation`` section (``eos_id``, ``additional_eos_token_list``).

    Args:
        tokenizer: None where there is none; its eos and its template then contribute nothing.
        generation: the config's section, None where it has none.
        vocab_size: ids that the model cannot generate are left out.
        template: the template in use; None: the tokenizer's own, if it has one.
    """
    ids: list[int] = []
    if tokenizer is not None:
        ids += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids += turn_end_ids(tokenizer) if template is None else template.eos_ids
    if generation is not None:
        ids += [*generation.eos_id, *generation.additional_eos_token_list]
    return tuple(dict.fromkeys(token for token in ids if 0 <= token < vocab_size))
