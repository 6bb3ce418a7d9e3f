"""A native model behind the interface of lm-evaluation-harness: text in, log-likelihoods or text out.

Texts are tokenized, prefixed and truncated as the harness's own ``hf`` backend does
with the exported folder, so that the scores are the same.

Shapes: T packed tokens, N targets, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError
from evomesh.generate.engine import GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.models.language_model import LanguageModel

LOGIT_ROWS = 512  # rows of V logits in memory at a time
DEFAULT_NEW_TOKENS = 256  # maximum for tasks that do not set one
SAMPLING_KEYS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)


@dataclass(frozen=True)
class ScoringRequest:
    """A context with its continuation as token ids: ``targets`` are what the last ``inputs`` predict."""

    number: int
    inputs: list[int]
    targets: list[int]


@dataclass
class PackedRequests:
    """Scoring requests in one pack without padding.

    Attributes:
        lengths: of the inputs of each request.
        inputs, targets: of all requests, one after the other.
        rows: those of the pack that predict the targets, the last ones of each request.
    """

    lengths: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, requests: Sequence[ScoringRequest]) -> PackedRequests:
        """Pack the requests.

        The inputs 1 2 3 and 4 5 with the targets 3 9 and 6 are packed as 1 2 3 4 5, and
        the rows 1, 2 and 4 predict 3, 9 and 6.
        """
        packed = cls()
        for request in requests:
            packed.lengths.append(len(request.inputs))
            packed.inputs += request.inputs
            packed.targets += request.targets
            end = len(packed.inputs)
            start = end - len(request.targets)
            packed.rows += range(start, end)
        return packed


@dataclass(frozen=True)
class TextScore:
    """Summed log-probability of a continuation, and whether greedy decoding would give it."""

    logprob: float
    is_greedy: bool


@dataclass
class PendingAnswer:
    """An answer that is being generated: the strings that end it, and its ids so far."""

    stops: list[str]
    ids: list[int] = field(default_factory=list)


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """A native model with the methods that lm-evaluation-harness calls.

    Args:
        model: in evaluation mode.
        eos_ids: generated answers end with the first of these.
        context_length: maximum number of tokens read at once; longer texts lose their beginning, as everywhere in the
            harness.
        batch_tokens: tokens packed into one forward pass.
        shows_progress: draw a bar of the texts that are done.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        context_length: int,
        batch_tokens: int = 8192,
        shows_progress: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.text_tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.context_length = context_length
        self.batch_tokens = batch_tokens
        self.shows_progress = shows_progress
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        if not self.eos_ids:
            raise UserError(
                "the tokenizer has no end-of-text token",
                where=str(self.text_tokenizer.path),
                code="EVO-TOKEN-005",
            )
        return self.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.text_tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.text_tokenizer.path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the template; there is at most one, so the name of one of several is ignored."""
        return self.text_tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages with the tokenizer's own template; without a generation prompt the last one stays open.

        Raises:
            UserError: the tokenizer has no template, or the template refuses the messages.
        """
        return JinjaTemplate(self.text_tokenizer).render(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Return ids, with the tokenizer's bos in front unless the text starts with it or the caller forbids it."""
        ids = self.text_tokenizer.encode(string)
        bos = list(self.text_tokenizer.leading)
        if not bos or add_special_tokens is False:
            return ids
        has_bos = add_special_tokens is None and ids[:1] == bos
        return ids if has_bos else bos + ids

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the context length; each token is scored once."""
        # The windows overlap by one token of context only: of the tokens 1 .. 7 with a
        # context length of 3, they score 1 2 3, 4 5 6 and 7.
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []  # number of the request that each window belongs to
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding would give it."""
        scoring: list[ScoringRequest] = []
        for number, (_text, context, continuation) in enumerate(requests):
            request = self._scoring_request(number, context, continuation)
            scoring.append(request)

        # Batches come longest first; the scores are put back into the order of the
        # requests.
        scores: dict[int, TextScore] = {}
        progress_bar = tqdm(
            total=len(scoring),
            desc="texts",
            disable=disable_tqdm or not self.shows_progress,
        )
        with progress_bar as progress:
            for batch in self._batches(scoring):
                scores |= self._score(batch)
                progress.update(len(batch))
        ordered: list[tuple[float, bool]] = []
        for request in scoring:
            score = scores[request.number]
            ordered.append((score.logprob, score.is_greedy))
        return ordered

    def _scoring_request(
        self, number: int, context: list[int], continuation: list[int]
    ) -> ScoringRequest:
        if len(continuation) > self.context_length:
            raise UserError(
                f"a text of {len(continuation)} tokens is to be scored, but the model reads {self.context_length}",
                fix="pass --max-length N if the model can read more (dynamic NTK)",
                code="EVO-EVAL-003",
            )
        ids = (context + continuation)[-(self.context_length + 1) :]
        return ScoringRequest(number, ids[:-1], continuation)

    def _batches(
        self, requests: list[ScoringRequest]
    ) -> Iterator[list[ScoringRequest]]:
        """Yield batches of ``batch_tokens``, longest requests first: running out of memory is noticed at once."""
        batch: list[ScoringRequest] = []
        total_tokens = 0
        for request in sorted(requests, key=lambda request: -len(request.inputs)):
            if batch and total_tokens + len(request.inputs) > self.batch_tokens:
                yield batch
                batch = []
                total_tokens = 0
            batch.append(request)
            total_tokens += len(request.inputs)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score(self, batch: list[ScoringRequest]) -> dict[int, TextScore]:
        """Score packed requests in one forward pass; the result is keyed by request number."""
        packed = PackedRequests.of(batch)
        # 1. Score all targets.
        bounds = self._bounds(packed.lengths)
        hidden = self.model(self._on_device(packed.inputs), bounds)
        predicting = hidden[self._on_device(packed.rows)]
        targets = self._on_device(packed.targets)
        logprobs, is_top = self._score_targets(predicting, targets)

        # 2. Sum over the targets of each request.
        scores: dict[int, TextScore] = {}
        start = 0
        for request in batch:
            num_targets = len(request.targets)
            stop = start + num_targets
            own_logprobs = logprobs[start:stop]
            own_is_top = is_top[start:stop]
            total = float(own_logprobs.sum())
            is_greedy = bool(own_is_top.all())
            score = TextScore(total, is_greedy)
            scores[request.number] = score
            start = stop
        return scores

    def _on_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)

    def _bounds(self, lengths: Sequence[int]) -> SequenceBounds:
        """Return the bounds of packed texts: lengths 3 and 2 have cu_seqlens 0 3 5 and positions 0 1 2 0 1."""
        device = self._device
        ends = torch.tensor([0, *lengths]).cumsum(0)
        cu_seqlens = ends.to(device, torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return SequenceBounds(positions.to(device), cu_seqlens, max(lengths))

    def _score_targets(
        self,
        hidden: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return for [N, D] and [N] each target's log-probability and whether it is the top token; both [N]."""
        logprobs: list[Tensor] = []
        is_top: list[Tensor] = []
        # In chunks, because N rows of V logits may not fit into memory.
        hidden_chunks = torch.split(hidden, LOGIT_ROWS)
        target_chunks = torch.split(targets, LOGIT_ROWS)
        for hidden_chunk, target_chunk in zip(
            hidden_chunks, target_chunks, strict=True
        ):
            logits = self.model.logits(hidden_chunk)
            all_logprobs = logits.log_softmax(-1)
            target_logprobs = all_logprobs.gather(1, target_chunk[:, None])
            logprobs.append(target_logprobs[:, 0])
            is_top.append(logits.argmax(-1) == target_chunk)
        return torch.cat(logprobs), torch.cat(is_top)

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Return the answers up to the first stop string or end-of-answer id, which is left out."""
        # 1. Hand all requests to an engine.
        context_length = self.context_length
        slots = max(1, self.batch_tokens // context_length)
        engine = GenerationEngine(
            self.model, slots=slots, context_length=context_length
        )
        answers: dict[int, PendingAnswer] = {}  # by the engine's number of the request
        for number, request in enumerate(requests):
            prompt, options = request.args
            sampling, stops = self._sampling_params(options)
            assert sampling.max_new_tokens is not None
            # As the harness's own backend does, a prompt loses its beginning.
            max_prompt_tokens = context_length - sampling.max_new_tokens
            ids = self.tok_encode(prompt)
            stream = (sampling.seed, number)
            engine_number = engine.add(ids[-max_prompt_tokens:], sampling, stream)
            answers[engine_number] = PendingAnswer(stops)

        # 2. Collect their tokens until a stop string or the end.
        progress_bar = tqdm(total=len(requests), desc="answers", disable=disable_tqdm)
        with progress_bar as progress:
            while engine.active:
                for token in engine.step():
                    answer = answers[token.request]
                    if token.finish != "stop":
                        answer.ids.append(token.id)
                    stopped = self._has_stop(answer)
                    if stopped:
                        engine.cancel(token.request)
                    progress.update(bool(stopped or token.finish))
        return [self._text_before_stop(answer) for answer in answers.values()]

    def _sampling_params(
        self, options: dict[str, Any]
    ) -> tuple[SamplingParams, list[str]]:
        """Return the sampling parameters and the stop strings of a task's ``generation_kwargs``."""
        given = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        until = [stop for stop in given.pop("until") if stop]
        max_new_tokens = given.pop("max_gen_toks")
        unknown = sorted(set(given) - set(SAMPLING_KEYS))
        if unknown:
            raise UserError(
                f"generation_kwargs has {unknown[0]!r}",
                expected=", ".join(SAMPLING_KEYS),
                code="EVO-EVAL-002",
            )
        if max_new_tokens >= self.context_length:
            raise UserError(
                f"the task asks for {max_new_tokens} new tokens, but prompt and answer have {self.context_length}",
                fix="set max_gen_toks in the task's generation_kwargs, or pass --max-length N",
                code="EVO-EVAL-003",
            )
        return SamplingParams(
            **given, max_new_tokens=max_new_tokens, eos_ids=self.eos_ids
        ), until

    def _has_stop(self, answer: PendingAnswer) -> bool:
        if not answer.stops:
            return False
        text = self.text_tokenizer.decode(answer.ids)
        return any(stop in text for stop in answer.stops)

    def _text_before_stop(self, answer: PendingAnswer) -> str:
        text = self.text_tokenizer.decode(answer.ids)
        for stop in answer.stops:
            text = text.split(stop)[0]
        return text
