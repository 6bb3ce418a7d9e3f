"""``data.eval_every``: tasks of lm-evaluation-harness on the model in training, in its layout.

task files -> harness, on every rank -> texts -> packs, shared by the data-parallel ranks -> scores
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from typing import Any

from evomesh.checkpoint.huggingface.config import rotary_scaling
from evomesh.config.schema import IGNORE, Config
from evomesh.data.chat import end_of_answer_ids
from evomesh.data.tokenizer import check_tokenizer_fits, load_tokenizer
from evomesh.evaluate.native import (
    HarnessModel,
    PendingAnswer,
    ScoringRequest,
    TextScore,
)
from evomesh.evaluate.run import (
    figures_of,
    load_tasks,
    score_tasks,
    task_figures,
)
from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import TokenSampler
from evomesh.layers.loss import LossOutput
from evomesh.parallel.collectives import all_gather_objects
from evomesh.train.launch import RunContext
from evomesh.train.samples import GrowingAnswer, evaluated, grow_answers
from evomesh.train.stages import ModelStages
from evomesh.train.text_passes import TextPack, TextPasses
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

PACKS_AT_A_TIME = 8  # of each data-parallel rank
ANSWERS_AT_A_TIME = 64


class RunHarnessModel(HarnessModel):
    """The model as it is in the run behind the interface of the harness; all ranks make the same calls."""

    def __init__(self, passes: TextPasses, **settings: Any) -> None:
        self.passes = passes
        self.grid = passes.grid
        tokens = passes.longest_pack * self.grid.dp.size * PACKS_AT_A_TIME
        model = passes.stages.models[0]
        super().__init__(model, batch_tokens=tokens, shows_progress=False, **settings)

    def _score(self, batch: list[ScoringRequest]) -> dict[int, TextScore]:
        """Score requests in packs, of which each data-parallel rank takes its share."""
        texts = [request.inputs for request in batch]
        packs = self.passes.pack(texts)
        own = self._own_packs(packs)
        scores = self._score_packs(own, batch)
        return self._of_all_ranks(scores)

    def _score_packs(
        self,
        packs: Sequence[TextPack],
        requests: Sequence[ScoringRequest],
    ) -> dict[int, TextScore]:
        """Return the scores of the texts in some packs, on the last stage."""
        labels = [_labels(pack, requests) for pack in packs]
        targets = self.passes.batch(packs, labels)
        scores: dict[int, TextScore] = {}

        def read(index: int, output: LossOutput) -> None:
            pack = packs[index]
            found = _scores_of_pack(pack, requests, output)
            scores.update(found)

        schedule = self.passes.stages.schedule
        with this_process().phase(Place.FORWARD_BACKWARD):
            schedule.evaluate(targets, read)
        return scores

    def _of_all_ranks(self, scores: dict[int, TextScore]) -> dict[int, TextScore]:
        """Return the scores of all data-parallel ranks, whose last stages have the losses."""
        merged = dict(scores)
        for axis in (self.grid.pp, self.grid.dp):
            of_ranks = all_gather_objects(merged, axis)
            merged = {}
            for gathered in of_ranks:
                merged |= gathered
        return merged

    def _own_packs(self, packs: list[TextPack]) -> list[TextPack]:
        """Return the packs that this data-parallel rank scores.

        Weights may be sharded over these ranks: each makes as many passes.
        """
        dp = self.grid.dp
        missing = -len(packs) % dp.size
        repeated = packs[-1:] * missing
        shared = packs + repeated
        return shared[dp.rank :: dp.size]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding would give it."""
        del disable_tqdm
        scores: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=True
        )
        return scores

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Return the answers up to the first stop string or end-of-answer id, which is left out."""
        texts: list[str] = []
        for start in range(0, len(requests), ANSWERS_AT_A_TIME):
            group = requests[start : start + ANSWERS_AT_A_TIME]
            texts += self._answer(group, start)
        return texts

    def _answer(self, requests: Sequence[Any], first: int) -> list[str]:
        """Return the answers to requests that are numbered from ``first`` on."""
        growing: list[GrowingAnswer] = []
        pending: list[PendingAnswer] = []
        for number, request in enumerate(requests, first):
            prompt, options = request.args
            sampling, stops = self._sampling_params(options)
            answer = self._growing_answer(prompt, sampling, number)
            growing.append(answer)
            wanted = PendingAnswer(stops)
            pending.append(wanted)

        def end_at_stop_strings() -> None:
            for answer, wanted in zip(growing, pending, strict=True):
                wanted.ids = answer.answer
                if not answer.finish and self._has_stop(wanted):
                    answer.finish = "string"

        grow_answers(self.passes, growing, end_at_stop_strings)
        texts: list[str] = []
        for wanted in pending:
            text = self._text_before_stop(wanted)
            texts.append(text)
        return texts

    def _growing_answer(
        self, prompt: str, sampling: SamplingParams, number: int
    ) -> GrowingAnswer:
        """Return an answer without tokens; its prompt loses its beginning where it is too long."""
        new_tokens = sampling.max_new_tokens
        assert new_tokens is not None
        room = self.context_length - new_tokens
        ids = self.tok_encode(prompt)[-room:]
        length = len(ids)
        stream = (sampling.seed, number)
        sampler = TokenSampler(sampling, stream)
        return GrowingAnswer(ids, length, length + new_tokens, sampler)


def _labels(pack: TextPack, requests: Sequence[ScoringRequest]) -> list[int]:
    """Return the target of each row of a pack: the last rows of each text have some."""
    labels = [IGNORE] * len(pack.tokens)
    for number, end in zip(pack.texts, pack.ends, strict=True):
        targets = requests[number].targets
        first = end + 1 - len(targets)
        labels[first : end + 1] = targets
    return labels


def _scores_of_pack(
    pack: TextPack,
    requests: Sequence[ScoringRequest],
    output: LossOutput,
) -> dict[int, TextScore]:
    losses = output.nll.double().tolist()
    correct = output.correct.tolist()
    scores: dict[int, TextScore] = {}
    for number, end in zip(pack.texts, pack.ends, strict=True):
        request = requests[number]
        stop = end + 1
        targets = slice(stop - len(request.targets), stop)
        total = -sum(losses[targets])
        is_greedy = all(correct[targets])
        score = TextScore(total, is_greedy)
        scores[request.number] = score
    return scores


class BenchmarkRunner:
    """Runs the tasks of ``data.evaluation``; every rank of the run takes part.

    Raises:
        UserError: a task or the tokenizer cannot be used.
    """

    def __init__(
        self, config: Config, stages: ModelStages, context: RunContext
    ) -> None:
        data = config.data
        section = data.evaluation
        assert section is not None and data.tokenizer_path is not None
        self.every = data.eval_every
        self.section = section
        self.module = stages.module
        self.grid = context.grid
        where = "data.evaluation.tasks"
        self.tasks = load_tasks(section.tasks, where)
        self.figures = figures_of(self.tasks.tasks.values())
        tokenizer = load_tokenizer(data.tokenizer_path, "data.tokenizer_path")
        vocab_size = config.model.vocab_size
        check_tokenizer_fits(tokenizer, vocab_size)
        self.model = RunHarnessModel(
            TextPasses(config, stages, context),
            tokenizer=tokenizer,
            eos_ids=end_of_answer_ids(tokenizer, config.generation, vocab_size),
            # As ``evomesh eval`` reads the checkpoint of the step.
            context_length=rotary_scaling(config.model, data.seq_len).max_position,
        )

    def facts(self) -> dict[str, str]:
        """Return what must be the same on all ranks: a hash of the examples of each task."""
        facts: dict[str, str] = {}
        for task in self.tasks.tasks.values():
            digest = hashlib.sha256()
            examples = islice(task.eval_docs, self.section.limit)
            for doc in examples:
                content = repr(doc).encode()
                digest.update(content)
            name = f"the data of task {task.config.task}"
            facts[name] = digest.hexdigest()[:12]
        return facts

    def scores(self) -> dict[str, float]:
        """Return the figures ``eval/TASK/METRIC`` of the weights as they are now, the same on all ranks."""
        section = self.section
        with evaluated(self.module, self.model.passes.device):
            results = score_tasks(
                self.model,
                self.tasks,
                section.num_fewshot,
                section.limit,
            )
        figures = task_figures(results)
        grid = self.grid
        for axis in (grid.pp, grid.dp, grid.tp):
            of_ranks = all_gather_objects(figures, axis)
            figures = of_ranks[0]
        return figures
