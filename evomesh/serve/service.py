"""The core that API and page share: prompts from text, limits, and answers as streams of text deltas."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from evomesh.config.schema import RotaryType
from evomesh.data.chat import ChatMessage, ChatTemplate
from evomesh.data.tokenizer import Tokenizer, encode_prompt
from evomesh.errors import UserError
from evomesh.generate.engine import check_prompt
from evomesh.generate.options import SamplingParams
from evomesh.serve.detokenizer import Detokenizer, TextDelta
from evomesh.serve.loop import EngineLoop, GenerationRequest


@dataclass(frozen=True)
class ServiceLimits:
    """Limits of a service: lengths, concurrency, sizes.

    Attributes:
        context_length: maximum number of tokens of a prompt and its answer together.
        slots: sequences that are generated at the same time.
        queue: sequences that may wait for a slot.
        body_bytes: maximum size of a request.
    """

    context_length: int
    slots: int = 8
    queue: int = 64
    body_bytes: int = 4 * 2**20

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


class GenerationService:
    """A model, its engines, and how many of their slots are in use. Belongs to one event loop.

    Attributes:
        open_sequences: sequences that somebody waits for.
    """

    def __init__(self, model: ServedModel, engines: EngineLoop, limits: ServiceLimits) -> None:
        self.model, self.engines, self.limits = model, engines, limits
        self.open_sequences = 0

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to complete."""
        return encode_prompt(self.model.tokenizer, text)

    def chat_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation, up to where the assistant's answer begins.

        Raises:
            UserError: the model has no chat template, or the template rejects the conversation.
        """
        if self.model.template is None:
            raise UserError(
                f"{self.model.name} has no chat template: it only completes text",
                fix="use completions, or start the server with --chat-template",
            )
        return self.model.template.encode_prompt(messages)

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None, copies: int = 1) -> None:
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
                )
            check_prompt(prompt, context_length, self.model.vocab_size)
        if len(prompts) * copies > self.limits.max_sequences:
            raise UserError(
                f"{len(prompts)} prompts with {copies} answers each",
                expected=f"at most {self.limits.max_sequences} answers per request",
            )

    async def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        rotary_type: RotaryType | None = None,
        stops: Sequence[str] = (),
    ) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield (index of the prompt, text delta of its answer) as they are generated; close it to free the slots.

        Prompt i draws from the random stream (``sampling.seed``, i).

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
                detokenizers.append(Detokenizer(self.model.tokenizer, prompt, stops))
                stream = (sampling.seed, index)
                requests.append(GenerationRequest(prompt, sampling, stream, rotary_type))
            submission = self.engines.submit(requests)
            while submission.open:
                index, token = await submission.next()
                delta = detokenizers[index].push(token)
                if delta.finish:
                    submission.close(index)
                yield index, delta
        finally:
            self.open_sequences -= len(prompts)
            if submission is not None:
                submission.close_all()
