"""``optimizer``: the rule that updates the weights. Learning rate and weight decay of every rule are in ``adam``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from evomesh.config.finding import ConfigFinding
from evomesh.config.section import Section

OptimizerType = Literal["adamw", "muon", "lion", "schedule_free"]


class EmaConfig(Section):
    """``optimizer.ema``: an average of the weights beside them."""

    decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the average that stays when weights are averaged in, such as 0.999; None: no average.",
    )
    every: int = Field(
        1, ge=1, description="Optimizer steps from one averaging to the next."
    )
    validation: bool = Field(
        False, description="Validate the averaged weights too, as val/NAME.ema_loss."
    )

    @property
    def validates(self) -> bool:
        """Return whether there is an average that is validated."""
        return self.validation and self.decay is not None


class OptimizerConfig(Section):
    type: OptimizerType = Field(
        "adamw",
        description='Rule that updates the weights; "muon" updates the matrices of the blocks, and leaves embedding, '
        "head, norms and biases to AdamW.",
    )
    momentum: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="Decay of Muon's momentum; Lion takes adam's betas.",
    )
    nesterov: bool = Field(
        True, description="Muon looks one step of its momentum ahead (Nesterov)."
    )
    ns_steps: int = Field(
        5,
        ge=1,
        le=20,
        description="Newton-Schulz iterations that orthogonalize an update of Muon.",
    )
    ns_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Dtype of Muon's Newton-Schulz iterations; a float64 model computes them in float64.",
    )
    ema: EmaConfig = Field(
        EmaConfig(), description="Exponential moving average of the weights."
    )


def optimizer_findings(
    config: OptimizerConfig, beta1: float
) -> Iterator[ConfigFinding]:
    """Yield what does not go together with an update rule that averages by itself."""
    if config.type != "schedule_free":
        return
    if beta1 == 0:
        yield ConfigFinding(
            ("adam.adam_beta1", "optimizer.type"),
            "0 leaves no average in Schedule-Free AdamW",
            expected="a number > 0",
            fix="adam.adam_beta1=0.9",
            code="EVO-CONFIG-007",
        )
    if config.ema.decay is not None:
        yield ConfigFinding(
            ("optimizer.ema.decay", "optimizer.type"),
            "Schedule-Free AdamW averages the weights already",
            fix="leave out optimizer.ema, or choose another optimizer.type",
            code="EVO-CONFIG-007",
        )
