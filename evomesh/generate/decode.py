"""The decoding loop: prompts in one packed call, then one token of every unfinished sequence a call."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from evomesh.errors import UserError
from evomesh.generate.cache import KeyValueCache
from evomesh.generate.sample import Sampling, TokenSampler
from evomesh.models.language_model import LanguageModel


@dataclass(frozen=True)
class NewToken:
    """One step of one sequence. ``end`` is "eos" or "length" with its last token, else ""."""

    sequence: int
    token: int
    end: str = ""


@torch.inference_mode()
def stream(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
    device: torch.device | str = "cpu",
) -> Iterator[NewToken]:
    """Yields tokens as they are made; prompts of a batch need not be equally long and do not influence each other.

    Args:
        prompts: token ids of each prompt, none empty.
        max_new_tokens: most tokens made for one prompt.
        sampling: greedy when None.
        eos_ids: a sequence ends with the first of these; it is yielded too.
    Raises:
        UserError: an empty prompt.
    """
    sampling = sampling or Sampling(temperature=0.0)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"prompt {index} is empty", expected="at least one token", fix="give some text to go on from"
            )
    if max_new_tokens < 1:
        return
    device = torch.device(device)
    samplers = [TokenSampler(sampling, index) for index in range(len(prompts))]
    cache = KeyValueCache([len(prompt) for prompt in prompts], max(map(len, prompts)) + max_new_tokens)
    active = list(range(len(prompts)))
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    last = torch.tensor(cache.lengths).cumsum(0) - 1  # the last token of each prompt within the packed call
    for made in range(1, max_new_tokens + 1):
        hidden = model(ids, cache.documents(device), cache.attend)
        logits = model.logits(hidden[last.to(device)] if made == 1 else hidden)
        if made > 1:
            cache.advance()
        going, tokens = [], []
        for row, sequence in enumerate(active):
            token = samplers[sequence].next(logits[row])
            end = "eos" if token in eos_ids else "length" if made == max_new_tokens else ""
            yield NewToken(sequence, token, end)
            if not end:
                going.append(row)
                tokens.append(token)
        if not going:
            return
        if len(going) < len(active):
            cache.keep(going)
            active = [active[row] for row in going]
        ids = torch.tensor(tokens, device=device)


def generate(model: LanguageModel, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """All new tokens of each prompt at once; options as in ``stream``."""
    made: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, **options):  # type: ignore[arg-type]
        made[new.sequence].append(new.token)
    return made
