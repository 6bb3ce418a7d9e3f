"""A native model as lm-evaluation-harness sees one: text in, log-likelihoods or text out.

Texts are cut, prefixed and truncated as the harness's own ``hf`` backend does it with the exported folder, so that the
scores are the same.

Shapes: T packed tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from evomesh.data.chat import JinjaTemplate
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError
from evomesh.generate.engine import GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.models.language_model import LanguageModel

LOGIT_ROWS = 512  # rows of V logits in memory at a time
ANSWER_TOKENS = 256  # of tasks that do not say
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ScoringRequest:
    """Token ids of one context with its continuation, ready to run: ``targets`` are predicted by the last inputs."""

    number: int
    inputs: list[int]
    targets: list[int]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """
    Args:
        model: in evaluation mode.
        eos_ids: generated answers end with the first of these.
        max_length: most tokens the model reads at once; longer texts lose their beginning, as everywhere in the
            harness.
        batch_tokens: tokens packed into one run of the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        max_length: int,
        batch_tokens: int = 8192,
    ) -> None:
        super().__init__()
        self.model, self.text = model, tokenizer
        self.eos_ids, self.max_length, self.batch_tokens = tuple(eos_ids), max_length, batch_tokens
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        if not self.eos_ids:
            raise UserError("the tokenizer has no end-of-text token", where=str(self.text.path))
        return self.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.text.path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template; there is one at most, so names of several mean nothing."""
        return self.text.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns as the tokenizer's own template writes them; without the generation prompt the last one stays open.

        Raises:
            UserError: the tokenizer has no template, or the template refuses the turns.
        """
        return JinjaTemplate(self.text).text(chat_history, prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids, with the tokenizer's own bos in front unless the text brings it or it is told not to."""
        ids = self.text.encode(string)
        bos = self.text.bos_id
        if bos is None or not self.text.add_bos or add_special_tokens is False:
            return ids
        brought = add_special_tokens is None and ids[:1] == [bos]
        return ids if brought else [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(summed log-probability of the continuation, whether it is what greedy decoding gives) of each request."""
        items = []
        for number, (_text, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a text of {len(continuation)} tokens is to be scored, the model reads {self.max_length}",
                    fix="--max-length N, where the model can read more (dynamic NTK)",
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            items.append(ScoringRequest(number, ids[:-1], continuation))
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(items), desc="texts", disable=disable_tqdm) as bar:
            for batch in self._packed(items):
                answers.update(self._score(batch))
                bar.update(len(batch))
        return [answers[number] for number in range(len(items))]

    def _packed(self, items: list[ScoringRequest]) -> Iterator[list[ScoringRequest]]:
        """Longest first, so that what does not fit in memory is noticed at once."""
        batch: list[ScoringRequest] = []
        total = 0
        for item in sorted(items, key=lambda item: -len(item.inputs)):
            if batch and total + len(item.inputs) > self.batch_tokens:
                yield batch
                batch, total = [], 0
            batch.append(item)
            total += len(item.inputs)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score(self, batch: list[ScoringRequest]) -> Iterator[tuple[int, tuple[float, bool]]]:
        lengths = [len(item.inputs) for item in batch]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths])
        docs = SequenceBounds(positions.to(self._device), bounds.to(self._device, torch.int32), max(lengths))
        ids = torch.tensor([token for item in batch for token in item.inputs], device=self._device)
        stops = bounds[1:].tolist()
        rows = [torch.arange(stop - len(item.targets), stop) for item, stop in zip(batch, stops, strict=True)]
        hidden = self.model(ids, docs)[torch.cat(rows).to(self._device)]
        targets = torch.tensor([token for item in batch for token in item.targets], device=self._device)
        logprobs, greedy = self._targets(hidden, targets)
        sizes = [len(item.targets) for item in batch]
        for item, own, right in zip(
            batch, torch.split(logprobs, sizes), torch.split(greedy, sizes), strict=True
        ):
            yield item.number, (float(own.sum()), bool(right.all()))

    def _targets(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """From [T, D] and [T]: log-probability of each target, and whether it is the likeliest token; [T] both."""
        logprobs, greedy = [], []
        for part, wanted in zip(
            torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True
        ):
            logits = self.model.logits(part)
            logprobs.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == wanted)
        return torch.cat(logprobs), torch.cat(greedy)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, cut into windows of the model's length; each token is scored once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to, and without, the first stop string or end-of-text token."""
        engine = GenerationEngine(
            self.model, slots=max(1, self.batch_tokens // self.max_length), max_tokens=self.max_length
        )
        answers: list[list[int]] = [[] for _ in requests]
        stops: list[list[str]] = []
        running: dict[int, int] = {}
        for number, request in enumerate(requests):
            prompt, options = request.args
            sampling, until = self._sampling(options)
            assert sampling.max_new_tokens is not None
            ids = self.tok_encode(prompt)[-(self.max_length - sampling.max_new_tokens) :]
            stops.append(until)
            running[engine.add(ids, sampling, (sampling.seed, number))] = number
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            while engine.active:
                for token in engine.step():
                    number = running[token.request]
                    if token.finish != "stop":
                        answers[number].append(token.id)
                    stopped = any(stop in self.text.decode(answers[number]) for stop in stops[number])
                    if stopped:
                        engine.cancel(token.request)
                    bar.update(bool(stopped or token.finish))
        return [self._before(answer, until) for answer, until in zip(answers, stops, strict=True)]

    def _sampling(self, options: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        known = dict(normalize_gen_kwargs(options, ANSWER_TOKENS))
        until, most = [stop for stop in known.pop("until") if stop], known.pop("max_gen_toks")
        unknown = sorted(set(known) - set(SAMPLING))
        if unknown:
            raise UserError(f"generation_kwargs has {unknown[0]!r}", expected=", ".join(SAMPLING))
        if most >= self.max_length:
            raise UserError(
                f"the task asks for {most} new tokens, the model reads {self.max_length} in all",
                fix="set max_gen_toks in the task's generation_kwargs, or --max-length N",
            )
        return SamplingParams(**known, max_new_tokens=most, eos_ids=self.eos_ids), until

    def _before(self, answer: list[int], stops: list[str]) -> str:
        text = self.text.decode(answer)
        for stop in stops:
            text = text.split(stop)[0]
        return text
