"""What the API and the page have in common: prompts from text, limits, and answers as they are written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from evomesh.config.schema import RotaryType
from evomesh.data.chat import ChatMessage, ChatTemplate
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError
from evomesh.generate.engine import check_prompt
from evomesh.generate.options import SamplingParams
from evomesh.serve.loop import EngineLoop, GenerationRequest
from evomesh.serve.writer import Detokenizer, TextDelta


@dataclass(frozen=True)
class ServiceLimits:
    """Attributes:
    context: most tokens of a prompt and its answer together.
    slots: sequences that are made at the same time.
    queue: sequences that may wait for a slot.
    body: bytes of a request.
    """

    context: int
    slots: int = 8
    queue: int = 64
    body: int = 4 * 2**20


class QueueFullError(Exception):
    """The queue is full."""


class PromptTooLongError(UserError):
    """A prompt that leaves no room for its answer."""


@dataclass(frozen=True)
class ServedModel:
    """What is served.

    Attributes:
        name: by which clients ask for it.
        fingerprint: equal for equal weights.
        created: Unix time of its checkpoint.
        template: None for a model that only goes on with text.
        eos_ids: any of them ends an answer.
        trained_length: tokens of the longest text it was trained for.
        rotary: the type it was trained with or is wanted to run with.
    """

    name: str
    fingerprint: str
    created: int
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: tuple[int, ...]
    vocab_size: int
    trained_length: int
    rotary: RotaryType = "origin"


class GenerationService:
    """A model, its engines, and how much of them is in use. Used on one event loop."""

    def __init__(self, model: ServedModel, engines: EngineLoop, limits: ServiceLimits) -> None:
        self.model, self.engines, self.limits = model, engines, limits
        self.load = 0  # sequences that somebody waits for

    def text_ids(self, text: str) -> list[int]:
        """A text to go on from, with the bos that the tokenizer puts in front of texts."""
        tokenizer = self.model.tokenizer
        start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return start + tokenizer.encode(text)

    def chat_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """A conversation up to where the assistant is to speak.

        Raises:
            UserError: the model has no chat template, or the template refuses the conversation.
        """
        if self.model.template is None:
            raise UserError(
                f"{self.model.name} has no chat template, it goes on with text",
                fix="use completions, or start the server with --chat-template",
            )
        return self.model.template.prompt(messages)

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None, copies: int = 1) -> None:
        """Raises:
        TooLong: prompt and answer need more than the context.
        UserError: a prompt is empty or holds ids the model does not know, or there are more than can ever be queued.
        """
        context = self.limits.context
        for prompt in prompts:
            if len(prompt) + (max_new_tokens or 1) > context:
                raise PromptTooLongError(
                    f"the prompt has {len(prompt)} tokens and the answer may have {max_new_tokens or 1}",
                    expected=f"at most {context} together",
                )
            check_prompt(prompt, context, self.model.vocab_size)
        if len(prompts) * copies > self.limits.slots + self.limits.queue:
            raise UserError(
                f"{len(prompts)} prompts with {copies} answers each",
                expected=f"at most {self.limits.slots + self.limits.queue} answers a request",
            )

    async def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        seed: int,
        rotary: RotaryType | None = None,
        stops: Sequence[str] = (),
    ) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """(index of the prompt, piece of its answer) as they are made; close it to free the slots.

        Raises:
            Busy: more would wait than the queue holds.
            EngineFailure: the engine broke.
        """
        if self.load + len(prompts) > self.limits.slots + self.limits.queue:
            raise QueueFullError
        self.load += len(prompts)
        order = None
        try:
            writers = [Detokenizer(self.model.tokenizer, prompt, stops) for prompt in prompts]
            jobs = [
                GenerationRequest(ids, sampling, (seed, i), rotary or self.model.rotary)
                for i, ids in enumerate(prompts)
            ]
            order = self.engines.submit(jobs)
            while order.open:
                index, token = await order.next()
                piece = writers[index].push(token)
                if piece.finish:
                    order.close(index)
                yield index, piece
        finally:
            self.load -= len(prompts)
            if order is not None:
                for index in list(order.open):
                    order.close(index)
