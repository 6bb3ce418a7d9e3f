"""OLMo 2 (Team OLMo, 2024): norms after attention and feed-forward network, and over all query (key) heads together."""

from __future__ import annotations

from evomesh.models.llama import LLAMA

# config/families.py has the switches; initial weights are those of Llama.
OLMO2 = LLAMA
