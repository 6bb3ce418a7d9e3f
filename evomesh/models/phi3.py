"""Phi-3 (Abdin et al., 2024): Llama with a window; in its folders q, k and v are one matrix, gate and up another."""

from __future__ import annotations

from evomesh.models.llama import LLAMA

# config/families.py has the switches; initial weights are those of Llama.
PHI3 = LLAMA
