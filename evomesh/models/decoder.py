"""The decoder that all built-in families share: plain algebra on one packed sequence.

Shapes: T packed tokens, D model, V vocabulary rows.

A pipeline stage is this model with parts absent; parameter names keep the global layer
index.

How each weight is sharded (rows are dim 0, the output features); docs/parallelism.md
shows what the modes communicate:

    weight                            mtp, msp, fsp                 isp
    layers.N.attention.wqkv           rows over tp, by kv head      rows over wp
    layers.N.attention.wo             columns over tp               rows over wp
    layers.N.feed_forward.w1, w3      rows over tp                  rows over wp
    layers.N.feed_forward.w2          columns over tp               rows over wp
    bias of wqkv, w1, w3              over tp                       over wp
    bias of wo, w2, norms of blocks   replicated                    over wp; norms wider than their block replicated
    attention.q_norm, k_norm          replicated; over tp where they norm all heads together     over wp
    embedding                         vocabulary over tp, or hidden size with embed_split_hidden
    head                              vocabulary over tp
    norm (the last one)               replicated
    embedding and head, tied          one weight [V, D]: vocabulary over tp

With fsdp all but the last norm and a tied embedding are sharded along dim 0 over the
zero axis too, where its size divides the dim. Sharded over wp or zero, weights are
gathered before their block computes.

A tied weight has one name, ``embedding.weight``. The first and the last stage of a
pipeline both hold it; each has a summand of its gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evomesh.config.schema import ModelConfig
from evomesh.layers.attention import (
    Attention,
    AttentionFunction,
    SequenceBounds,
    attend,
    outside_graph,
)
from evomesh.layers.block_softmax import LossTerms
from evomesh.layers.compiler import compiles_blocks
from evomesh.layers.dropout import (
    ATTENTION_OUTPUT,
    EMBEDDING,
    FEED_FORWARD_OUTPUT,
    drop_columns,
)
from evomesh.layers.dtype import parameter_dtype, promote
from evomesh.layers.embedding import Embedding, scale_gradient
from evomesh.layers.init import InitialWeight
from evomesh.layers.linear import ColumnParallelLinear
from evomesh.layers.loss import LossOutput, linear_cross_entropy, soft_cap
from evomesh.layers.mlp import FeedForward
from evomesh.layers.norm import Norm
from evomesh.layers.placement import Placement
from evomesh.layers.products import linear
from evomesh.layers.rotary import RotaryEmbedding
from evomesh.layers.scores import ScoreRule
from evomesh.models.family import DecoderFamily
from evomesh.models.initial_weights import initial_weight
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.collectives import gather_from_axis
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES, TensorMode
from evomesh.parallel.spec import spec_of, with_spec


class DecoderBlock(nn.Module):
    """[T, D] -> [T, D]: x + attention(norm(x)), then x + feed_forward(norm(x)).

    ``config.norm_placement`` puts the norms elsewhere:

        before    x + f(norm(x))           Llama and most others
        after     x + norm(f(x))           OLMo 2
        both      x + norm(f(norm(x)))     Gemma 2 and 3
        post_norm       norm(x + f(x))     InternLM2 with ``apply_post_layer_norm``

    ``drop_rate`` drops elements of what is added to x.
    """

    def __init__(
        self, layer: int, config: ModelConfig, *, post_norm: bool, placement: Placement
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm_placement = config.norm_placement
        self.drop_rate = config.drop_rate
        self.axis = placement.axis
        self.attention = Attention(
            layer,
            config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.kv_heads,
            bias=config.has_qkv_bias,
            interleaved=config.qk_interleaved,
            placement=placement,
            head_dim=config.head_dim,
            out_bias=config.has_o_bias,
            qk_norms=_qk_norms(config, placement) if config.qk_norm else None,
            window=config.window_of(layer),
            rotates=config.rotates(layer),
            scores=ScoreRule.of(config),
            drop_rate=config.attn_drop_rate,
        )
        self.uses_local_base = config.uses_local_rope_base(layer)
        self.attention_norm = make_norm(config, placement)
        self.feed_forward = FeedForward(
            config.hidden_size,
            config.mlp_width,
            swiglu=config.use_swiglu,
            activation=config.gate_activation,
            placement=placement,
            bias=config.mlp_bias,
        )
        self.ffn_norm = make_norm(config, placement)
        if config.norm_placement == "both":
            self.attention_out_norm = make_norm(config, placement)
            self.ffn_out_norm = make_norm(config, placement)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bounds: SequenceBounds,
        attend: AttentionFunction,
    ) -> Tensor:
        def drop(branch: Tensor, site: int) -> Tensor:
            rank = self.axis.rank
            return drop_columns(branch, self.drop_rate, bounds.numbers, site, rank)

        out: Tensor
        # The norm acts on the sum: nothing passes a block unchanged.
        if self.post_norm:
            attended = self.attention(x, tables, bounds, attend)
            x = self.attention_norm(x + drop(attended, ATTENTION_OUTPUT))
            fed_forward = self.feed_forward(x)
            out = self.ffn_norm(x + drop(fed_forward, FEED_FORWARD_OUTPUT))
            return out
        if self.norm_placement == "after":
            attended = self.attention(x, tables, bounds, attend)
            x = x + drop(self.attention_norm(attended), ATTENTION_OUTPUT)
            fed_forward = self.ffn_norm(self.feed_forward(x))
            out = x + drop(fed_forward, FEED_FORWARD_OUTPUT)
            return out
        # x is the residual stream, to which both branches add; "both" norms what they add
        # as well.
        attended = self.attention(self.attention_norm(x), tables, bounds, attend)
        if self.norm_placement == "both":
            attended = self.attention_out_norm(attended)
        x = x + drop(attended, ATTENTION_OUTPUT)
        fed_forward = self.feed_forward(self.ffn_norm(x))
        if self.norm_placement == "both":
            fed_forward = self.ffn_out_norm(fed_forward)
        out = x + drop(fed_forward, FEED_FORWARD_OUTPUT)
        return out


def make_norm(config: ModelConfig, placement: Placement) -> Norm:
    return Norm(
        config.norm_type,
        config.hidden_size,
        eps=config.layer_norm_epsilon,
        fp32_weight=config.use_fp32_norm,
        placement=placement,
        offset=config.add_unit_offset,
    )


def _qk_norms(config: ModelConfig, placement: Placement) -> tuple[Norm, Norm]:
    """Return the norms of queries and of keys, each over the width of a head or of all of them."""
    # One weight for the width of a head, which all heads share; or one for all heads
    # together, of which tensor parallelism gives each rank its heads' columns.
    of_heads = config.qk_norm_over == "head"
    query_norm, key_norm = (
        Norm(
            "rmsnorm",
            width,
            eps=config.layer_norm_epsilon,
            fp32_weight=config.use_fp32_norm,
            placement=placement,
            offset=config.add_unit_offset,
            of_heads=of_heads,
            sharded=not of_heads,
        )
        for width in config.qk_norm_widths
    )
    return query_norm, key_norm


class OutputHead(nn.Module):
    """The output projection [V, D]: the loss of hidden states, or their logits.

    Training reads the weight inside ``forward`` only, because weight sharding gathers
    it for the forward of a module.

    Args:
        tied_to: the weight of the embedding, with ``tie_word_embeddings``; else None.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        placement: Placement,
        tied_to: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.placement = placement
        if tied_to is not None:
            self.weight = tied_to
            return
        self.weight = ColumnParallelLinear(
            config.hidden_size, rows, bias=False, placement=placement
        ).weight

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        grad_scale: float | Tensor,
        terms: LossTerms,
    ) -> LossOutput:
        return linear_cross_entropy(
            self._gathered(hidden),
            self._effective_weight(),
            labels,
            vocab_size=self.config.vocab_size,
            grad_scale=grad_scale,
            label_smoothing=terms.label_smoothing,
            z_loss_coeff=terms.z_loss_coeff,
            softcap=self.config.final_logit_softcapping,
            axis=self.placement.axis,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        shard = linear(self._gathered(hidden), self._effective_weight())  # [T, V / tp]
        logits = gather_from_axis(shard, self.placement.axis, dim=1)
        unpadded = logits[:, : self.config.vocab_size]
        wide = unpadded.to(promote(self.placement.dtype))
        softcap = self.config.final_logit_softcapping
        return wide if softcap is None else soft_cap(wide, softcap)

    def _gathered(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of the whole sequence, [T, D], in the dtype of the weight.

        With muP they are divided by the multiple of the base width, and so are the logits.
        """
        multiplier = self.config.width_multiplier
        if multiplier != 1:
            hidden = hidden / multiplier
        return self.placement.gather_sequence(hidden.to(self.placement.dtype))

    def _effective_weight(self) -> Tensor:
        """Return the weight with its gradient scaled like the embedding's.

        Its rows are normalized with ``norm_head``.
        """
        weight = scale_gradient(self.weight, self.config.embed_grad_scale)
        if self.config.norm_head:
            # In every forward pass, since the optimizer changes the rows' lengths.
            dtype = self.placement.dtype
            wide = weight.to(promote(dtype))
            weight = F.normalize(wide, dim=1).to(dtype)
        return weight


class Decoder(LanguageModel):
    """Token ids [T] (or the previous stage's hidden states [T, D]) -> hidden states [T, D]; then loss or logits.

    Args:
        family: one of ``models/{internlm,internlm2,llama}.py``.
        layer_range: global indices of this stage's layers; None for all. The stage that starts at 0 has the embedding,
            the one that ends at ``num_layers`` has the last norm and the head, and with tied weights the embedding too,
            which only the head uses there.
    """

    def __init__(
        self,
        config: ModelConfig,
        family: DecoderFamily,
        *,
        grid: Grid | None = None,
        mode: TensorMode = MODES["mtp"],
        device: torch.device | str = "cpu",
        layer_range: range | None = None,
    ) -> None:
        super().__init__()
        layers = layer_range
        if layers is None:
            layers = range(config.num_layers)
        self.config = config
        self.family = family
        self.dtype = parameter_dtype(config.dtype)
        self.post_norm = family.post_norm and config.apply_post_layer_norm
        self.rotary = RotaryEmbedding(
            config.head_dim,
            config.rope_base,
            dynamic_ntk=config.use_dynamic_ntk_rope,
            max_position=config.max_position_embeddings,
            factor=config.rope_scaling_factor,
            scaling=config.rope_scaling,
        )
        self.local_rotary: RotaryEmbedding | None = None
        if config.local_rope_base is not None:
            self.local_rotary = RotaryEmbedding(config.head_dim, config.local_rope_base)
        axis = (grid or Grid()).tp
        self.placement = placement = Placement(
            axis, mode, self.dtype, torch.device(device)
        )
        # The vocabulary is padded to a multiple of the axis size, so that all ranks
        # hold equally many rows: 32,001 over 2 ranks become 16,001 and 16,001.
        rows = -(-config.vocab_size // axis.size) * axis.size
        padding = rows - config.vocab_size
        # A stage of a pipeline has some layers, and of the ends what it needs.
        self.is_first = layers.start == 0
        is_last = layers.stop == config.num_layers
        self.embedding: Embedding | None = None
        if self.is_first or (is_last and config.tie_word_embeddings):
            self.embedding = self._build_embedding(rows, padding)
        self.layers = nn.ModuleDict()
        for i in layers:
            self.layers[str(i)] = DecoderBlock(
                i, config, post_norm=self.post_norm, placement=placement
            )
        self.norm: Norm | None = None
        self.head: OutputHead | None = None
        if is_last:
            self.norm = self._build_last_norm()
            self.head = self._build_head(rows, padding)
        self.compiled = compiles_blocks(config.compile, placement.device)
        if self.compiled:
            for block in self.layers.values():
                block.compile()

    def _build_embedding(self, rows: int, padding: int) -> Embedding:
        embedding = Embedding(
            rows,
            self.config.hidden_size,
            grad_scale=self.config.embed_grad_scale,
            split_hidden=self.config.embed_split_hidden,
            scale=self.config.hidden_size**0.5 if self.config.scale_embeddings else 1.0,
            placement=self.placement.on_tensor_axis(),
        )
        _mark_padding(embedding.weight, padding)
        return embedding

    def _build_last_norm(self) -> Norm | None:
        """Return the norm before the head; with ``post_norm`` the last block ends with one."""
        if self.post_norm:
            return None
        return make_norm(self.config, self.placement.on_tensor_axis())

    def _build_head(self, rows: int, padding: int) -> OutputHead:
        # In the last stage of a pipeline the embedding is there for its weight alone.
        tied_to = self.embedding_weight if self.config.tie_word_embeddings else None
        placement = self.placement.on_tensor_axis()
        head = OutputHead(self.config, rows, placement, tied_to=tied_to)
        _mark_padding(head.weight, padding)
        return head

    @property
    def embedding_weight(self) -> nn.Parameter:
        """Return the weight of the embedding, which a middle stage does not have."""
        assert self.embedding is not None
        return self.embedding.weight

    def share_embedding(self, weight: nn.Parameter) -> None:
        """Take the tied weight of another stage on this rank for embedding and head."""
        for module in (self.embedding, self.head):
            if module is not None:
                module.weight = weight

    @property
    def recomputed_layers(self) -> int:
        """Return how many of this stage's first layers recompute their activations.

        These discard them in the forward pass and compute them again in backward.
        """
        # Rounded first, so that 10 * 0.3 counts as 3 whatever its last binary digit.
        layers = round(len(self.layers) * self.config.checkpoint, 9)
        if self.family.recompute_rounding == "ceil":
            return math.ceil(layers)
        return math.floor(layers)

    def forward(
        self, x: Tensor, bounds: SequenceBounds, attend: AttentionFunction = attend
    ) -> Tensor:
        if self.is_first:
            assert self.embedding is not None
            x = drop_columns(
                self.embedding(x),
                self.config.drop_rate,
                bounds.numbers,
                EMBEDDING,
                self.placement.axis.rank,
            )
            if self.config.residual_in_fp32:
                x = x.to(promote(self.dtype))
        if self.compiled:
            attend = outside_graph(attend)
        tables = self.rotary.tables(bounds, self.dtype)
        local_tables = tables
        if self.local_rotary is not None:
            local_tables = self.local_rotary.tables(bounds, self.dtype)
        recomputed = self.recomputed_layers if torch.is_grad_enabled() else 0
        for i, (layer, block) in enumerate(self.layers.items()):
            layer_bounds = bounds.at_layer(int(layer))
            angles = local_tables if block.uses_local_base else tables
            if i < recomputed:
                # Dropout masks are numbers of a counter: no random state to restore.
                x = checkpoint(
                    block,
                    x,
                    angles,
                    layer_bounds,
                    attend,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = block(x, angles, layer_bounds, attend)
        return x if self.norm is None else self.norm(x)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        grad_scale: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
        z_loss_coeff: float = 0.0,
    ) -> LossOutput:
        """Sum the token losses of ``hidden`` [T, D] against ``labels`` [T] int64; see ``layers/loss.py``."""
        output: LossOutput = self._require_head()(
            hidden, labels, grad_scale, LossTerms(label_smoothing, z_loss_coeff)
        )
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Map [T, D] to [T, vocab_size] in at least float32, for generation; padded rows are left out."""
        return self._require_head().logits(hidden)

    def _require_head(self) -> OutputHead:
        if self.head is None:
            raise ValueError("this pipeline stage has no output head")
        return self.head

    def initial(self, name: str) -> InitialWeight:
        """Return the distribution of the initial values of the parameter with this global name."""
        return initial_weight(name, self.config, self.family)


def _mark_padding(weight: nn.Parameter, padding: int) -> None:
    """Record in the weight's spec that its last ``padding`` rows are not tokens."""
    with_spec(weight, replace(spec_of(weight), padding=padding))
