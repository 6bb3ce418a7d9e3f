"""Modules on local tensors: linear, embedding, norm, rotary, attention, mlp, loss, initial weights."""
