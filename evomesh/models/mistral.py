"""Mistral 7B (Jiang et al., 2023) and later: Llama with a window or without, and with a free head width."""

from __future__ import annotations

from evomesh.models.llama import LLAMA

# config/families.py has the switches; initial weights are those of Llama.
MISTRAL = LLAMA
