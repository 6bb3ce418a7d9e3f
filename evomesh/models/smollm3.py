"""SmolLM3 (Bakouch et al., 2025): Llama whose every fourth layer has no rotary positions (Yang et al., 2025)."""

from __future__ import annotations

from evomesh.models.llama import LLAMA

# config/families.py has the switches; initial weights are those of Llama.
SMOLLM3 = LLAMA
