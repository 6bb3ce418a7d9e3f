"""``data.samples`` and ``data.evaluation``: what a run writes and answers while it trains."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from evomesh.config.section import Section


def _parse_texts(value: Any) -> Any:
    """Return a list as a tuple, and one text as a tuple of it."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_parse_texts)]


class SamplesConfig(Section):
    """``data.samples``."""

    prompts: Texts = Field(
        description="Texts that the model continues every sample_every steps, and at the end."
    )
    max_new_tokens: int = Field(
        64, ge=1, description="Maximum number of new tokens of an answer."
    )
    temperature: float = Field(
        0.0, ge=0, description="Sampling temperature; 0: greedy."
    )
    top_k: int = Field(
        0, ge=0, description="Sample from this many of the most likely tokens; 0: all."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample from the fewest top tokens whose probability reaches this.",
    )
    seed: int = Field(
        1024,
        ge=0,
        description="Sampling seed, the same at every step; apart from the seed of the training.",
    )


class EvaluationConfig(Section):
    """``data.evaluation``."""

    tasks: Texts = Field(
        description="Task files (.yaml) or names of tasks of lm-evaluation-harness, as for evomesh eval."
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples before each question; None: the task's."
    )
    limit: int | None = Field(
        None, ge=1, description="Evaluate at most this many examples per task."
    )
