"""evomesh trains decoder language models, from one laptop CPU to a thousand GPUs."""

__version__ = "0.1.0"
