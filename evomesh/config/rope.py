"""The ``model.rope_scaling`` section: how rotary angles differ from the plain ones, whatever the length of a text.

Dynamic NTK, which depends on the length, is ``model.use_dynamic_ntk_rope``;
``type="dynamic"`` is read as that.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evomesh.config.section import Section

RopeType = Literal["linear", "llama3", "yarn", "longrope"]


class RopeScaling(Section):
    type: RopeType = Field(
        description="linear, llama3, yarn or longrope; dynamic sets model.use_dynamic_ntk_rope; default: no scaling."
    )
    factor: float | None = Field(
        None,
        ge=1,
        description="How many times longer texts may be; longrope may leave it out: "
        "max_position_embeddings over original_max_position_embeddings.",
    )
    original_max_position_embeddings: int | None = Field(
        None, ge=1, description="Length before the extension (llama3, yarn, longrope)."
    )
    low_freq_factor: float | None = Field(
        None,
        gt=0,
        description="llama3: frequencies of fewer turns than this within the original length are divided by factor.",
    )
    high_freq_factor: float | None = Field(
        None,
        gt=0,
        description="llama3: frequencies of more turns than this stay as they are.",
    )
    beta_fast: float | None = Field(
        None,
        gt=0,
        description="yarn: frequencies of more turns than this stay as they are; None: 32.",
    )
    beta_slow: float | None = Field(
        None,
        gt=0,
        description="yarn: frequencies of fewer turns than this are divided by factor; None: 1.",
    )
    attention_factor: float | None = Field(
        None,
        gt=0,
        description="yarn, longrope: multiplies queries and keys; None: from factor, as the papers suggest.",
    )
    mscale: float | None = Field(
        None,
        gt=0,
        description="yarn: numerator of attention_factor, together with mscale_all_dim.",
    )
    mscale_all_dim: float | None = Field(
        None,
        gt=0,
        description="yarn: denominator of attention_factor, together with mscale.",
    )
    truncate: bool | None = Field(
        None,
        description="yarn: round the bounds of the ramp to whole frequencies; None: True.",
    )
    short_factor: tuple[float, ...] | None = Field(
        None,
        description="longrope: divisor of each frequency in texts of up to the original length.",
    )
    long_factor: tuple[float, ...] | None = Field(
        None, description="longrope: divisor of each frequency in longer texts."
    )


# Keys that a type needs, and those that it may have.
REQUIRED: dict[RopeType, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
OPTIONAL: dict[RopeType, tuple[str, ...]] = {
    "linear": (),
    "llama3": (),
    "yarn": (
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor"),
}


def scaling_problems(scaling: RopeScaling, head_dim: int) -> list[tuple[str, str, str]]:
    """Return (key, what was found, what was expected) of keys that a type lacks, does not know, or cannot use."""
    required = REQUIRED[scaling.type]
    known = (*required, *OPTIONAL[scaling.type])
    values = scaling.model_dump(exclude={"type"}, exclude_none=True)
    problems = [
        (key, f"type {scaling.type!r} needs it", f"{key}=...")
        for key in required
        if key not in values
    ]
    for key in values:
        if key not in known:
            problems.append(
                (
                    key,
                    f"has no meaning for type {scaling.type!r}",
                    f"some of {', '.join(known)}",
                )
            )
    # Between the two the angles are interpolated, by (turns - low) / (high - low).
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    if low is not None and high is not None and low >= high:
        problems.append(
            (
                "low_freq_factor",
                f"{low:g} is not below high_freq_factor={high:g}",
                "a smaller one",
            )
        )
    for key in ("short_factor", "long_factor"):
        divisors = values.get(key)
        if divisors is None:
            continue
        if len(divisors) != head_dim // 2 or min(divisors) <= 0:
            problems.append(
                (
                    key,
                    f"found {len(divisors)} numbers",
                    f"{head_dim // 2} positive ones: one a frequency",
                )
            )
    return problems
