"""Conversations to tokens in which only the answers are targets.

Masked tokens are stored as negative ids: input, but no target. A first bos keeps its sign, as in the documents' tool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from evomesh.config.schema import GenerationConfig
from evomesh.data.records.reader import SourceRecord
from evomesh.data.token_files.lines import json_kind
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

RecordSchema = Literal["alpaca", "messages", "sharegpt"]
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class ChatMessage:
    """One turn. ``train``: its text is a target."""

    role: str
    text: str
    train: bool


class ChatTemplate(Protocol):
    """Turns a conversation into ids with signs."""

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]: ...
    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """A conversation up to where the assistant is to speak."""
        ...

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    @property
    def ending(self) -> list[int]:
        """Ids that also a truncated conversation ends with."""
        ...


def read_conversation(
    record: SourceRecord, schema: RecordSchema, roles: Sequence[str] = ("assistant",)
) -> list[ChatMessage]:
    """The turns of a record.

    Args:
        schema: "alpaca": instruction, input, output; "messages": a list (or its key ``messages``) of role and content,
            a turn with ``"loss": false`` is no target; "sharegpt": ``conversations`` of from and value.
        roles: whose turns are targets.

    Raises:
        UserError: a key or role is missing or unknown; names the record.
    """
    value = record.value
    if schema == "alpaca":
        instruction, extra, output = (_text(value, key, record) for key in ("instruction", "input", "output"))
        question = f"{instruction}\n{extra}" if extra else instruction
        return [
            ChatMessage("user", question, "user" in roles),
            ChatMessage("assistant", output, "assistant" in roles),
        ]
    turns = (
        value
        if isinstance(value, list)
        else _get(value, "messages" if schema == "messages" else "conversations", record)
    )
    if not isinstance(turns, list) or not turns:
        raise UserError("the record has no turns", where=record.where, expected="a list of them")
    messages = []
    for turn in turns:
        if schema == "messages":
            role, text = _text(turn, "role", record), _text(turn, "content", record)
        else:
            name = _text(turn, "from", record)
            role, text = SHAREGPT_ROLES.get(name, name), _text(turn, "value", record)
        if role not in ROLES:
            raise UserError(f"the role {role!r} is unknown", where=record.where, expected=", ".join(ROLES))
        messages.append(ChatMessage(role, text, role in roles and turn.get("loss", True) is not False))
    return messages


def _get(value: Any, key: str, record: SourceRecord) -> Any:
    if not isinstance(value, dict) or key not in value:
        keys = ", ".join(value) if isinstance(value, dict) else json_kind(value)
        raise UserError(f"the record has no key {key!r} (it has: {keys or 'none'})", where=record.where)
    return value[key]


def _text(value: Any, key: str, record: SourceRecord) -> str:
    text = _get(value, key, record)
    if not isinstance(text, str):
        raise UserError(f"{key} is of type {json_kind(text)}", where=record.where, expected="a string")
    return text


@dataclass(frozen=True)
class TurnStyle:
    """How one role's turn is written: what stands in front of its text, and what closes it.

    Attributes:
        opening: pieces in front, never targets.
        closing: pieces behind; targets when the turn is one.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]


@dataclass(frozen=True)
class ChatStyle:
    """A template in pieces. A piece that is a token's exact name becomes that id; others are encoded as text.

    Attributes:
        turns: by role.
        special: pieces that must be single tokens of the tokenizer.
        bos, eos: put in front of the conversation, behind it (a target).
        after: pieces behind every turn that are never targets.
    """

    turns: dict[str, TurnStyle]
    special: tuple[str, ...]
    eos: bool
    after: tuple[str, ...] = ()


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
# ChatML, as InternLM2 has it
CHATML = ChatStyle(
    {role: TurnStyle(("<|im_start|>", f"{role}\n"), ("<|im_end|>",)) for role in ROLES},
    ("<|im_start|>", "<|im_end|>"),
    eos=False,
    after=("\n",),
)
LLAMA3 = ChatStyle(
    {
        role: TurnStyle(("<|start_header_id|>", role, "<|end_header_id|>", "\n\n"), ("<|eot_id|>",))
        for role in ROLES
    },
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    eos=False,
)
MARKS = ("<|System|>", "<|User|>", "<|Bot|>")  # text to the documents' tokenizer, tokens to others
STYLES = {"internlm": INTERNLM, "chatml": CHATML, "llama3": LLAMA3}
# names of the same special tokens in published InternLM2 tokenizers
ALIASES = {"<|im_start|>": ("[UNUSED_TOKEN_146]",), "<|im_end|>": ("[UNUSED_TOKEN_145]",)}
# ids that the documents' tool writes with the documents' tokenizer, known by its size, when it does not name them
DOCUMENTED = {103168: {"<eoh>": 103167, "<eoa>": 103166}}


# tokens with which published chat models end an answer
TURN_ENDS = ("<|im_end|>", *ALIASES["<|im_end|>"], "<eoa>", "<|eot_id|>", "<|end|>", "<|eom_id|>")


