"""evomesh trains decoder language models, from one laptop CPU to a thousand GPUs.

The names below are the public API: whatever is imported from deeper inside may move
between releases. A name is imported when it is first used, so ``import evomesh`` loads
neither torch nor anything else.

No public name is that of a subpackage: ``evomesh.train`` and ``evomesh.generate``
become those packages once anything imports them, and would hide a function of the same
name. Hence ``run_training`` and ``generate_tokens``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_HOMES = {
    # Configs and training.
    "LoadedConfig": "evomesh.config.loader",
    "load_config": "evomesh.config.loader",
    "run_training": "evomesh.train.main",
    "ConfigError": "evomesh.errors",
    "UserError": "evomesh.errors",
    # Trained models and generation.
    "LoadedModel": "evomesh.checkpoint.restore",
    "load_model": "evomesh.checkpoint.restore",
    "encode_prompt": "evomesh.data.tokenizer",
    "SamplingParams": "evomesh.generate.options",
    "StreamedToken": "evomesh.generate.decode",
    "generate_tokens": "evomesh.generate.decode",
    "stream_tokens": "evomesh.generate.decode",
    "GenerationEngine": "evomesh.generate.engine",
    # Extensions.
    "register_loader": "evomesh.checkpoint.loaders",
    "register_model": "evomesh.models.registry",
    "register_tracker": "evomesh.config.trackers",
    # Watching a run.
    "AlertCenter": "evomesh.monitor.alerts.center",
    # Building blocks of custom models.
    "ModelConfig": "evomesh.config.model",
    "Attention": "evomesh.layers.attention",
    "AttentionFunction": "evomesh.layers.attention",
    "attend": "evomesh.layers.attention",
    "parameter_dtype": "evomesh.layers.dtype",
    "Embedding": "evomesh.layers.embedding",
    "InitialWeight": "evomesh.layers.init",
    "LossOutput": "evomesh.layers.loss",
    "linear_cross_entropy": "evomesh.layers.loss",
    "FeedForward": "evomesh.layers.mlp",
    "Norm": "evomesh.layers.norm",
    "Placement": "evomesh.layers.placement",
    "RotaryEmbedding": "evomesh.layers.rotary",
    "SequenceBounds": "evomesh.layers.sequence_bounds",
    "LanguageModel": "evomesh.models.language_model",
}

# Type checkers and editors read a literal list and plain imports;
# tests/unit/test_public_api.py compares all three.
__all__ = [
    "AlertCenter", "Attention", "AttentionFunction", "ConfigError", "Embedding", "FeedForward", "GenerationEngine",
    "InitialWeight", "LanguageModel", "LoadedConfig", "LoadedModel", "LossOutput", "ModelConfig", "Norm", "Placement",
    "RotaryEmbedding", "SamplingParams", "SequenceBounds", "StreamedToken", "UserError", "attend", "encode_prompt",
    "generate_tokens", "linear_cross_entropy", "load_config", "load_model", "parameter_dtype", "register_loader",
    "register_model", "register_tracker", "run_training", "stream_tokens",
]  # fmt: skip

if TYPE_CHECKING:
    from evomesh.checkpoint.loaders import register_loader
    from evomesh.checkpoint.restore import LoadedModel, load_model
    from evomesh.config.loader import LoadedConfig, load_config
    from evomesh.config.model import ModelConfig
    from evomesh.config.trackers import register_tracker
    from evomesh.data.tokenizer import encode_prompt
    from evomesh.errors import ConfigError, UserError
    from evomesh.generate.decode import StreamedToken, generate_tokens, stream_tokens
    from evomesh.generate.engine import GenerationEngine
    from evomesh.generate.options import SamplingParams
    from evomesh.layers.attention import Attention, AttentionFunction, attend
    from evomesh.layers.dtype import parameter_dtype
    from evomesh.layers.embedding import Embedding
    from evomesh.layers.init import InitialWeight
    from evomesh.layers.loss import LossOutput, linear_cross_entropy
    from evomesh.layers.mlp import FeedForward
    from evomesh.layers.norm import Norm
    from evomesh.layers.placement import Placement
    from evomesh.layers.rotary import RotaryEmbedding
    from evomesh.layers.sequence_bounds import SequenceBounds
    from evomesh.models.language_model import LanguageModel
    from evomesh.models.registry import register_model
    from evomesh.monitor.alerts.center import AlertCenter
    from evomesh.train.main import run_training
else:  # hidden from type checkers, which would take every name for an existing one

    def __getattr__(name: str) -> object:
        """Import a public name from its home."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names too, imported or not."""
    return sorted({*globals(), *__all__})
