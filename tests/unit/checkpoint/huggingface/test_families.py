"""Import and export of the families of ``transformers``, both ways, against its own models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evomesh.checkpoint.huggingface.config import CLASSES, default_architecture
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.huggingface.load import load_huggingface
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.restore import restore_model
from evomesh.config.families import architecture_of
from evomesh.config.hugging_face import read_model, read_model_folder
from evomesh.config.record import config_from_dict
from evomesh.config.schema import ModelConfig
from evomesh.config.size import parameter_count
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from evomesh.models.registry import build_model
from evomesh.storage.local import LocalStorage
from tests.support.tolerances import TRANSFORMERS_FLOAT32
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
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
STOCK: dict[str, dict[str, Any]] = {
    "Llama": {"rope_parameters": LLAMA3, "head_dim": 12, "tie_word_embeddings": True},
    "Qwen2": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "Qwen3": {"head_dim": 12},
    "Mistral": {"head_dim": 12, "sliding_window": 6},
    "Olmo2": {},
    "Phi3": {
        "sliding_window": 6,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "short_factor": [1.0, 1.1, 1.2, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 16,
        },
    },
    "SmolLM3": {
        "no_rope_layers": [1, 0],
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "Gemma": {"head_dim": 12, "tie_word_embeddings": True},
    "Gemma2": {
        "head_dim": 12,
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
    },
    "Gemma3": {
        "head_dim": 12,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "linear",
                "factor": 8.0,
                "rope_theta": 1e6,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}
FAMILY = {
    "Llama": "LLAMA2",
    "Qwen2": "QWEN2",
    "Qwen3": "QWEN3",
    "Mistral": "MISTRAL",
    "Olmo2": "OLMO2",
    "Phi3": "PHI3",
    "SmolLM3": "SMOLLM3",
    "Gemma": "GEMMA",
    "Gemma2": "GEMMA2",
    "Gemma3": "GEMMA3",
}
OURS: dict[str, dict[str, Any]] = {
    "QWEN2": {"no_bias": False, "o_bias": False},
    "QWEN3": {"qk_norm": True, "head_dim": 12},
    "MISTRAL": {"head_dim": 12, "sliding_window": 6},
    "PHI3": {"sliding_window": 6},
    "SMOLLM3": {"nope_layers": (0,), "mlp_bias": True, "sliding_window": 6},
    "OLMO2": {"qk_norm": True, **architecture_of("OLMO2")},
    "GEMMA": {"tie_word_embeddings": True, **architecture_of("GEMMA")},
    "GEMMA2": {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 20.0,
        "final_logit_softcapping": 2.5,
        **architecture_of("GEMMA2"),
    },
    "GEMMA3": {
        "tie_word_embeddings": True,
        "qk_norm": True,
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"),
        "local_rope_base": 100.0,
        **architecture_of("GEMMA3"),
    },
}


def stock_folder(name: str, folder: Path) -> Any:
    """Save a model of transformers with every weight at random, norms and biases too, and return it."""
    torch.manual_seed(0)
    config_class = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_class)(
        **{"tie_word_embeddings": False, **SIZES, **STOCK[name]}
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", STOCK)
def test_a_folder_of_transformers_becomes_a_checkpoint_and_the_same_folder_again(
    name: str, tmp_path: Path
) -> None:
    stock = stock_folder(name, tmp_path / "hf")
    lines: list[str] = []
    from_hf(str(tmp_path / "hf"), str(tmp_path / "c"), None, True, lines.append)
    assert any(
        "largest logit difference between the native model and transformers" in line
        for line in lines
    )
    found = found_in(tmp_path / "c")
    model = config_from_dict(found.config).model
    assert model.model_type == FAMILY[name]
    tied = stock.config.tie_word_embeddings
    assert model.tie_word_embeddings == tied
    assert ("head.weight" in found.records()) == (not tied)

    out = export(found_in(tmp_path / "c"), tmp_path / "back", QUIET, lines.append)
    record = json.loads((out / "config.json").read_text())
    assert record["architectures"] == [f"{name}ForCausalLM"]
    assert record["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in HfFolder(LocalStorage(), str(out)).shapes) == (not tied)
    back = transformers.AutoModelForCausalLM.from_pretrained(str(out)).state_dict()
    for key, tensor in stock.state_dict().items():
        assert torch.equal(back[key], tensor), key
    assert (
        sum("between the native model and transformers" in line for line in lines) == 2
    )


def test_the_parts_of_a_fused_matrix_stay_in_one_shard(tmp_path: Path) -> None:
    stock = stock_folder("Phi3", tmp_path / "hf")
    lines: list[str] = []
    from_hf(str(tmp_path / "hf"), str(tmp_path / "c"), None, False, lines.append)
    small = replace(QUIET, max_shard_bytes=10_000)
    out = export(found_in(tmp_path / "c"), tmp_path / "back", small, lines.append)
    assert len(list(out.glob("model-*.safetensors"))) > 4
    back = transformers.AutoModelForCausalLM.from_pretrained(str(out)).state_dict()
    for key, tensor in stock.state_dict().items():
        assert torch.equal(back[key], tensor), key


def test_a_bfloat16_gemma_is_compared_with_its_factor_not_rounded(
    tmp_path: Path,
) -> None:
    """sqrt(48) is 6.928, and 6.938 in bfloat16: both sides compute in float32, where it is the former."""
    config = transformers.GemmaConfig(**(SIZES | {"hidden_size": 48, "head_dim": 12}))
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    lines: list[str] = []
    from_hf(str(tmp_path / "hf"), str(tmp_path / "c"), None, True, lines.append)
    assert any("transformers: " in line for line in lines)
    assert build_model(read_model_folder(tmp_path / "hf")).embedding.scale == 6.9375


# Phi-3 grows beyond its original length on the way, with beams too.
@pytest.mark.parametrize(
    ("name", "beams"), [*((name, 1) for name in STOCK), ("Phi3", 3)]
)
def test_generation_repeats_transformers_token_by_token(
    name: str, beams: int, tmp_path: Path
) -> None:
    stock = stock_folder(name, tmp_path / "hf")
    ours = restore_model(str(tmp_path / "hf")).model
    prompts = [[3, 7, 11], [5, 4, 3, 2, 1, 9, 30]]
    greedy = SamplingParams(do_sample=False, max_new_tokens=24, num_beams=beams)
    made = generate_tokens(ours, prompts, greedy)
    for prompt, (answer,) in zip(prompts, made, strict=True):
        found = stock.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=24,
            num_beams=beams,
            do_sample=False,
            eos_token_id=None,
        )
        assert answer == found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("family", OURS)
def test_a_trained_model_is_exported_as_its_own_architecture(
    family: str, interleaved: bool, tmp_path: Path
) -> None:
    config = model_config(family, qk_interleaved=interleaved, **OURS[family])
    model, found = save_model(tmp_path / "c", config)
    lines: list[str] = []
    folder = export(found, tmp_path / "hf", QUIET, lines.append)
    assert any("transformers" in line for line in lines)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float64
    )
    assert loaded.config.model_type == default_architecture(config)
    parameters = dict(model.named_parameters())
    for name, tensor in load_huggingface(str(folder), config.model_dump()):
        assert torch.equal(tensor.read(), parameters[name]), name
    ids = torch.arange(20)[None]
    theirs = loaded(ids).logits[0]
    from evomesh.layers.sequence_bounds import single_sequence

    ours = model.logits(model(ids[0], single_sequence(20)))
    assert (
        float((ours - theirs).abs().max() / theirs.abs().max()) < TRANSFORMERS_FLOAT32
    )


@pytest.mark.parametrize(
    ("family", "changes", "arch", "words"),
    [
        ("QWEN3", {"qk_norm": True}, "llama", "qk_norm=True"),
        (
            "QWEN2",
            {"no_bias": False, "o_bias": False},
            "llama",
            "qkv_bias=True with o_bias=False",
        ),
        ("MISTRAL", {"sliding_window": 48}, "llama", "sliding_window=48"),
        ("LLAMA2", {"head_dim": 12}, "internlm2", "head_dim=12"),
        ("LLAMA2", {}, "qwen3", "qk_norm=False"),
        ("SMOLLM3", {"nope_layers": (1,)}, "llama", "nope_layers="),
        ("SMOLLM3", {"mlp_bias": True}, "phi3", "mlp_bias=True"),
        ("LLAMA2", {}, "baichuan", "num_kv_attention_heads=2|norm_head=False"),
        (
            "BAICHUAN2",
            {"num_kv_attention_heads": 4, "norm_head": True, "rope_base": 500.0},
            "baichuan",
            "rope_base=500 cannot be represented in the baichuan architecture",
        ),
        (
            "PHI3",
            {"use_dynamic_ntk_rope": True},
            "phi3",
            "rotary scaling 'dynamic' cannot be represented in the phi3 architecture",
        ),
        (
            "INTERNLM2_PUBLIC",
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "internlm2",
            "rotary scaling 'llama3' cannot be represented in the internlm2 architecture",
        ),
        ("LLAMA2", {"norm_placement": "after"}, "llama", "norm_placement='after'"),
        (
            "OLMO2",
            {"qk_norm": True, **architecture_of("OLMO2")},
            "qwen3",
            "norm_placement='after'",
        ),
    ],
)
def test_an_architecture_without_the_switch_is_refused(
    family: str, changes: dict[str, Any], arch: Any, words: str, tmp_path: Path
) -> None:
    _, found = save_model(tmp_path / "c", model_config(family, **changes))
    with pytest.raises(CheckpointError, match=words):
        export(found, tmp_path / "hf", replace(QUIET, arch=arch), lambda line: None)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("family", "changes", "possible"),
    [
        ("QWEN3", {"qk_norm": True}, ["qwen3"]),
        ("MISTRAL", {"sliding_window": 48}, ["mistral", "phi3", "smollm3"]),
        (
            "MISTRAL",
            {"sliding_window": 48, "use_dynamic_ntk_rope": True},
            ["mistral", "smollm3"],
        ),
    ],
)
def test_the_architectures_that_can_represent_a_refused_model_are_named(
    family: str, changes: dict[str, Any], possible: list[str], tmp_path: Path
) -> None:
    _, found = save_model(tmp_path / "c", model_config(family, **changes))
    refused = {}
    for arch in CLASSES:
        options = replace(QUIET, arch=arch)
        try:
            export(found, tmp_path / arch, options, lambda line: None)
        except CheckpointError as error:
            refused[arch] = error.fix
    assert [arch for arch in CLASSES if arch not in refused] == possible
    words = " or ".join(f"--arch {arch}" for arch in possible)
    assert set(refused.values()) == {f"export it as another one: {words}"}


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [
        ("rope_base", 400.0, "rope_base=10000.0, the run's is 400.0"),
        ("qk_norm", False, "qk_norm=True, the run's is False"),
        ("head_dim", 8, "head_dim=12, the run's is 8"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon=1e-05, the run's is 1e-06"),
    ],
)
def test_a_config_that_contradicts_the_folder_is_refused_with_both_values(
    key: str, value: Any, both: str, tmp_path: Path
) -> None:
    stock_folder("Qwen3", tmp_path / "hf")
    run = read_model_folder(tmp_path / "hf").model_copy(update={key: value})
    with pytest.raises(CheckpointError, match=both):
        list(load_huggingface(str(tmp_path / "hf"), run.model_dump()))


def test_an_untied_run_takes_the_embedding_as_its_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock_folder("Qwen2", tmp_path / "hf")
    run = read_model_folder(tmp_path / "hf")
    assert run.tie_word_embeddings
    untied = run.model_copy(update={"tie_word_embeddings": False})
    tensors = dict(load_huggingface(str(tmp_path / "hf"), untied.model_dump()))
    assert torch.equal(
        tensors["head.weight"].read(), tensors["embedding.weight"].read()
    )
    assert "trained apart" in caplog.text


def rewrite(folder: Path, tied: bool, head: torch.Tensor | None) -> None:
    """Set the switch of a folder, and the head in its only file."""
    record = json.loads((folder / "config.json").read_text())
    record["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(record))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    if head is not None:
        tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors")


def test_the_head_of_a_tied_folder_must_repeat_the_embedding(tmp_path: Path) -> None:
    stock = stock_folder("Qwen2", tmp_path / "hf")
    run = read_model_folder(tmp_path / "hf").model_dump()
    embedding = stock.get_input_embeddings().weight.detach()
    rewrite(tmp_path / "hf", True, embedding.clone())
    assert "head.weight" not in dict(load_huggingface(str(tmp_path / "hf"), run))
    rewrite(tmp_path / "hf", True, embedding + 1)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model"):
        list(load_huggingface(str(tmp_path / "hf"), run))


def test_a_tied_run_refuses_an_untied_folder(tmp_path: Path) -> None:
    stock = stock_folder("Qwen2", tmp_path / "hf")
    run = read_model_folder(tmp_path / "hf").model_dump()
    rewrite(tmp_path / "hf", False, stock.get_input_embeddings().weight.detach() + 1)
    with pytest.raises(CheckpointError, match=r"model.tie_word_embeddings=True"):
        list(load_huggingface(str(tmp_path / "hf"), run))
    rewrite(tmp_path / "hf", False, None)
    untied = run | {"tie_word_embeddings": False}
    with pytest.raises(CheckpointError, match=r"missing \(1\): lm_head.weight"):
        list(load_huggingface(str(tmp_path / "hf"), untied))


DELETED = object()  # value of a key that a config.json does not have

# config.json of published models: what decides the shapes, as facts
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Qwen3-8B": (
        8_190_735_360,
        dict(
            model_type="qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936, rope_theta=1e6,
            rms_norm_eps=1e-6, sliding_window=None, use_sliding_window=False, max_window_layers=36,
        ),
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        dict(
            model_type="llama", hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, intermediate_size=8192, vocab_size=128256, rope_theta=5e5,
            rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=8192),
            max_position_embeddings=131072, tie_word_embeddings=True,
        ),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        dict(
            model_type="mistral", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, intermediate_size=14336, vocab_size=32000, sliding_window=4096,
        ),
    ),
    "gemma-2b": (
        2_506_172_416,
        dict(
            model_type="gemma", hidden_size=2048, num_hidden_layers=18, num_attention_heads=8,
            num_key_value_heads=1, intermediate_size=16384, vocab_size=256000, hidden_act="gelu",
        ),
    ),
    "gemma-2-2b": (
        2_614_341_888,
        dict(
            model_type="gemma2", hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, intermediate_size=9216, vocab_size=256000, sliding_window=4096,
        ),
    ),
    "gemma-3-1b": (
        999_885_952,
        dict(
            model_type="gemma3_text", hidden_size=1152, num_hidden_layers=26, num_attention_heads=4,
            num_key_value_heads=1, intermediate_size=6912, vocab_size=262144, sliding_window=512,
            rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6,
        ),
    ),
    "OLMo-2-1124-7B": (
        7_298_617_344,
        dict(
            model_type="olmo2", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, intermediate_size=11008, vocab_size=100352, rope_theta=5e5,
            max_position_embeddings=4096, rms_norm_eps=1e-6,
        ),
    ),
    "internlm3-8b-instruct": (
        8_804_241_408,
        dict(
            model_type="internlm3", hidden_size=4096, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=2, head_dim=128, intermediate_size=10240, vocab_size=128512, rope_theta=5e7,
            rope_scaling=dict(rope_type="dynamic", factor=6.0), max_position_embeddings=32768, bias=False,
            qkv_bias=False, rms_norm_eps=1e-5,
        ),
    ),
    "Phi-3-mini-4k-instruct": (
        3_821_079_552,
        dict(
            model_type="phi3", hidden_size=3072, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, intermediate_size=8192, vocab_size=32064, sliding_window=2047,
            max_position_embeddings=4096, original_max_position_embeddings=4096,
        ),
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        dict(
            model_type="smollm3", hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
            num_key_value_heads=4, intermediate_size=11008, vocab_size=128256, rope_theta=5e6,
            no_rope_layers=[1, 1, 1, 0] * 9, tie_word_embeddings=True,
        ),
    ),
    "SmolLM2-135M": (
        134_515_008,
        dict(
            model_type="llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, intermediate_size=1536, vocab_size=49152, rope_theta=1e5,
            max_position_embeddings=8192, tie_word_embeddings=True,
        ),
    ),
    "Baichuan2-7B-Base": (
        7_505_973_248,
        dict(
            model_type="baichuan", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            intermediate_size=11008, vocab_size=125696, rms_norm_eps=1e-6, max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        dict(
            model_type="qwen2", hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, intermediate_size=18944, vocab_size=152064, rope_theta=1e6,
            sliding_window=131072, use_sliding_window=False,
        ),
    ),
}  # fmt: skip


WITHOUT_CLASS = {"internlm3": "llama", "baichuan": "llama"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_sizes(name: str) -> None:
    published, record = PUBLISHED[name]
    model = read_model(record, name)
    built = sum(
        parameter.numel()
        for parameter in build_model(model, device="meta").parameters()
    )
    assert built == parameter_count(model) == published


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "gemma" in name])
def test_gemma_files_leave_out_what_transformers_adds(name: str) -> None:
    """Every key that a published config.json lacks: transformers' own configuration has the same values and sizes."""
    published, record = PUBLISHED[name]
    model = read_model(record, name)
    kind = dict(record)
    stock = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(stock)
    assert sum(parameter.numel() for parameter in built.parameters()) == published
    assert model.tie_word_embeddings and stock.tie_word_embeddings
    assert model.head_dim == stock.head_dim
    scalar = getattr(stock, "query_pre_attn_scalar", stock.head_dim)
    assert (model.query_pre_attn_scalar or model.head_dim) == scalar
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        assert getattr(model, key) == getattr(stock, key, None)
    types = getattr(stock, "layer_types", None)
    assert model.layer_types == (None if types is None else tuple(types))
    if "gemma3" in record["model_type"]:
        bases = stock.rope_parameters
        assert model.rope_base == bases["full_attention"]["rope_theta"]
        assert model.local_rope_base == bases["sliding_attention"]["rope_theta"]
    assert stock_count(record) == published


