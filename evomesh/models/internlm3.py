"""InternLM3 (2025): Llama with a free head width, and separate switches for biases of the inputs of attention."""

from __future__ import annotations

from dataclasses import replace

from evomesh.models.internlm2 import INTERNLM2

# config/families.py has the switches; initial weights are those of InternLM2, the class
# that InternEvo builds it with.
INTERNLM3 = replace(INTERNLM2, post_norm=False)
