"""Weights of a muP model in other systems: transformers and InternEvo compute its logits without knowing muP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.internevo.export import write_model
from evomesh.checkpoint.internevo.model import HeadCounts, read_model
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.restore import restore_model
from evomesh.checkpoint.resume import check_config
from evomesh.checkpoint.standard_weights import rounds, without_mup
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.mup import MupConfig
from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model
from tests.support.tolerances import assert_close
from tests.unit.checkpoint.huggingface.hf_models import (
    export,
    model_config,
    random_model,
    save_model,
)

IDS = torch.tensor([3, 7, 11, 20, 5, 60, 0, 1])
# Neither factor is a power of two.
MUP = MupConfig(base_hidden_size=12, base_head_dim=3)
KINDS = {
    "grouped": model_config("LLAMA2", mup=MUP),
    "norms-of-queries": model_config("QWEN3", mup=MUP, qk_norm=True),
    "biases-tied": model_config(
        "QWEN2", mup=MUP, no_bias=False, o_bias=False, tie_word_embeddings=True
    ),
    "interleaved": model_config("INTERNLM2_PUBLIC", mup=MUP, qk_interleaved=True),
}


@torch.inference_mode()
def logits(model: LanguageModel) -> torch.Tensor:
    return model.logits(model(IDS, single_sequence(len(IDS))))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(tmp_path: Path, kind: str) -> None:
    model, found = save_model(tmp_path / "ckpts", KINDS[kind])
    options = ExportOptions(compare=False)
    folder = export(found, tmp_path / "hf", options, lambda line: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64
    ).eval()
    with torch.inference_mode():
        found_logits = theirs(IDS[None]).logits[0]
    # Its norms are in float32.
    assert_close(found_logits, logits(model), 2e-6)
    assert_close(logits(restore_model(str(folder)).model), logits(model), 1e-12)
    plain = random_model(without_mup(KINDS[kind]))
    for name, weight in model.named_parameters():
        plain.get_parameter(name).data.copy_(weight.detach())
    assert float((logits(plain) - logits(model)).abs().max()) > 0.01


def test_the_export_compares_rounded_weights(tmp_path: Path) -> None:
    """In 16 bits the factors round: the comparison allows for that, and for nothing where they are powers of two."""
    config = model_config("LLAMA2", "bfloat16", mup=MUP)
    assert rounds(config)
    _, found = save_model(tmp_path / "ckpts", config)
    lines: list[str] = []
    export(found, tmp_path / "hf", ExportOptions(), lines.append)
    assert any("largest logit difference" in line for line in lines)
    exact = MupConfig(base_hidden_size=16, base_head_dim=2)
    assert not rounds(model_config("LLAMA2", "bfloat16", mup=exact))


def test_internevo_reads_the_plain_model(tmp_path: Path) -> None:
    config = KINDS["interleaved"]
    model, found = save_model(tmp_path / "ckpts", config)
    write_model(found, config, str(tmp_path / "out"), tensor=1, pipeline=2)
    plain = build_model(without_mup(config)).eval()
    counts = HeadCounts(config.num_attention_heads, config.kv_heads)
    for name, weight in read_model(str(tmp_path / "out"), counts):
        plain.get_parameter(name).data.copy_(weight)
    assert_close(logits(plain), logits(model), 1e-12)


def test_weights_of_other_systems_are_refused() -> None:
    config = Config(model=KINDS["grouped"])
    start = StartPoint("", path="hf", ckpt_type="hf", content=frozenset({"model"}))
    with pytest.raises(UserError, match="of a model without muP"):
        check_config(start, config, CheckpointReader())
    plain = Config(model=without_mup(config.model))
    check_config(start, plain, CheckpointReader())