def test_the_page_of_families_has_the_parameters_of_each() -> None:
    page = Path(__file__).parents[4] / "docs" / "models.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    for name, (count, _) in PUBLISHED.items():
        assert any(f"| {name} | {count:,} |" in line for line in lines), name


def stock_count(record: dict[str, Any]) -> int:
    """Return the parameters of the model that transformers builds; of a Llama where it has no class."""
    kind = WITHOUT_CLASS.get(record["model_type"], record["model_type"])
    sizes = {key: value for key, value in record.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types has 1 entries",
        ),
        ("gemma3n_text", {}, "unknown architecture: model_type 'gemma3n_text'"),
        (
            "gemma3",
            {"text_config": {"model_type": "gemma3_text"}},
            "(?s)unknown architecture.*of type 'gemma3_text': save that alone",
        ),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("gemma2", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar is 'x'"),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping, which transformers ignores",
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "'linear' of layers with a window",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is "),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75"),
        ("baichuan", {"hidden_size": 5120, "num_attention_heads": 40}, "ALiBi"),
        ("baichuan", {"max_position_embeddings": DELETED}, "ALiBi"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    kind: str, changes: dict[str, Any], words: str
) -> None:
    from evomesh.errors import UserError

    with pytest.raises(UserError, match=words):
        record = {**SIZES, "model_type": kind, **changes}
        given = {key: value for key, value in record.items() if value is not DELETED}
        read_model(given, "config.json")


