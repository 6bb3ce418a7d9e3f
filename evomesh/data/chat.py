"""Encode conversations as token ids in which only the answers are targets.

Masked tokens are stored as negative ids: input, but not targets. A leading bos keeps
its sign, as in InternEvo's alpaca_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evomesh.config.schema import GenerationConfig
from evomesh.data.chat_styles import (
    INTERNEVO_TOKEN_IDS,
    INTERNLM,
    ROLE_MARKS,
    STYLES,
    TOKEN_ALIASES,
    TURN_ENDS,
    ChatStyle,
)
from evomesh.data.template import RenderedChat, Span, TemplateRenderer
from evomesh.data.tokenizer import EncodedText, HfTokenizer, Tokenizer
from evomesh.errors import UserError


@dataclass(frozen=True)
class ChatMessage:
    """A message of a conversation.

    Attributes:
        role: one of ``ROLES``; "tool" and others for templates of tokenizer folders that have them.
        text: its content.
        train: whether its text is a target.
        extra: further keys that the template of a tokenizer folder may read: name, tool_calls, reasoning_content.
    """

    role: str
    text: str
    train: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate(Protocol):
    """A rule that renders conversations as token ids."""

    def encode(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Return the ids of a conversation; those of tokens that are not targets are negative.

        Args:
            tools: JSON schemas of the functions that the assistant may call.
        """
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

    def encode(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[int]:
        self._check_plain(messages, tools)
        return self._encode_turns(messages) + self.ending

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        self._check_plain(messages, None)
        ids = [abs(token) for token in self._encode_turns(messages)]
        return ids + self._encode_fragments(self.style.turns["assistant"].opening)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        closing = self.style.turns["assistant"].closing
        return tuple(
            self.special_ids[token] for token in closing if token in self.special_ids
        )

    @property
    def ending(self) -> list[int]:
        if self.style.eos and self.tokenizer.eos_id is not None:
            return [self.tokenizer.eos_id]
        return []

    def _check_plain(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None
    ) -> None:
        """Refuse what a built-in template has no place for."""
        roles = {message.role for message in messages} - set(self.style.turns)
        keys = {key for message in messages for key in message.extra}
        lacking = [f"the role {role!r}" for role in sorted(roles)]
        lacking += [f"the key {key!r} of a message" for key in sorted(keys)]
        lacking += ["tools"] if tools else []
        if lacking:
            raise UserError(
                f"the built-in chat template has no place for {', '.join(lacking)}",
                fix="use the template of a tokenizer that has one: --chat-template tokenizer",
            )

    def _encode_turns(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        for message in messages:
            turn = self.style.turns[message.role]
            if self.style is INTERNLM and message.role == "user":
                # alpaca_tokenizer.py encodes the user's role mark and text as one
                # string
                ids += mask(self._encode_text("".join(turn.opening) + message.text))
                ids += mask(self._encode_fragments(turn.closing))
                continue
            ids += mask(self._encode_fragments(turn.opening))
            body = self.tokenizer.encode(message.text) + self._encode_fragments(
                turn.closing
            )
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

        Sentencepiece does not recognize its control symbols in text, so the token is
        looked up by name.
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

    A conversation is rendered and encoded as a whole, as by a server. Spans of
    characters tell which ids are targets: what the template puts between ``{%
    generation %}`` tags, or without such tags what it appends to the generation prompt.

    Raises:
        UserError: the folder has no template, or one that does not compile.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        where = str(tokenizer.path.parent)
        if not tokenizer.templates.get("default"):
            names = ", ".join(map(repr, tokenizer.templates))
            found = (
                f"no default chat template, but {names}"
                if any(tokenizer.templates.values())
                else ""
            )
            raise UserError(
                found or "no chat template",
                where=where,
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                fix=f"use a built-in one: --chat-template {'|'.join(STYLES)}",
            )
        assert isinstance(
            tokenizer, HfTokenizer
        )  # a model without files beside it has no template
        self.tokenizer = tokenizer
        self._renderers = {
            name: TemplateRenderer(source, where)
            for name, source in tokenizer.templates.items()
        }

    def encode(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[int]:
        whole = self._render(messages, tools=tools)
        encoded = self.tokenizer.encode_with_spans(whole.text)
        is_target = [False] * len(encoded.ids)
        for span in self._target_spans(messages, tools, whole, encoded):
            for position in _covered(encoded, span):
                is_target[position] = True
        return [
            token if target else -token
            for token, target in zip(encoded.ids, is_target, strict=True)
        ]

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.tokenizer.encode(
            self._render(messages, add_generation_prompt=True).text
        )

    def render(
        self, turns: Sequence[dict[str, str]], *, add_generation_prompt: bool
    ) -> str:
        """Return the text of turns of role and content.

        Args:
            add_generation_prompt: render up to where the assistant's answer starts; else up to the end of the last
                turn's content, so that a model can continue it.
        """
        if not turns:
            return ""
        rendered = self._renderers["default"].render(
            turns,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            variables=self.tokenizer.special_tokens,
        )
        return rendered.text

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return turn_end_ids(self.tokenizer)

    @property
    def ending(self) -> list[int]:
        return []

    def turn_end(self) -> int | None:
        """Return the id of the special token after an answer; None if there is none or no answer can be rendered."""
        answer = "answer"
        conversation = [
            ChatMessage("user", "question", False),
            ChatMessage("assistant", answer, False),
        ]
        try:
            text = self._render(conversation).text
        except UserError:
            return None
        place = text.rfind(answer)
        if place < 0:
            return None
        encoded = self.tokenizer.encode_with_spans(text)
        for token, (start, _) in zip(encoded.ids, encoded.spans, strict=True):
            if start >= place + len(answer) and self.tokenizer.is_added(token):
                return token
        return None

    def _target_spans(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any] | None,
        whole: RenderedChat,
        encoded: EncodedText,
    ) -> list[Span]:
        """Return the spans of the text that are targets."""
        trained = [number for number, message in enumerate(messages) if message.train]
        spans: list[Span] = []
        if whole.generated:
            answers = [
                number
                for number, message in enumerate(messages)
                if message.role == "assistant"
            ]
            spans = self._tagged_spans(messages, answers, whole)
            trained = [number for number in trained if number not in answers]
        for number in trained:
            start, end = self._appended_span(messages, number, tools, whole.text)
            spans.append((start, _token_boundary(encoded, end)))
        return spans

    def _tagged_spans(
        self,
        messages: Sequence[ChatMessage],
        answers: Sequence[int],
        whole: RenderedChat,
    ) -> list[Span]:
        """Return the tagged spans of the answers that are targets."""
        if all(messages[number].train for number in answers):
            return whole.generated
        if len(whole.generated) != len(answers):
            raise UserError(
                f"the chat template marks {len(whole.generated)} spans as generated in {len(answers)} answers, "
                "so it is unknown which of them is an answer that is not trained",
                where=str(self.tokenizer.path.parent),
                fix=f"train all answers, or use a built-in template: --chat-template {'|'.join(STYLES)}",
            )
        spans = zip(answers, whole.generated, strict=True)
        return [span for number, span in spans if messages[number].train]

    def _appended_span(
        self,
        messages: Sequence[ChatMessage],
        number: int,
        tools: Sequence[Any] | None,
        whole: str,
    ) -> Span:
        """Return the span of a message: from the end of the generation prompt to the end of what follows it.

        Raises:
            UserError: later messages change the text of this one or of those before it.
        """
        is_answer = messages[number].role == "assistant"
        before = ""
        if number:
            before = self._render(
                messages[:number], tools=tools, add_generation_prompt=is_answer
            ).text
        until = whole
        if number + 1 < len(messages):
            # Some templates write eos at the end of any text: what both renderings
            # share is the message.
            closed = self._render(messages[: number + 1], tools=tools).text
            prompted = self._render(
                messages[: number + 1], tools=tools, add_generation_prompt=True
            ).text
            until = _shared_start(closed, prompted)
        if not (until.startswith(before) and whole.startswith(until)):
            raise UserError(
                f"the chat template changes earlier messages when a later one is added: message {number + 1} of "
                f"{len(messages)} is not what a model is asked to write, so targets are ambiguous",
                where=str(self.tokenizer.path.parent),
                fix='give it "loss": false, end the conversation with it, or use a built-in template: '
                f"--chat-template {'|'.join(STYLES)}",
            )
        return len(before), len(until)

    def _render(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> RenderedChat:
        turns = [
            {"role": message.role, "content": message.text, **message.extra}
            for message in messages
        ]
        name = "tool_use" if tools and "tool_use" in self._renderers else "default"
        variables: dict[str, Any] = {**self.tokenizer.special_tokens, "tools": tools}
        return self._renderers[name].render(
            turns, add_generation_prompt=add_generation_prompt, variables=variables
        )


def _covered(encoded: EncodedText, span: Span) -> list[int]:
    """Return the positions of the tokens of a span of characters.

    The bytes of one character may be tokens of which only the last stands for it.
    """
    first, last = span
    return [
        position
        for position, (start, end) in enumerate(encoded.spans)
        if start < last and (end > first or start == end >= first)
    ]


def _shared_start(first: str, second: str) -> str:
    """Return the longest text that both begin with."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _token_boundary(encoded: EncodedText, end: int) -> int:
    """Return the start of the token that an end falls into, else the end."""
    inside = [start for start, stop in encoded.spans if start < end < stop]
    return inside[0] if inside else end


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
        raise UserError(
            f"no chat template {name!r}",
            where="--chat-template",
            expected=f"one of {choices}",
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
    known = [
        tokenizer.token_id(name)
        for name in TURN_ENDS
        if name in tokenizer.chat_template
    ]
    if tokenizer.chat_template:
        known.append(JinjaTemplate(tokenizer).turn_end())
    return tuple(dict.fromkeys(token for token in known if token is not None))


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
