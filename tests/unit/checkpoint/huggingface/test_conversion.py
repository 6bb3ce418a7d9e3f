"""Conversion both ways, with ``transformers`` as the one that says what a folder means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from evomesh.checkpoint.huggingface.checklist import checklist
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.folder import open_folder
from evomesh.checkpoint.huggingface.load import load_huggingface, load_llama
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.resume import decide, restore
from evomesh.config.record import config_from_dict
from evomesh.config.schema import CheckpointConfig, LoadConfig, ModelConfig
from evomesh.errors import UserError
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model
from tests.support.stock_rope import keep_float64
from tests.support.tolerances import TRANSFORMERS, TRANSFORMERS_FLOAT32
from tests.unit.checkpoint.huggingface.hf_models import (
    VOCAB,
    export,
    found_in,
    model_config,
    random_model,
    save_model,
)

IDS = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(1))
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LLAMA2", {}),
    ("LLAMA2", {"qk_interleaved": True}),
    # Llama 3's kind of shape.
    ("LLAMA2", {"rope_base": 500000.0, "num_kv_attention_heads": 1, "vocab_size": 97}),
    ("INTERNLM", {}),
    ("INTERNLM2_PUBLIC", {}),
    ("INTERNLM2_PUBLIC", {"qk_interleaved": True, "no_bias": False, "norm_head": True}),
]
QUIET = ExportOptions(tokenizer="none")


def silent(line: str) -> None:
    return


@pytest.fixture
def float64_upcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)


@torch.inference_mode()
def ours(model: LanguageModel, ids: Tensor = IDS) -> Tensor:
    return model.logits(model(ids, single_sequence(len(ids))))


@torch.inference_mode()
def theirs(folder: Path, ids: Tensor = IDS) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float64, attn_implementation="sdpa"
    ).eval()
    logits: Tensor = model(ids[None]).logits[0]
    return logits


def loaded(loader: Any, folder: Path, config: ModelConfig) -> LanguageModel:
    model = build_model(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in loader(str(folder), config.model_dump()):
            parameters.pop(name).copy_(tensor.read())
    assert not parameters
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_export_computes_the_same_in_transformers(
    family: str, changes: dict[str, Any], tmp_path: Path, float64_upcasts: None
) -> None:
    model, found = save_model(tmp_path / "c", model_config(family, **changes))
    lines: list[str] = []
    folder = export(
        found, tmp_path / "hf", replace(QUIET, max_shard_bytes=20000), lines.append
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert relative(theirs(folder), ours(model)) < TRANSFORMERS
    assert any(
        "largest logit difference between the native model and transformers" in line
        for line in lines
    )
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert {
        item.name: item.detail for item in checklist(str(folder)) if not item.passed
    }.keys() == {
        "tokenizer",
        "chat template",
    }


def test_without_patches(tmp_path: Path) -> None:
    model, found = save_model(tmp_path / "c", model_config("INTERNLM"))
    assert (
        relative(theirs(export(found, tmp_path / "hf", QUIET, silent)), ours(model))
        < TRANSFORMERS_FLOAT32
    )


@pytest.mark.parametrize("arch", ["llama", "internlm2"])
@pytest.mark.parametrize(("family", "changes"), CASES[1::2])
def test_there_and_back_in_any_pairing(
    family: str,
    changes: dict[str, Any],
    arch: Any,
    tmp_path: Path,
    float64_upcasts: None,
) -> None:
    config = model_config(family, **changes)
    model, found = save_model(tmp_path / "c", config)
    folder = export(found, tmp_path / "hf", replace(QUIET, arch=arch), silent)
    for interleaved in (False, True):
        back = loaded(
            load_huggingface,
            folder,
            config.model_copy(update={"qk_interleaved": interleaved}),
        )
        assert relative(ours(back), ours(model)) < 1e-12
    lines: list[str] = []
    from_hf(str(folder), str(tmp_path / "back"), None, True, lines.append)
    stored = found_in(tmp_path / "back")
    second = export(stored, tmp_path / "hf2", QUIET, silent)
    assert relative(theirs(second), ours(model)) < TRANSFORMERS
    assert config_from_dict(stored.config).model.mlp_width == config.mlp_width
    assert (
        "largest logit difference between the native model and transformers" in lines[0]
    )


@pytest.mark.parametrize("binary", [False, True])
def test_a_folder_of_transformers_own(
    binary: bool, tmp_path: Path, float64_upcasts: None
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=700.0,
        rms_norm_eps=3e-6,
    )
    model = transformers.LlamaForCausalLM(config).double()
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    folder = tmp_path / "hf"
    if binary:
        for file in folder.glob("model*"):
            file.unlink()
        state = model.state_dict()
        halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
        for number, half in enumerate(halves):
            torch.save(half, folder / f"pytorch_model-{number}.bin")
        index = {
            "weight_map": {
                name: f"pytorch_model-{n}.bin"
                for n, half in enumerate(halves)
                for name in half
            }
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    from_hf(str(folder), str(tmp_path / "c"), None, not binary, silent)
    found = found_in(tmp_path / "c")
    section = config_from_dict(found.config).model
    assert (section.mlp_width, section.rope_base, section.layer_norm_epsilon) == (
        37,
        700.0,
        3e-6,
    )
    again = export(found, tmp_path / "again", QUIET, silent)
    with torch.inference_mode():
        assert relative(theirs(again), model(IDS[None]).logits[0]) < TRANSFORMERS


@pytest.mark.parametrize("rows", [False, True])
def test_consolidated_files_of_llama(rows: bool, tmp_path: Path) -> None:
    config = model_config("LLAMA2", qk_interleaved=True)
    model = random_model(config)
    cut: list[dict[str, Tensor]] = [{}, {}]
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith("wqkv.weight"):
            groups = value.view(2, 4, 8, 32)
            parts = {"wq": groups[:, :2], "wk": groups[:, 2:3], "wv": groups[:, 3:]}
            named = {
                name.replace("wqkv", n): part.reshape(-1, 32)
                for n, part in parts.items()
            }
        else:
            named = {
                name.replace("embedding", "tok_embeddings").replace(
                    "head", "output"
                ): value
            }
        for their, tensor in named.items():
            column = their.endswith(("wo.weight", "w2.weight")) or (
                their.startswith("tok") and not rows
            )
            pieces = (
                tensor.tensor_split(2, dim=1 if column else 0)
                if tensor.dim() > 1
                else (tensor, tensor)
            )
            for at, piece in zip(cut, pieces, strict=True):
                at[their] = piece.clone()
    for number, part in enumerate(cut):
        torch.save(part, tmp_path / f"consolidated.{number:02d}.pth")
    for interleaved in (True, False):
        back = loaded(
            load_llama,
            tmp_path,
            config.model_copy(update={"qk_interleaved": interleaved}),
        )
        assert relative(ours(back), ours(model)) < 1e-12
    (tmp_path / "params.json").write_text('{"n_heads": 8, "n_kv_heads": 2}')
    with pytest.raises(UserError, match="n_heads=8, the run's is 4"):
        loaded(load_llama, tmp_path, config)


def test_dynamic_rotary_in_both_spellings(tmp_path: Path) -> None:
    config = model_config(
        "INTERNLM2_PUBLIC", use_dynamic_ntk_rope=True, max_position_embeddings=40
    )
    model, found = save_model(tmp_path / "c", config)
    folder = export(found, tmp_path / "hf", QUIET, silent)
    long = torch.randint(VOCAB, (70,), generator=torch.Generator().manual_seed(2))
    assert relative(theirs(folder, long), ours(model, long)) < TRANSFORMERS_FLOAT32
    record = json.loads((folder / "config.json").read_text())
    assert (
        record["rotary"]["type"]
        == record["rope_scaling"]["type"]
        == record["rope_parameters"]["rope_type"]
    )
    plain = export(
        found, tmp_path / "plain", replace(QUIET, rotary_type="origin"), silent
    )
    still = build_model(config.model_copy(update={"use_dynamic_ntk_rope": False}))
    still.load_state_dict(model.state_dict())
    assert relative(theirs(plain, long), ours(still, long)) < TRANSFORMERS_FLOAT32
    # The switch of InternEvo's guide: only rotary.type, edited in config.json.
    (folder / "config.json").write_text(
        json.dumps(record | {"rotary": {"type": "origin"}})
    )
    from_hf(str(folder), str(tmp_path / "back"), None, False, silent)
    assert not config_from_dict(
        found_in(tmp_path / "back").config
    ).model.use_dynamic_ntk_rope


@pytest.mark.parametrize(
    ("dtype", "norm_head"), [("bfloat16", True), ("float16", False), ("float32", True)]
)
def test_rounded_exports_hold_the_rounded_weights(
    dtype: str, norm_head: bool, tmp_path: Path
) -> None:
    model, found = save_model(
        tmp_path / "c", model_config("INTERNLM2_PUBLIC", norm_head=norm_head)
    )
    folder = export(found, tmp_path / "hf", replace(QUIET, dtype=dtype), silent)
    record = json.loads((folder / "config.json").read_text())
    assert record["torch_dtype"] == record["dtype"] == dtype
    stored = open_folder(str(folder)).read("model.embed_tokens.weight")
    assert torch.equal(
        stored,
        dict(model.named_parameters())["embedding.weight"].to(getattr(torch, dtype)),
    )


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    config = model_config()
    model, _ = save_model(tmp_path / "c", config)
    from evomesh.config.record import config_to_dict
    from evomesh.config.schema import Config

    with torch.no_grad():
        dict(model.named_parameters())["layers.1.feed_forward.w2.weight"][0, 0] = 1e6
    CheckpointWriter(str(tmp_path / "big")).save(
        1, dict(model.named_parameters()), {}, config_to_dict(Config(model=config))
    )
    with pytest.raises(
        UserError,
        match=r"layers\.1\.feed_forward\.w2\.weight: 1 of 2048 values are not finite as flo",
    ):
        export(
            found_in(tmp_path / "big"),
            tmp_path / "hf",
            replace(QUIET, dtype="float16"),
            silent,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "c"]


def test_a_hub_id_is_found_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = save_model(tmp_path / "c", model_config())
    snapshot = tmp_path / "hub/models--some--model/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    export(found, snapshot, QUIET, silent)
    (tmp_path / "hub/models--some--model/refs").mkdir()
    (tmp_path / "hub/models--some--model/refs/main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    info = LoadConfig(path="some/model")
    start = decide(
        CheckpointConfig(auto_resume=False, load_ckpt_info=info),
        CheckpointReader(),
        None,
    )
    assert start.reason == f"loading model from {snapshot} (hf, load_ckpt_info)"
    fresh = dict(build_model(model_config()).named_parameters())
    restore(start, CheckpointReader(), fresh, model_config().model_dump())
    assert all(
        torch.equal(fresh[name], tensor) for name, tensor in model.named_parameters()
    )
    with pytest.raises(UserError, match='content=\\("model",\\)'):
        everything = LoadConfig(path="some/model", content=("all",))
        decide(
            CheckpointConfig(auto_resume=False, load_ckpt_info=everything),
            CheckpointReader(),
            None,
        )