@pytest.mark.parametrize(
    ("name", "changes", "lines"),
    [
        (
            "Phi3",
            {"intermediate_size": 100},
            [
                "intermediate_size is 100, but model.layers.0.mlp.gate_up_proj.weight is [128, 32]",
                "model.layers.1.mlp.gate_up_proj.weight is [128, 32], not [200, 32]",
            ],
        ),
        (
            "Phi3",
            {"num_key_value_heads": 4},
            ["layers.1.self_attn.qkv_proj.weight is [64, 32], not [96, 32]"],
        ),
        (
            "SmolLM3",
            {"mlp_bias": True},
            ["missing (6): model.layers.0.mlp.gate_proj.bias [64]"],
        ),
        (
            "Llama",
            {"model_type": "phi5", "architectures": ["Phi5ForCausalLM"]},
            ["model_type 'phi5' (Phi5ForCausalLM)", "phi3", "register_model"],
        ),
    ],
)
def test_a_folder_of_other_tensors_is_refused_with_both_shapes(
    name: str, changes: dict[str, Any], lines: list[str], tmp_path: Path
) -> None:
    stock_folder(name, tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(CheckpointError) as caught:
        from_hf(str(tmp_path / "hf"), str(tmp_path / "c"), None, True, print)
    for line in lines:
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "window", "types"),
    [
        ({"sliding_window": 5}, None, None),
        ({"use_sliding_window": True, "max_window_layers": 2}, None, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096, None),
        (
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            5,
            ("full_attention", "sliding_attention"),
        ),
    ],
)
def test_the_window_of_qwen_is_that_of_transformers(
    settings: dict[str, Any], window: int | None, types: tuple[str, ...] | None
) -> None:
    stock = transformers.Qwen2Config(**SIZES, **settings)
    model = read_model({**SIZES, "model_type": "qwen2", **settings}, "config.json")
    assert (model.sliding_window, model.layer_types) == (window, types)
    windows = [
        stock.sliding_window if kind == "sliding_attention" else None
        for kind in stock.layer_types
    ]
    assert [model.window_of(layer) for layer in range(2)] == windows


def test_defaults_that_a_config_json_leaves_out_are_those_of_transformers() -> None:
    for name in ("Qwen3", "Mistral", "Qwen2", "Phi3", "SmolLM3"):
        kind = name.lower()
        stock = getattr(transformers, f"{name}Config")(**SIZES)
        model: ModelConfig = read_model({**SIZES, "model_type": kind}, "config.json")
        assert model.sliding_window == (
            stock.sliding_window if kind == "mistral" else None
        )
        assert model.head_dim == (getattr(stock, "head_dim", None) or 8)
        assert model.rope_base == stock.rope_parameters["rope_theta"]
    four = {**SIZES, "num_hidden_layers": 9, "model_type": "smollm3"}
    assert read_model(four, "config.json").nope_layers == (3, 7)
    assert transformers.SmolLM3Config(**four).no_rope_layers == [1, 1, 1, 0] * 2 + [1]
