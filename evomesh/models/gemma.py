"""Gemma 1, 2 and 3 (Gemma Team, 2024 and 2025): scaled embeddings, norms by 1 + w, GeGLU; then windows and caps."""

from __future__ import annotations

from evomesh.models.llama import LLAMA

# config/families.py has the switches; initial weights are those of Llama.
GEMMA = LLAMA
