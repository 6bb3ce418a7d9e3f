"""The stock Llama of transformers with the weights of one of our models: nothing of our converters is in it."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from evomesh.config.schema import ModelConfig
from evomesh.models.language_model import LanguageModel


def stock_llama(
    model: LanguageModel, config: ModelConfig, **rope: object
) -> transformers.LlamaForCausalLM:
    """Args:
    config: of ``model``, without attention biases and with half-split rotary pairs.
    rope: ``rope_parameters`` besides theta, such as ``rope_type="dynamic", factor=2.0``.
    """
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.layer_norm_epsilon,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={
                "rope_theta": config.rope_base,
                "rope_type": "default",
                **rope,
            },
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).to(torch.float64 if config.dtype == "float64" else torch.float32)
    theirs.load_state_dict(renamed(dict(model.named_parameters()), config))
    return theirs.eval()


def renamed(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
    }
    names |= {"head.weight": "lm_head.weight"}
    parts = {"attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm"}
    parts |= {
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
    }
    parts |= {"feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    theirs = {new: ours[old] for old, new in names.items()}
    for layer in range(config.num_layers):
        here, there = f"layers.{layer}", f"model.layers.{layer}"
        for old, new in parts.items():
            theirs[f"{there}.{new}.weight"] = ours[f"{here}.{old}.weight"]
        fused = ours[f"{here}.attention.wqkv.weight"]
        grouped = fused.view(config.kv_heads, -1, config.head_dim, config.hidden_size)
        for name, part in (
            ("q", grouped[:, :-2]),
            ("k", grouped[:, -2:-1]),
            ("v", grouped[:, -1:]),
        ):
            theirs[f"{there}.self_attn.{name}_proj.weight"] = part.reshape(
                -1, config.hidden_size
            )
    return {name: tensor.detach() for name, tensor in theirs.items()}
