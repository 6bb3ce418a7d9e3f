"""Questions to the model in training: prompts (``data.samples``) and benchmark tasks (``data.evaluation``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomesh.config.schema import Config
from evomesh.outside_errors import not_installed
from evomesh.parallel.exchange import Exchange
from evomesh.train.agreement import require_agreement
from evomesh.train.early_stop import EarlyStop
from evomesh.train.launch import RunContext
from evomesh.train.samples import PromptSample, PromptSampler
from evomesh.train.stages import ModelStages

if TYPE_CHECKING:
    from evomesh.train.benchmarks import BenchmarkRunner


class ModelQuestions:
    """Prompts and benchmark tasks, each every some steps and at the end; every rank of the run takes part.

    Raises:
        UserError: a prompt, a task or the tokenizer cannot be used, or ranks have other data for a task.
    """

    def __init__(
        self,
        config: Config,
        stages: ModelStages,
        context: RunContext,
        exchange: Exchange,
    ) -> None:
        self.data = config.data
        self.samples: PromptSampler | None = None
        self.benchmarks: BenchmarkRunner | None = None
        if config.data.sample_every > 0:
            self.samples = PromptSampler(config, stages, context)
        if config.data.eval_every > 0:
            self.benchmarks = _benchmark_runner(config, stages, context)
            require_agreement(exchange, self.benchmarks.facts())

    @property
    def figures(self) -> Mapping[str, bool]:
        """The figures of the tasks, and whether a higher value is better."""
        return {} if self.benchmarks is None else self.benchmarks.figures

    def are_due(self, step: int, early_stop: EarlyStop) -> bool:
        """Return whether anything is asked after ``step`` steps."""
        every = (self.data.sample_every, self.data.eval_every)
        return any(self._is_due(one, step, early_stop) for one in every)

    def _is_due(self, every: int, step: int, early_stop: EarlyStop) -> bool:
        if every <= 0:
            return False
        is_last = step == self.data.total_steps or early_stop.is_due
        return step % every == 0 or is_last

    def ask(
        self,
        step: int,
        early_stop: EarlyStop,
    ) -> tuple[dict[str, float], list[PromptSample]]:
        """Return the figures of the tasks and the answers to the prompts, of those that are due."""
        scores: dict[str, float] = {}
        eval_every = self.data.eval_every
        if self.benchmarks and self._is_due(eval_every, step, early_stop):
            scores = self.benchmarks.scores()
            early_stop.after_validation(scores)
        # After the benchmarks, which may have made this step the last one.
        samples: list[PromptSample] = []
        sample_every = self.data.sample_every
        if self.samples and self._is_due(sample_every, step, early_stop):
            samples = self.samples.answers()
        return scores, samples


def _benchmark_runner(
    config: Config, stages: ModelStages, context: RunContext
) -> BenchmarkRunner:
    if importlib.util.find_spec("lm_eval") is None:
        raise not_installed("lm-evaluation-harness", "eval", where="data.eval_every")
    # Imports the harness, which takes seconds.
    from evomesh.train.benchmarks import BenchmarkRunner

    return BenchmarkRunner(config, stages, context)
