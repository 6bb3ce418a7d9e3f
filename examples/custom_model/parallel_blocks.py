"""A custom model: attention and feed-forward side by side, added with a learned gain for each feature.

Shapes: T packed tokens, D model, V vocabulary.

The parts that it does not change come from ``evomesh``, whose files stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomesh import (
    Attention,
    AttentionFunction,
    Embedding,
    FeedForward,
    InitialWeight,
    LanguageModel,
    LossOutput,
    ModelConfig,
    Norm,
    Placement,
    RotaryEmbedding,
    SequenceBounds,
    attend,
    linear_cross_entropy,
    parameter_dtype,
)


class ParallelBlock(nn.Module):
    """[T, D] -> [T, D]: x + gain * (attention(norm(x)) + feed_forward(norm(x)))."""

    def __init__(self, layer: int, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.norm = Norm(
            "rmsnorm",
            config.hidden_size,
            eps=config.layer_norm_epsilon,
            fp32_weight=False,
            placement=placement,
        )
        self.attention = Attention(
            layer,
            config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.kv_heads,
            bias=False,
            interleaved=False,
            placement=placement,
        )
        self.feed_forward = FeedForward(
            config.hidden_size,
            config.mlp_width,
            swiglu=config.use_swiglu,
            placement=placement,
        )
        self.gain = nn.Parameter(
            torch.empty(
                config.hidden_size, dtype=placement.dtype, device=placement.device
            )
        )

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bounds: SequenceBounds,
        attend: AttentionFunction,
    ) -> Tensor:
        h = self.norm(x)
        return x + self.gain * (
            self.attention(h, tables, bounds, attend) + self.feed_forward(h)
        )


class ParallelBlocks(LanguageModel):
    """One matrix is both embedding and output head.

    Args:
        first_gain: initial value of every gain.
    """

    def __init__(
        self, config: ModelConfig, first_gain: float, device: torch.device | str
    ) -> None:
        super().__init__()
        placement = Placement(
            dtype=parameter_dtype(config.dtype), device=torch.device(device)
        )
        self.config, self.first_gain, self.dtype = config, first_gain, placement.dtype
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_base)
        self.embedding = Embedding(
            config.vocab_size,
            config.hidden_size,
            grad_scale=1.0,
            split_hidden=False,
            placement=placement,
        )
        self.layers = nn.ModuleDict(
            {
                str(i): ParallelBlock(i, config, placement)
                for i in range(config.num_layers)
            }
        )
        self.norm = Norm(
            "rmsnorm",
            config.hidden_size,
            eps=config.layer_norm_epsilon,
            fp32_weight=False,
            placement=placement,
        )

    def forward(
        self, x: Tensor, bounds: SequenceBounds, attend: AttentionFunction = attend
    ) -> Tensor:
        x = self.embedding(x)
        tables = self.rotary.tables(bounds, self.dtype)
        for block in self.layers.values():
            x = block(x, tables, bounds, attend)
        return self.norm(x)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        grad_scale: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
        z_loss_coeff: float = 0.0,
    ) -> LossOutput:
        return linear_cross_entropy(
            hidden,
            self.embedding.weight,
            labels,
            vocab_size=self.config.vocab_size,
            grad_scale=grad_scale,
            label_smoothing=label_smoothing,
            z_loss_coeff=z_loss_coeff,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.embedding.weight)
        return logits.to(torch.promote_types(self.dtype, torch.float32))

    def initial(self, name: str) -> InitialWeight:
        if name.endswith("gain"):
            return InitialWeight("constant", self.first_gain)
        return (
            InitialWeight("constant", 1.0)
            if "norm" in name
            else InitialWeight("normal", 0.02)
        )


def build(
    config: ModelConfig, *, device: torch.device | str, first_gain: float = 1.0
) -> ParallelBlocks:
    """Build the model; the config registers this function. The config's ``model`` section sets ``first_gain``."""
    return ParallelBlocks(config, first_gain, device)
