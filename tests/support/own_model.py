"""Models as a user registers them: the example's, and one of the same blocks that can be cut into stages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from evomesh.config.schema import ModelConfig
from evomesh.layers.attention import AttentionFunction, SequenceBounds, attend
from evomesh.layers.dtype import parameter_dtype, promote
from evomesh.layers.init import InitialWeight
from evomesh.layers.placement import Placement
from evomesh.layers.rotary import RotaryEmbedding
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import model_initializer


def example() -> ModuleType:
    """The module of the example, imported once, as reading its config does."""
    path = Path(__file__).parents[2] / "examples/custom_model/parallel_blocks.py"
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


class StagedBlocks(LanguageModel):
    """Some of the example's blocks; the first stage has an embedding, the last a head. The loss is left out."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str, layers: range
    ) -> None:
        super().__init__()
        placement = Placement(
            dtype=parameter_dtype(config.dtype), device=torch.device(device)
        )
        self.rotary, self.dtype = (
            RotaryEmbedding(config.head_dim, config.rope_base),
            placement.dtype,
        )
        shape = config.vocab_size, config.hidden_size
        first, last = layers.start == 0, layers.stop == config.num_layers
        self.embedding = (
            nn.Embedding(*shape, dtype=placement.dtype, device=placement.device)
            if first
            else None
        )
        self.layers = nn.ModuleDict(
            {str(i): example().ParallelBlock(i, config, placement) for i in layers}
        )
        self.head = (
            nn.Linear(
                *reversed(shape),
                bias=False,
                dtype=placement.dtype,
                device=placement.device,
            )
            if last
            else None
        )

    def forward(
        self, x: Tensor, bounds: SequenceBounds, attend: AttentionFunction = attend
    ) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        tables = self.rotary.tables(bounds, self.dtype)
        for block in self.layers.values():
            x = block(x, tables, bounds, attend)
        return x

    def loss(self, *_: object, **__: object) -> object:  # type: ignore[override]
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        assert self.head is not None
        return self.head(hidden).to(promote(self.dtype))  # type: ignore[no-any-return]

    def initial(self, name: str) -> InitialWeight:
        return (
            InitialWeight("constant", 1.0)
            if "gain" in name or "norm" in name
            else InitialWeight("normal", 0.1)
        )


def staged_blocks(
    config: ModelConfig, *, device: torch.device | str, layer_range: range | None
) -> StagedBlocks:
    return StagedBlocks(config, device, layer_range or range(config.num_layers))


def register() -> None:
    """In this process, once more changes nothing."""
    model_initializer.register_module("PARALLEL_BLOCKS", example().build)
    model_initializer.register_module("STAGED_BLOCKS", staged_blocks)
