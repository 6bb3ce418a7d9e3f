"""XTuner's model and tokenizer: which weights, which sizes, which dtype."""

from __future__ import annotations

from pathlib import Path

from evomesh.config.hub_folders import advice_on_missing, find_model_folder
from evomesh.config.hugging_face import read_model_folder
from evomesh.config.known_models import known_model
from evomesh.config.reading.draft import shown
from evomesh.config.reading.xtuner.foreign_names import last_name
from evomesh.config.reading.xtuner.settings import XTunerSettings
from evomesh.config.reading.xtuner.translation import Translation
from evomesh.config.rope import RopeScaling
from evomesh.config.schema import ModelConfig
from evomesh.errors import UserError

PRETRAINED = "model.llm.pretrained_model_name_or_path"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What makes a config one of adapters: the key, and its name.
ADAPTERS = {
    "model.lora": "LoRA",
    "model.llm.quantization_config": "QLoRA (4-bit weights)",
}
# From the sizes in config.json to the keys of the model section.
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_attention_heads": "num_key_value_heads",
    "mlp_ratio": "intermediate_size / hidden_size",
    "multiple_of": "a divisor of intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "no_bias": "bias",
    "qk_interleaved": "rotary pairs are in halves",
    "rope_base": "rope_theta",
    "use_dynamic_ntk_rope": "rope_scaling",
    "rope_scaling_factor": "rope_scaling",
    "max_position_embeddings": "max_position_embeddings",
    "head_dim": "head_dim",
    "o_bias": "model_type",
    "qk_norm": "model_type",
    "sliding_window": "sliding_window",
    "layer_types": "layer_types",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "tie_word_embeddings",
}


def translate_model(out: Translation) -> None:
    """Translate ``model`` and ``tokenizer``: sizes from the weights' folder, and the weights as the start."""
    settings = out.settings
    if _is_refused(settings):
        return
    name = settings.get(PRETRAINED)
    if not isinstance(name, str):
        settings.problem(
            PRETRAINED,
            f"found {shown(name)}",
            expected="a Hugging Face folder or a hub id such as owner/model",
            code="EVO-CONFIG-014",
        )
        return
    _put_sizes(out, name)
    _put_dtype(out)
    recompute = settings.get("model.use_activation_checkpointing", True)
    out.put(
        "model.checkpoint",
        recompute,
        "model.use_activation_checkpointing",
        "recomputation",
    )
    _check_length(out)
    out.put("ckpt.load_ckpt_info.path", name, PRETRAINED)
    out.put("ckpt.load_ckpt_info.content", ["model"], PRETRAINED)
    out.put("ckpt.load_ckpt_info.ckpt_type", "hf", PRETRAINED)
    _put_tokenizer(out)


def _is_refused(settings: XTunerSettings) -> bool:
    """Record a problem for adapters, and for models that are not one language model trained on tokens."""
    for key, adapter in ADAPTERS.items():
        if settings.get(key) is not None:
            settings.problem(
                key,
                f"{adapter} is not part of evomesh, which trains all weights",
                fix="take a full fine-tuning config (evomesh xtuner list-cfg), or train the adapter with XTuner",
                code="EVO-CONFIG-009",
            )
            return True
    kind = last_name(settings.get("model.type"))
    if kind != "SupervisedFinetune":
        settings.problem(
            "model.type",
            f"{kind or 'no type'} is not part of evomesh",
            expected="SupervisedFinetune: a language model, trained on all weights",
            code="EVO-CONFIG-009",
        )
    elif settings.get("model.freeze_llm"):
        settings.problem(
            "model.freeze_llm",
            "frozen weights are not part of evomesh",
            fix="remove it",
            code="EVO-CONFIG-009",
        )
    return kind != "SupervisedFinetune"


def _put_sizes(out: Translation, name: str) -> None:
    found = _find_model(out, name)
    if found is None:
        return
    model, origin = found
    out.values["model_type"] = model.model_type
    out.lines["model_type"] = f"{origin} model_type"
    defaults = ModelConfig(model_type=model.model_type)
    for key, theirs in SIZES.items():
        value = getattr(model, key)
        is_needed = value != getattr(defaults, key) or key in (
            "num_layers",
            "hidden_size",
            "vocab_size",
        )
        if is_needed or key == "qk_interleaved":  # whose default depends on the family
            written = (
                value.model_dump(exclude_none=True)
                if isinstance(value, RopeScaling)
                else value
            )
            out.values.setdefault("model", {})[key] = written
            out.lines[f"model.{key}"] = f"{origin} {theirs}"


def _find_model(out: Translation, name: str) -> tuple[ModelConfig, str] | None:
    """Return the sizes of the weights and where they were read; a problem and None if they are not available."""
    settings = out.settings
    folder = find_model_folder(name)
    if folder is not None:
        try:
            return read_model_folder(folder), str(folder / "config.json")
        except UserError as error:
            settings.problems.append(error)
            return None
    download = advice_on_missing(name)
    model = known_model(name)
    if model is None:
        settings.problem(
            PRETRAINED,
            f"{name!r} is neither a folder nor in the local Hugging Face cache",
            expected="a folder with config.json and weights, or the id of a downloaded model",
            fix=download,
            code="EVO-HF-001",
        )
        return None
    out.warn(
        PRETRAINED,
        f"{name} is not in the local Hugging Face cache, only its sizes are known; {download}",
    )
    return model, f"{name} config.json"


def _put_dtype(out: Translation) -> None:
    """Translate the precision: XTuner takes bfloat16 where the device has it, unless the config names one."""
    name = last_name(out.settings.get("optim_wrapper.dtype"))
    if name:
        out.put("model.dtype", f"torch.{name}", "optim_wrapper.dtype")
    else:
        out.put(
            "model.dtype",
            "torch.bfloat16",
            "",
            "no dtype is given: XTuner's choice on devices that have it",
        )


def _check_length(out: Translation) -> None:
    key = "model.max_position_embeddings"
    wanted = out.settings.get(key)
    trained = out.values.get("model", {}).get("max_position_embeddings", 2048)
    if isinstance(wanted, int) and wanted > trained:
        out.settings.problem(
            key,
            f"{wanted} positions with a model of {trained} mean linear rotary scaling, which is not part of evomesh",
            expected=f"at most {trained}",
            fix="remove it, or set model.rope_base (--set model.rope_base=...) for longer sequences",
            code="EVO-CONFIG-009",
        )


def _put_tokenizer(out: Translation) -> None:
    key = "tokenizer.pretrained_model_name_or_path"
    name = out.settings.get(key)
    if not isinstance(name, str):
        return
    folder = find_model_folder(name)
    if folder is None:
        return
    files = [Path(folder, file) for file in TOKENIZER_FILES]
    if any(file.exists() for file in files):
        out.put("data.tokenizer_path", str(folder), key)
