"""Small checkpoints of every family for the converters' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.export import export as export_checkpoint
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.load import resolve
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.config.data import ChatTemplateName, DataConfig
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config, GenerationConfig, ModelConfig
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, initialize_weights

VOCAB = 61


def model_config(
    model_type: str = "LLAMA2", dtype: str = "float64", **changes: object
) -> ModelConfig:
    values: dict[str, object] = dict(
        model_type=model_type,
        num_layers=2,
        hidden_size=32,
        vocab_size=VOCAB,
        num_attention_heads=4,
        num_kv_attention_heads=4 if model_type == "INTERNLM" else 2,
        mlp_ratio=2.0,
        multiple_of=8,
        dtype=dtype,
        no_bias=model_type != "INTERNLM",
        layer_norm_epsilon=1e-5,
        rope_base=500.0,
        max_position_embeddings=64,
    )
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def random_model(config: ModelConfig) -> LanguageModel:
    """Weights large enough that every one of them, each bias and norm too, shows in the logits."""
    model = build_model(config)
    initialize_weights(model, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64
                )
                parameter.add_((noise * 0.2).to(parameter.dtype))
            else:
                parameter.mul_(12 if config.model_type != "INTERNLM" else 40)
    return model.eval()


def save_model(
    root: Path,
    config: ModelConfig,
    tokenizer: str | None = None,
    generation: GenerationConfig | None = None,
    chat_template: ChatTemplateName | None = None,
) -> tuple[LanguageModel, Checkpoint]:
    model = random_model(config)
    whole = Config(
        model=config,
        data=DataConfig(
            tokenizer_path=tokenizer, seq_len=48, chat_template=chat_template
        ),
        generation=generation,
    )
    CheckpointWriter(str(root)).save(
        7, dict(model.named_parameters()), {"train": {}}, config_to_dict(whole)
    )
    return model, found_in(root)


def export(
    found: Checkpoint, out: Path, options: ExportOptions, report: Callable[[str], None]
) -> Path:
    return Path(export_checkpoint(found, str(out), options, report))


def found_in(root: Path) -> Checkpoint:
    return resolve(str(root))
