"""Baichuan2 7B (Yang et al., 2023): Llama with a head of normalized rows; its folders have q, k and v in one matrix."""

from __future__ import annotations

from evomesh.models.llama import LLAMA

# config/families.py has the switches; initial weights are those of Llama.
BAICHUAN2 = LLAMA
