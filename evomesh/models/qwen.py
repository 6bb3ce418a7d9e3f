"""Qwen2 and Qwen2.5 (Yang et al., 2024), Qwen3 (2025): biases of queries, keys and values, or norms on their heads."""

from __future__ import annotations

from evomesh.models.llama import LLAMA

# config/families.py has the switches; initial weights are those of Llama.
QWEN2 = LLAMA
QWEN3 = LLAMA
