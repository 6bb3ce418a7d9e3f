"""Import and export of families whose code is not in ``transformers``, both ways, against a reference of the tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.load import load_huggingface
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.restore import restore_model
from evomesh.config.record import config_from_dict
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from tests.support.reference_decoder import ReferenceDecoder, save_reference
from tests.unit.checkpoint.huggingface.hf_models import (
    export,
    found_in,
    model_config,
    save_model,
)

QUIET = ExportOptions(tokenizer="none")
SIZES: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
INTERNLM3 = dict(model_type="internlm3", **SIZES, num_key_value_heads=2, rope_theta=500)
FOLDERS: dict[str, dict[str, Any]] = {
    # The logits check has 32 tokens: beyond the trained length.
    "internlm3": {
        **INTERNLM3,
        "head_dim": 12,
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
    "internlm3-input-biases": {**INTERNLM3, "qkv_bias": True},
    "internlm3-output-biases": {**INTERNLM3, "bias": True},
    "internlm3-all-biases": {**INTERNLM3, "bias": True, "qkv_bias": True},
    "baichuan2": {**SIZES, "model_type": "baichuan"},
}
# What an export takes where no architecture is given.
DEFAULT = {
    "internlm3": "llama",
    "internlm3-input-biases": "internlm3",
    "internlm3-output-biases": "internlm3",
    "internlm3-all-biases": "llama",
    "baichuan2": "llama",
}
OURS: dict[str, dict[str, Any]] = {
    "internlm3": {"model_type": "INTERNLM3", "qkv_bias": True, "head_dim": 12},
    "baichuan": {
        "model_type": "BAICHUAN2",
        "num_kv_attention_heads": 4,
        "norm_head": True,
        "rope_base": 10000.0,
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_becomes_a_checkpoint_and_the_same_folder_again(
    name: str, tmp_path: Path
) -> None:
    save_reference(FOLDERS[name], tmp_path / "hf")
    lines: list[str] = []
    from_hf(str(tmp_path / "hf"), str(tmp_path / "c"), None, True, lines.append)
    assert any("between the native model and transformers" in line for line in lines)

    own = replace(QUIET, arch=FOLDERS[name]["model_type"])
    out = export(found_in(tmp_path / "c"), tmp_path / "back", own, lines.append)
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    written = json.loads((out / "config.json").read_text())
    given = FOLDERS[name]
    assert {key: written[key] for key in given if key != "rope_scaling"} == {
        key: value for key, value in given.items() if key != "rope_scaling"
    }

    default = export(found_in(tmp_path / "c"), tmp_path / "d", QUIET, lines.append)
    record = json.loads((default / "config.json").read_text())
    assert record["model_type"] == DEFAULT[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", [None, "baichuan"])
def test_a_head_whose_rows_are_normalized_passes_the_check_in_16_bits(
    arch: Any, dtype: str, tmp_path: Path
) -> None:
    save_reference(FOLDERS["baichuan2"], tmp_path / "hf")
    lines: list[str] = []
    from_hf(str(tmp_path / "hf"), str(tmp_path / "c"), dtype, True, lines.append)
    options = replace(QUIET, arch=arch)
    export(found_in(tmp_path / "c"), tmp_path / "back", options, lines.append)
    compared = [line for line in lines if "largest logit difference" in line]
    assert len(compared) == 3


@pytest.mark.parametrize("name", FOLDERS)
def test_generation_repeats_the_reference_token_by_token(
    name: str, tmp_path: Path
) -> None:
    stock = save_reference(
        {**FOLDERS[name], "max_position_embeddings": 64}, tmp_path / "hf"
    )
    ours = restore_model(str(tmp_path / "hf")).model
    prompts = [[3, 7, 11], [5, 4, 3, 2, 1, 9, 30]]
    made = generate_tokens(
        ours, prompts, SamplingParams(do_sample=False, max_new_tokens=24)
    )
    for prompt, (answer,) in zip(prompts, made, strict=True):
        assert answer == stock.continued(prompt, 24)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("arch", OURS)
def test_a_trained_model_is_exported_as_its_own_architecture(
    arch: Any, interleaved: bool, tmp_path: Path
) -> None:
    config = model_config(qk_interleaved=interleaved, **OURS[arch])
    model, found = save_model(tmp_path / "c", config)
    folder = export(
        found, tmp_path / "hf", replace(QUIET, arch=arch), lambda line: None
    )
    reference = ReferenceDecoder(json.loads((folder / "config.json").read_text()))
    reference.double().load_state_dict(load_file(folder / "model.safetensors"))
    ids = torch.arange(20)
    theirs = reference(ids[None]).logits[0]
    from evomesh.layers.sequence_bounds import single_sequence

    ours = model.logits(model(ids, single_sequence(20)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    parameters = dict(model.named_parameters())
    for name, tensor in load_huggingface(str(folder), config.model_dump()):
        assert torch.equal(tensor.read(), parameters[name]), name


def test_the_biases_of_a_folder_are_switches_of_the_model(tmp_path: Path) -> None:
    for name, switches in {
        "internlm3": (False, False, False),
        "internlm3-input-biases": (True, False, False),
        "internlm3-output-biases": (False, True, True),
        "internlm3-all-biases": (True, True, True),
    }.items():
        save_reference(FOLDERS[name], tmp_path / name)
        from_hf(str(tmp_path / name), str(tmp_path / f"{name}-c"), None, False, print)
        found = found_in(tmp_path / f"{name}-c")
        model = config_from_dict(found.config).model
        found_switches = (model.has_qkv_bias, model.has_o_bias, model.mlp_bias)
        assert found_switches == switches