class StyleTemplate:
    """One of ``STYLES`` for a tokenizer.

    Raises:
        UserError: the tokenizer lacks a special token of the style.
    """

    def __init__(self, style: ChatStyle, name: str, tokenizer: Tokenizer) -> None:
        self.style, self.tokenizer = style, tokenizer
        self.ids: dict[str, int] = {}
        for piece in style.special:
            names = (piece, *ALIASES.get(piece, ()))
            found = next((token for one in names if (token := tokenizer.token_id(one)) is not None), None)
            if found is None:
                found = DOCUMENTED.get(tokenizer.vocab_size, {}).get(piece)
            if found is None:
                raise UserError(
                    f"the tokenizer has no token {' or '.join(names)}, which the chat template {name!r} needs",
                    where=str(tokenizer.path),
                    fix=f"take another template: --chat-template {'|'.join(sorted(set(STYLES) - {name}))}|tokenizer",
                )
            self.ids[piece] = found

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self._turns(messages) + self.ending

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return [abs(token) for token in self._turns(messages)] + self._pieces(
            self.style.turns["assistant"].opening
        )

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(self.ids[piece] for piece in self.style.turns["assistant"].closing if piece in self.ids)

    def _turns(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        for message in messages:
            turn = self.style.turns[message.role]
            if self.style is INTERNLM and message.role == "user":
                # the documents' tool encodes the user's mark and text as one string
                ids += masked(self._marked("".join(turn.opening) + message.text))
                ids += masked(self._pieces(turn.closing))
                continue
            ids += masked(self._pieces(turn.opening))
            body = self.tokenizer.encode(message.text) + self._pieces(turn.closing)
            ids += body if message.train else masked(body)
            ids += masked(self._pieces(self.style.after))
        return ids

    @property
    def ending(self) -> list[int]:
        return [self.tokenizer.eos_id] if self.style.eos and self.tokenizer.eos_id is not None else []

    def _pieces(self, pieces: Iterable[str]) -> list[int]:
        found: list[int] = []
        for piece in pieces:
            found += [self.ids[piece]] if piece in self.ids else self._marked(piece)
        return found

    def _marked(self, text: str) -> list[int]:
        """Ids of text; a role's mark in front is one id where the tokenizer knows it by name.

        Sentencepiece does not find its control symbols in text, so the name is looked up.
        """
        ids = self.tokenizer.encode(text)
        mark = next((mark for mark in MARKS if text.startswith(mark)), None)
        token = self.tokenizer.token_id(mark) if mark else None
        if mark is None or token is None or token in ids[:2]:
            return ids
        return [token, *self.tokenizer.encode(text[len(mark) :])]


class JinjaTemplate:
    """A tokenizer folder's own template: what rendering a trained turn adds behind its generation prompt is target.

    Raises:
        UserError: the folder has no template, or a trained turn changes what was rendered before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not tokenizer.chat_template:
            raise UserError(
                "no chat template",
                where=str(tokenizer.path.parent),
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                fix=f"take a built-in one: --chat-template {'|'.join(STYLES)}",
            )
        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        self._source = tokenizer.chat_template
        self._template = environment.from_string(self._source)
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._names = {
            name: "" if token is None else tokenizer.decode([token]) for name, token in names.items()
        }

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids: list[int] = []
        before = ""
        for number, message in enumerate(messages, 1):
            if message.train:
                prompt = self._render(messages[: number - 1], before, prompt=True)
                ids += masked(self.tokenizer.encode(prompt[len(before) :]))
                before = prompt
            text = self._render(messages[:number], before)
            part = self.tokenizer.encode(text[len(before) :])
            ids += part if message.train else masked(part)
            before = text
        return ids

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.encode(self._render(messages, "", prompt=True))
        except (
            TemplateError,
            TypeError,
            ValueError,
        ) as error:  # a template may do anything with what it is given
            raise UserError(f"the chat template refuses the conversation: {error}") from None

    def text(self, turns: Sequence[dict[str, str]], *, prompt: bool) -> str:
        """Turns of role and content as the template writes them.

        Args:
            prompt: up to where the assistant is to speak; else up to the end of the last turn's content, to go on
                from it.
        """
        text = self._render([ChatMessage(turn["role"], turn["content"], False) for turn in turns], "", prompt)
        if prompt or not turns:
            return text
        last = turns[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    @property
    def stops(self) -> tuple[int, ...]:
        return turn_end_ids(self.tokenizer)

    @property
    def ending(self) -> list[int]:
        return []

    def _render(self, messages: Sequence[ChatMessage], before: str, prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        text = (
            self._template.render(messages=turns, add_generation_prompt=prompt, **self._names)
            if turns
            else before
        )
        if not text.startswith(before):
            raise UserError(
                "the chat template changes earlier turns when a later one is added, so targets cannot be told apart",
                where=str(self.tokenizer.path.parent),
                fix=f"take a built-in one: --chat-template {'|'.join(STYLES)}",
            )
        return text


def _raise(message: str) -> None:
    raise UserError(f"the chat template refuses the conversation: {message}")


def masked(ids: Sequence[int]) -> list[int]:
    """Ids as inputs that are no targets."""
    return [-token for token in ids]


def build_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A built-in style by name, or "tokenizer": the template of the tokenizer's folder.

    Raises:
        UserError: unknown name, or the tokenizer does not fit.
    """
    if name == "tokenizer":
        return JinjaTemplate(tokenizer)
    if name not in STYLES:
        raise UserError(
            f"no chat template {name!r}", where="--chat-template", expected=", ".join([*STYLES, "tokenizer"])
        )
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
        ids += turn_end_ids(tokenizer) if template is None else template.stops
    if generation is not None:
        ids += [*generation.eos_id, *generation.additional_eos_token_list]
    return tuple(dict.fromkeys(token for token in ids if 0 <= token < vocab_size))
