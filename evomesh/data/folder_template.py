"""The chat template in a tokenizer's folder: conversations as ids and targets, and the ids that end a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomesh.data.chat_message import ChatMessage, mark_targets
from evomesh.data.chat_styles import STYLES, TURN_ENDS
from evomesh.data.left_out import find_left_out
from evomesh.data.template import RenderedChat, Span, TemplateRenderer
from evomesh.data.tokenizer import EncodedText, HfTokenizer, Tokenizer
from evomesh.errors import UserError


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
                fix="add one to the folder, or, with a command that has the option, use a built-in one: "
                f"--chat-template {'|'.join(STYLES)}",
                code="EVO-TOKEN-007",
            )
        # A model without files beside it has no template.
        assert isinstance(tokenizer, HfTokenizer)
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
        targets = self._target_spans(messages, tools, whole, encoded)
        return mark_targets(encoded, targets)

    def left_out(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[str]:
        where = str(self.tokenizer.path.parent)
        return find_left_out(messages, tools, self._text, where)

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
        # Tokens that the template names, even where this conversation does not render
        # them, as with Llama 3.1's end of a message that calls a tool.
        tokenizer = self.tokenizer
        named = [name for name in TURN_ENDS if name in tokenizer.chat_template]
        found = [*map(tokenizer.token_id, named), self.turn_end()]
        known = [token for token in found if token is not None]
        return tuple(dict.fromkeys(known))

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
                code="EVO-TOKEN-009",
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
        # 1. What is there before the message is written: for an answer, the prompt.
        is_answer = messages[number].role == "assistant"
        before = ""
        if number:
            before = self._render(
                messages[:number], tools=tools, add_generation_prompt=is_answer
            ).text
        elif is_answer:
            before = self._before_first_answer(tools, whole)

        # 2. What is there after it; the last message takes all that the template adds.
        until = whole
        if number + 1 < len(messages):
            so_far = messages[: number + 1]
            closed = self._render(so_far, tools=tools).text
            prompted = self._render(
                so_far, tools=tools, add_generation_prompt=True
            ).text
            until = closed[: self._end_of_messages(closed, prompted)]

        # 3. Both must begin the whole text, else no span of it is the message.
        if not (until.startswith(before) and whole.startswith(until)):
            raise UserError(
                f"the chat template changes earlier messages when a later one is added: message {number + 1} of "
                f"{len(messages)} is not what a model is asked to write, so targets are ambiguous",
                where=str(self.tokenizer.path.parent),
                fix='give it "loss": false, end the conversation with it, or use a built-in template: '
                f"--chat-template {'|'.join(STYLES)}",
                code="EVO-TOKEN-009",
            )
        return len(before), len(until)

    def _before_first_answer(self, tools: Sequence[Any] | None, whole: str) -> str:
        """Return what is there before an answer that begins a conversation: up to the generation prompt."""
        question = [ChatMessage("user", "question", False)]
        try:
            closed = self._render(question, tools=tools).text
            prompted = self._render(
                question, tools=tools, add_generation_prompt=True
            ).text
        except UserError:
            return ""
        prompt = prompted[self._end_of_messages(closed, prompted) :]
        opening, found, _ = whole.partition(prompt)
        return opening + found if prompt and found else ""

    def _end_of_messages(self, closed: str, prompted: str) -> int:
        """Return where the last message ends in two texts of the same messages.

        Args:
            closed: rendered without a generation prompt; some templates write eos at the end of it.
            prompted: rendered with one.
        """
        if prompted.startswith(closed) or closed.startswith(prompted):
            shorter = min(closed, prompted, key=len)
            return len(shorter)
        # What follows the message may begin alike in both, as "<|endoftext|>" and
        # "<|assistant|>" do: only whole tokens that both have are part of it.
        encoded = self.tokenizer.encode_with_spans(closed)
        prompted_ids = self.tokenizer.encode(prompted)
        end = 0
        pairs = zip(encoded.ids, prompted_ids, encoded.spans, strict=False)
        for token, prompted_token, (_, token_end) in pairs:
            if token != prompted_token:
                break
            end = token_end
        return end

    def _text(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None
    ) -> str:
        return self._render(messages, tools=tools).text

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


def _token_boundary(encoded: EncodedText, end: int) -> int:
    """Return the start of the token that an end falls into, else the end."""
    inside = [start for start, stop in encoded.spans if start < end < stop]
    return inside[0] if inside else end
