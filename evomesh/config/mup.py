"""``model.mup``: widths of which learning rate and initial weights stay right (muP; Yang et al., arXiv 2203.03466).

docs/recipes.md has the table of what is scaled. A model of the base width is the same
with and without it.
"""

from __future__ import annotations

from pydantic import Field

from evomesh.config.section import Section


class MupConfig(Section):
    base_hidden_size: int | None = Field(
        None,
        ge=1,
        description="Width at which learning rate and initial weights were chosen; None: they are taken as they are.",
    )
    base_head_dim: int | None = Field(
        None,
        ge=1,
        description="Width of a head there; None: head_dim, as where a wider model has more heads.",
    )

    @property
    def is_on(self) -> bool:
        return self.base_hidden_size is not None
