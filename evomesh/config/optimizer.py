"""``optimizer``: the rule that updates the weights. Learning rate and weight decay of every rule are in ``adam``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evomesh.config.section import Section

OptimizerType = Literal["adamw", "muon", "lion"]


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
