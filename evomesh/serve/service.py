"""The core that API and page share: prompts from text, limits, and answers as streams of text deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from evomesh.config.schema import RotaryType
from evomesh.data.chat_message import ChatMessage, ChatTemplate
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError
from evomesh.generate.engine import GeneratedToken, TokenScore, check_prompt
from evomesh.generate.options import SamplingParams
from evomesh.serve.detokenizer import Detokenizer, TextDelta
from evomesh.serve.loop import EngineLoop, GenerationRequest
from evomesh.serve.token_text import TokenTexts

CHARACTERS_PER_TOKEN = 64  # no text has more of them on average
PREFIX_CHARACTERS = 8  # per token of the context length: most texts have fewer of them
# Tokens by which a beginning may have more than it has inside of the whole text.
PREFIX_MARGIN = 64


@dataclass(frozen=True)
class ServiceLimits:
    """Limits of a service: lengths, concurrency, sizes.

    Attributes:
        context_length: maximum number of tokens of a prompt and its answer together.
        slots: sequences that are generated at the same time.
        queue: sequences that may wait for a slot.
        body_bytes: maximum size of a request.
        page_call_bytes: maximum size of a call of the chat page, which holds its whole
            conversation. Gradio parses it on the event loop.
    """

    context_length: int
    slots: int = 8
    queue: int = 64
    body_bytes: int = 4 * 2**20
    page_call_bytes: int = 2**20

    @property
    def text_characters(self) -> int:
        """The length of a text that is refused without tokenizing it, since that takes long."""
        return self.context_length * CHARACTERS_PER_TOKEN

    @property
    def max_sequences(self) -> int:
        """Sequences that may be open at the same time, in a slot or waiting."""
        return self.slots + self.queue


class QueueFullError(Exception):
    """More sequences would wait than the queue holds."""


class PromptTooLongError(UserError):
    """A prompt that leaves no room for its answer."""


@dataclass(frozen=True)
class ServedModel:
    """A model with its tokenizer, as clients see it.

    Attributes:
        name: by which clients ask for it.
        fingerprint: equal for equal weights.
        created: Unix time at which it was loaded.
        template: None for a model that only completes text.
        eos_ids: each of them ends an answer.
        trained_length: tokens of the longest text it was trained on.
        rotary_type: the one used unless a request names another.
    """

    name: str
    fingerprint: str
    created: int
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: tuple[int, ...]
    vocab_size: int
    trained_length: int
    rotary_type: RotaryType = "origin"


@dataclass(frozen=True)
class Echo:
    """Answers begin with their prompt.

    Attributes:
        texts: the prompts as the client wrote them; None if it sent ids.
        only_prompt: answers consist of the prompt alone.
    """

    texts: Sequence[str] | None = None
    only_prompt: bool = False


class GenerationService:
    """A model, its engines, and how many of their slots are in use. Belongs to one event loop.

    Attributes:
        open_sequences: sequences that somebody waits for.
    """

    def __init__(
        self, model: ServedModel, engines: EngineLoop, limits: ServiceLimits
    ) -> None:
        self.model = model
        self.engines = engines
        self.limits = limits
        self.open_sequences = 0
        self.token_texts = TokenTexts(model.tokenizer)
        # Parsing keeps the interpreter to itself, so one body at a time; tokenizing a
        # long text does not.
        self.parser = ThreadPoolExecutor(1, thread_name_prefix="parser")
        self.tokenizers = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to complete; call it in one of the threads of ``tokenizers``.

        Raises:
            PromptTooLongError: it is far too long; it was not tokenized.
        """
        self.check_text(text)
        tokenizer = self.model.tokenizer
        # As a batch, which the library encodes without keeping the interpreter to
        # itself.
        (ids,) = tokenizer.encode_batch([text])
        return [*tokenizer.leading, *ids]

    def check_text(self, *texts: str) -> None:
        """Reject texts that together are longer than any that fits.

        Raises:
            PromptTooLongError: they are.
        """
        characters = sum(map(len, texts))
        if characters > self.limits.text_characters:
            raise PromptTooLongError(
                f"the text has {characters} characters",
                expected=f"at most {self.limits.text_characters}, since prompt and answer have at most "
                f"{self.limits.context_length} tokens together",
                code="EVO-GEN-002",
            )
        # Tokenize the beginning of a long text; mostly that is too long already.
        length = self.limits.context_length
        most = length * PREFIX_CHARACTERS
        beginnings = [text[:most] for text in texts]
        beginning = "".join(beginnings)[:most]
        if len(beginning) < characters:
            (ids,) = self.model.tokenizer.encode_batch([beginning])
            if len(ids) > length + PREFIX_MARGIN:
                raise PromptTooLongError(
                    f"the prompt has more than {len(ids) - PREFIX_MARGIN} tokens",
                    expected=f"at most {length} together with its answer",
                    code="EVO-GEN-002",
                )

    def chat_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation, up to where the assistant's answer begins; call it as ``text_ids``.

        Raises:
            PromptTooLongError: the messages are far too long; they were not tokenized.
            UserError: the model has no chat template, or the template rejects the conversation.
        """
        if self.model.template is None:
            raise UserError(
                f"{self.model.name} has no chat template: it only completes text",
                fix="use completions, or start the server with --chat-template",
                code="EVO-TOKEN-007",
            )
        self.check_text(*(message.text for message in messages))
        return self.model.template.encode_prompt(messages)

    def check_count(self, prompts: int, copies: int = 1) -> None:
        """Reject more answers than the queue can ever hold.

        Raises:
            UserError: they are too many.
        """
        if prompts * copies > self.limits.max_sequences:
            raise UserError(
                f"{prompts} prompts with {copies} answers each",
                expected=f"at most {self.limits.max_sequences} answers per request",
                code="EVO-SERVE-003",
            )

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None,
        copies: int = 1,
    ) -> None:
        """Reject what can never be answered, before it is queued.

        Raises:
            PromptTooLongError: prompt and answer exceed the context length.
            UserError: a prompt is empty or has ids that the model does not know, or there are more answers than the
                queue can ever hold.
        """
        context_length = self.limits.context_length
        answer_tokens = max_new_tokens or 1
        for prompt in prompts:
            if len(prompt) + answer_tokens > context_length:
                raise PromptTooLongError(
                    f"the prompt has {len(prompt)} tokens and the answer may have {answer_tokens}",
                    expected=f"at most {context_length} together",
                    code="EVO-GEN-002",
                )
            check_prompt(prompt, context_length, self.model.vocab_size)
        self.check_count(len(prompts), copies)

    async def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        rotary_type: RotaryType | None = None,
        stops: Sequence[str] = (),
        echo: Echo | None = None,
    ) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield (index of the prompt, text delta of its answer) as they are generated; close it to free the slots.

        Prompt i draws from the random stream (``sampling.seed``, i).

        Args:
            echo: None: answers do not repeat the prompt.

        Raises:
            QueueFullError: more sequences would wait than the queue holds.
            EngineError: the engine failed.
        """
        if self.open_sequences + len(prompts) > self.limits.max_sequences:
            raise QueueFullError
        self.open_sequences += len(prompts)
        submission = None
        try:
            rotary_type = rotary_type or self.model.rotary_type
            detokenizers: list[Detokenizer] = []
            requests: list[GenerationRequest] = []
            for index, prompt in enumerate(prompts):
                detokenizers.append(self._detokenizer(prompt, stops, echo))
                stream = (sampling.seed, index)
                requests.append(
                    GenerationRequest(prompt, sampling, stream, rotary_type)
                )
            submission = self.engines.submit(requests)
            # Tokens of all prompts come mixed; an echo precedes the first of its answer.
            begun: set[int] = set()
            while submission.open:
                index, token = await submission.next()
                if echo is not None and index not in begun:
                    begun.add(index)
                    text = None if echo.texts is None else echo.texts[index]
                    repeated = await self._repeat_prompt(
                        detokenizers[index], prompts[index], text, token, echo
                    )
                    if echo.only_prompt:
                        submission.close(index)
                    yield index, repeated
                    if echo.only_prompt:
                        continue
                delta = detokenizers[index].push(token)
                if delta.finish:
                    submission.close(index)
                yield index, delta
        finally:
            # Also when the client has gone: its slots are free for others from here on.
            self.open_sequences -= len(prompts)
            if submission is not None:
                submission.close_all()

    def _detokenizer(
        self, prompt: Sequence[int], stops: Sequence[str], echo: Echo | None
    ) -> Detokenizer:
        context = prompt if echo is None else []
        return Detokenizer(
            self.model.tokenizer,
            context,
            stops,
            texts=self.token_texts,
            score_end=echo is not None,
        )

    async def _repeat_prompt(
        self,
        detokenizer: Detokenizer,
        prompt: Sequence[int],
        text: str | None,
        first: GeneratedToken,
        echo: Echo,
    ) -> TextDelta:
        """Return the text delta of the prompt itself, with its scores if the engine was asked for them."""
        with_scores = bool(first.prompt_scores)
        scores = first.prompt_scores or [TokenScore(token) for token in prompt]
        # A long prompt takes as long as its answer would, but all at once.
        return await asyncio.to_thread(
            detokenizer.push_prompt,
            scores,
            with_scores=with_scores,
            text=text,
            is_all=echo.only_prompt,
        )
