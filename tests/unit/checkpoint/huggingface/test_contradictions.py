"""Folders whose parts contradict one another, and configs that contradict a folder: refused with both values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.load import load_huggingface
from evomesh.checkpoint.huggingface.match import LISTED
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.restore import restore_model
from evomesh.checkpoint.resume import decide, restore
from evomesh.config.hugging_face import read_model_folder
from evomesh.config.loader import load_config
from evomesh.config.schema import CheckpointConfig, LoadConfig, ModelConfig
from evomesh.errors import UserError
from evomesh.models.registry import build_model
from tests.unit.checkpoint.huggingface.hf_models import export, model_config, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DYNAMIC = {"type": "dynamic", "factor": 2.0}
LINEAR = {"type": "linear", "factor": 2.0}
State = dict[str, torch.Tensor]


def silent(line: str) -> None:
    return


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of Hugging Face that no test changes."""
    root = tmp_path_factory.mktemp("exported")
    config = model_config(dtype="float32", rope_base=777.0, layer_norm_epsilon=3e-6)
    _, found = save_model(root / "native", config)
    options = ExportOptions(tokenizer="none", compare=False)
    return export(found, root / "hf", options, silent)


@pytest.fixture
def folder(tmp_path: Path, exported: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of ... removes the key."""
    path = folder / "config.json"
    record = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in record.items() if value is not ...}
    path.write_text(json.dumps(kept))


def edit_weights(folder: Path, change: Callable[[State], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load_for_training(folder: Path, config: ModelConfig, kind: str = "hf") -> State:
    """Load as a run with ``load_ckpt_info`` does."""
    info = LoadConfig(path=str(folder), ckpt_type=kind)
    chosen = CheckpointConfig(auto_resume=False, load_ckpt_info=info)
    parameters = dict(build_model(config).named_parameters())
    reader = CheckpointReader()
    start = decide(chosen, reader, None)
    restore(start, reader, parameters, config.model_dump())
    return parameters


def import_folder(folder: Path, config: ModelConfig) -> None:
    from_hf(str(folder), str(folder.parent / "out"), None, False, silent)


def serve_folder(folder: Path, config: ModelConfig) -> None:
    restore_model(str(folder))


WAYS = [load_for_training, import_folder, serve_folder]
# Without head_dim, as older folders are, a wrong width also gives heads of an odd width.
SIZES: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 36}, r"hidden_size is 36, but model.embed_tokens.weight is \[61, 32\]"),
    ({"hidden_size": 34}, r"hidden_size is 34, but model.embed_tokens.weight is \[61, 32\]"),
    ({"hidden_size": 64}, r"(?s)hidden_size is 64.*q_proj.weight is \[32, 32\], not \[64, 64\]"),
    ({"vocab_size": 60}, r"vocab_size is 60, but model.embed_tokens.weight is \[61, 32\]"),
    ({"vocab_size": 64}, r"(?s)vocab_size is 64.*lm_head.weight is \[61, 32\], not \[64, 32\]"),
    ({"intermediate_size": 60}, r"intermediate_size is 60, but model.layers.0.mlp.gate_proj"),
    ({"num_hidden_layers": 3}, r"(?s)num_hidden_layers is 3, but the tensors are of 2.*missing \(9\)"),
    ({"num_hidden_layers": 1}, r"(?s)num_hidden_layers is 1, but the tensors are of 2.*unexpected \(9\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_sizes_that_the_tensors_do_not_have(
    way: Callable[[Path, ModelConfig], object],
    changes: dict[str, Any],
    words: str,
    folder: Path,
) -> None:
    run = read_model_folder(folder)
    edit_config(folder, head_dim=..., **changes)
    with pytest.raises(UserError, match=words) as caught:
        way(folder, run)
    assert "config.json contradicts the tensors" in str(caught.value)


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads"])
def test_heads_that_the_projections_do_not_have(key: str, folder: Path) -> None:
    run = read_model_folder(folder)
    edit_config(folder, head_dim=8, **{key: 3})
    words = rf"{key} is 3 and head_dim 8, but model.layers.0.self_attn.\w_proj.weight"
    with pytest.raises(UserError, match=words):
        load_for_training(folder, run)


def test_a_long_list_of_tensors_is_cut(folder: Path) -> None:
    added = {f"extra.{number}": torch.ones(2) for number in range(LISTED + 3)}
    edit_weights(folder, lambda state: state.update(added))
    with pytest.raises(UserError, match=rf"unexpected \({LISTED + 3}\).*and 3 more"):
        restore_model(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": None},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": -1.0},
        {"rope_theta": "far", "rope_parameters": None},
        {"rope_scaling": 3},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": 3}, "rotary": None},
        {"rope_parameters": {"rope_type": "dynamic", "factor": "x"}, "rotary": None},
        {"rotary": "x"},
        {"max_position_embeddings": "long"},
        {"num_key_value_heads": "two"},
        {"num_key_value_heads": 3},
        {"model_type": ["llama"]},
        {"head_dim": 7},
        {"dtype": ["float32"]},
    ],
    ids=str,
)
def test_values_of_a_wrong_kind_are_no_traceback(
    changes: dict[str, Any], folder: Path
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=r"config\.json"):
        restore_model(str(folder))


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_head_beside_another_one(
    way: Callable[[Path, ModelConfig], object], folder: Path
) -> None:
    run = read_model_folder(folder)
    edit_config(folder, tie_word_embeddings=True)
    words = f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}"
    with pytest.raises(UserError, match=words):
        way(folder, run)
    edit_weights(folder, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    way(folder, run)
    edit_weights(folder, lambda state: state[HEAD][-1].add_(1))
    with pytest.raises(UserError, match=words):
        way(folder, run)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("way", WAYS)
def test_one_bad_value_in_a_weight(
    way: Callable[[Path, ModelConfig], object], value: float, folder: Path
) -> None:
    run = read_model_folder(folder)
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(folder, lambda state: state[name][3].fill_(value))
    words = r"layers\.1\.attention\.wqkv\.weight: 32 of 2048 values are NaN or infinite"
    with pytest.raises(UserError, match=words):
        way(folder, run)


def test_a_value_that_the_dtype_of_the_run_cannot_hold(folder: Path) -> None:
    run = read_model_folder(folder).model_copy(update={"dtype": "float16"})
    edit_weights(folder, lambda state: state[HEAD][0, :2].fill_(1e6))
    with pytest.raises(UserError, match=r"head\.weight: 2 of .* as float16") as caught:
        load_for_training(folder, run)
    assert "bfloat16" in str(caught.value)


def test_every_lost_shard_is_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number}.safetensors" for number in range(len(state))]
    weight_map = dict(zip(state, names, strict=True))
    for name, file in list(weight_map.items())[2:]:
        save_file({name: state[name]}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    words = "lists 2 shards: 'model-0.safetensors', 'model-1.safetensors'"
    with pytest.raises(UserError, match=words):
        restore_model(str(folder))


@pytest.mark.parametrize("kind", ["hf", "hf_llama", "hf_model", "llama"])
@pytest.mark.parametrize(
    ("scaling", "said", "both"),
    [
        (None, "rope_base=10000.0", "rope_base=777.0, the run's is 10000.0"),
        (None, "layer_norm_epsilon=1e-5", "layer_norm_epsilon=3e-06, the run's is 1e-05"),
        (None, "use_dynamic_ntk_rope=True", "use_dynamic_ntk_rope=False, the run's is True"),
        (None, "rope_scaling=dict(type='linear', factor=2.0)", "rope_scaling=None, the run's is .*linear"),
        (DYNAMIC, "use_dynamic_ntk_rope=False", "use_dynamic_ntk_rope=True, the run's is False"),
        (DYNAMIC, "use_dynamic_ntk_rope=True, rope_scaling_factor=3.0",
         "rope_scaling_factor=2.0, the run's is 3.0"),
        (LINEAR, "rope_scaling=dict(type='linear', factor=4.0)", "factor=2.0.*factor=4.0"),
        (LINEAR, "use_dynamic_ntk_rope=True", "the run's is True"),
    ],
)  # fmt: skip
def test_what_a_config_leaves_out_is_the_folders_and_what_it_says_must_agree(
    scaling: dict[str, Any] | None, said: str, both: str, kind: str, folder: Path
) -> None:
    edit_config(folder, rope_scaling=scaling, rope_parameters=..., rotary=...)

    def config(line: str) -> ModelConfig:
        path = folder.parent / "config.py"
        sizes = "num_layers=2, hidden_size=32, vocab_size=61, num_attention_heads=4, num_kv_attention_heads=2"
        model = f"{sizes}, mlp_ratio=2.0, multiple_of=8, dtype='torch.float32'"
        start = f"path='local:{folder}', content=('model',), ckpt_type={kind!r}"
        path.write_text(
            f"model_type = 'LLAMA2'\nmodel = dict({model}, {line})\ndata = dict(train_folder='x')\n"
            f"ckpt = dict(auto_resume=False, load_ckpt_info=dict({start}))\n"
        )
        return load_config(str(path), ()).config.model

    silent_about_it = config("")
    assert silent_about_it.rope_base == 777.0
    assert silent_about_it.rope_scaling == read_model_folder(folder).rope_scaling
    weights = load_for_training(folder, silent_about_it, kind)
    stored = load_file(folder / "model.safetensors")[HEAD]
    assert torch.equal(weights["head.weight"], stored)
    with pytest.raises(UserError, match=both):
        list(load_huggingface(str(folder), config(said).model_dump()))
