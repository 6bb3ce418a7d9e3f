"""Resolve ``model.from_hf``: the family and all sizes are those of a Hugging Face folder's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomesh.config.families import ARCHITECTURE_KEYS
from evomesh.config.hub_folders import advice_on_missing, find_model_folder
from evomesh.config.hugging_face import read_model_folder
from evomesh.config.reading.draft import ConfigDraft, shown
from evomesh.config.rope import RopeScaling
from evomesh.config.schema import ModelConfig
from evomesh.errors import UserError

KEY = "model.from_hf"
# What the folder decides; a config may repeat it, not contradict it.
FACTS = (
    "model_type",
    "num_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_kv_attention_heads",
    "head_dim",
    "layer_norm_epsilon",
    "no_bias",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
    "qk_norm",
    *ARCHITECTURE_KEYS,
    "sliding_window",
    "layer_types",
    "nope_layers",
    "rope_base",
    "rope_scaling",
    "use_dynamic_ntk_rope",
    "rope_scaling_factor",
    "tie_word_embeddings",
)
WIDTH = ("mlp_ratio", "multiple_of")
# What a config may change: the weights compute the same all the same.
LENGTH = ("max_position_embeddings",)
DEFAULTS = ("dtype", "qk_interleaved", *LENGTH)
# They belong together: a section that names one of them describes its own scaling.
SCALING = ("rope_scaling", "use_dynamic_ntk_rope", "rope_scaling_factor")
HF_LOADERS = ("hf", "hf_llama", "hf_model", "llama")
LOAD_INFO = "ckpt.load_ckpt_info"


def resolve_from_hf(draft: ConfigDraft, model: dict[str, Any]) -> None:
    """Fill the model section from the folder that it names, and record what contradicts the folder."""
    name = model.pop("from_hf", None)
    if name is None:
        return
    found = _read(draft, name)
    if found is None:
        return
    # Of a folder without a normalized head, the config decides.
    facts = (*FACTS, "norm_head") if found.norm_head else FACTS
    for key in facts:
        value = _plain(getattr(found, key))
        if _plain(model.get(key, value)) != value:
            draft.problem(
                "model_type" if key == "model_type" else f"model.{key}",
                f"found {model[key]!r}, but {name} has {value!r}",
                fix="remove it: model.from_hf sets it",
                code="EVO-CONFIG-007",
            )
        _put(draft, model, key, value)
    _resolve_width(draft, model, found, name)
    for key in DEFAULTS:
        if model.get(key) is None and not (
            key == "qk_interleaved" and "adapt_hf" in model
        ):
            _put(draft, model, key, getattr(found, key))


def take_from_load_info(draft: ConfigDraft, model: dict[str, Any]) -> None:
    """Fill what the model section leaves out from the folder whose weights ``ckpt.load_ckpt_info`` takes.

    What the section contradicts is refused when the weights are loaded, with both
    values; so is a folder that cannot be read from here.
    """
    found = _first_weights(draft)
    if found is None:
        return
    # 1. Which facts of the folder may be taken at all.
    keys = {*FACTS, *LENGTH, "norm_head"}
    if model.keys().isdisjoint(WIDTH):
        keys.update(WIDTH)
    if found.kv_heads == found.num_attention_heads:
        keys.remove("num_kv_attention_heads")  # the default of every family

    # 2. What the section gives stays. The scaling of angles is one fact in several keys:
    #    whoever gives one of them gives all.
    given = {key for key, value in model.items() if value is not None}
    if not given.isdisjoint(SCALING):
        keys.difference_update(SCALING)
    keys -= given
    for key in sorted(keys):
        value = getattr(found, key)
        _put(draft, model, key, value, LOAD_INFO)


def _first_weights(draft: ConfigDraft) -> ModelConfig | None:
    """Return the model of the local folder in ``ckpt.load_ckpt_info``, None without a readable one."""
    ckpt = draft.values.get("ckpt", draft.sections.get("ckpt"))
    info = ckpt.get("load_ckpt_info") if isinstance(ckpt, Mapping) else None
    if not isinstance(info, Mapping) or info.get("ckpt_type") not in HF_LOADERS:
        return None
    path = info.get("path")
    folder = find_model_folder(path) if isinstance(path, str) else None
    if folder is None:
        return None
    try:
        return read_model_folder(folder)
    except UserError:
        return None


def take_checkpoint_folder(
    draft: ConfigDraft, model: dict[str, Any], model_type: str
) -> None:
    """Resolve InternEvo's types "INTERNLM_FROM_HF", "AUTO" ...: the model is that of the checkpoint to start from."""
    if "from_hf" in model:
        return
    ckpt = draft.values.get("ckpt")
    info = ckpt.get("load_ckpt_info") if isinstance(ckpt, Mapping) else None
    path = info.get("path") if isinstance(info, Mapping) else None
    if isinstance(path, str):
        model["from_hf"] = path.removeprefix("local:")
        draft.sources[KEY] = "ckpt.load_ckpt_info.path"
    else:
        draft.problem(
            "model_type",
            f"{model_type} takes the model from a Hugging Face folder, and there is none",
            expected="ckpt.load_ckpt_info=dict(path=FOLDER, ...), or model.from_hf",
            fix=f'set {KEY}="FOLDER"',
            code="EVO-CONFIG-003",
        )


def _read(draft: ConfigDraft, name: Any) -> ModelConfig | None:
    folder = find_model_folder(name) if isinstance(name, str) else None
    if folder is None:
        draft.problem(
            KEY,
            f"found {shown(name)}",
            expected="a local Hugging Face folder, or the id of a model in the local hub cache",
            fix=advice_on_missing(name) if isinstance(name, str) else "",
            code="EVO-CONFIG-002",
        )
        return None
    try:
        return read_model_folder(folder)
    except UserError as error:
        draft.problem(
            KEY,
            f"{error.where}: {error.found}",
            expected=error.expected,
            fix=error.fix,
            code=error.code,
        )
        return None


def _resolve_width(
    draft: ConfigDraft, model: dict[str, Any], found: ModelConfig, name: str
) -> None:
    """Take the width of the feed-forward network; a config may write the same width as another product."""
    written = {key: model[key] for key in WIDTH if key in model}
    if not written:
        for key in WIDTH:
            _put(draft, model, key, getattr(found, key))
        return
    same_sizes = {"hidden_size": found.hidden_size, **written}
    width = ModelConfig.model_construct(**same_sizes).mlp_width
    if width != found.mlp_width:
        draft.problem(
            f"model.{next(iter(written))}",
            f"a feed-forward width of {width}, but {name} has {found.mlp_width}",
            fix="remove mlp_ratio and multiple_of: model.from_hf sets them",
            code="EVO-CONFIG-007",
        )


def _put(
    draft: ConfigDraft,
    model: dict[str, Any],
    key: str,
    value: Any,
    source: str = KEY,
) -> None:
    if key not in model and value is not None:
        draft.sources[f"model.{key}"] = source
    # None is a value where a family has another default, as Gemma 2 of its soft caps.
    if value is not None or key in ARCHITECTURE_KEYS:
        model[key] = value


def _plain(value: Any) -> Any:
    """Return a rotary scaling as a dict without the keys that are None, and any other value as it is."""
    if isinstance(value, RopeScaling):
        value = value.model_dump()
    if not isinstance(value, Mapping):
        return value
    lists_as_tuples = {
        key: tuple(item) if isinstance(item, list) else item
        for key, item in value.items()
    }
    return {key: item for key, item in lists_as_tuples.items() if item is not None}
