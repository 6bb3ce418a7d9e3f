"""Compute the logits of a Hugging Face folder with ``transformers``, which reads the folder itself.

Nothing here uses our readers, names or conversions, since it is what they are compared
with. The weights stay in the dtype of the files (safetensors: mapped from the disk); a
module has them in the dtype to compute in only while it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.checkpoint.huggingface.folder import BUFFERS, HfFolder
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.storage.base import Storage, join
from evomesh.storage.local import LocalStorage

TEXTS = 2  # sequences in the fixed batch
LENGTH = 32  # tokens of each
# Families that transformers has no class for; it computes them as a Llama.
WITHOUT_CLASS = ("internlm", "internlm2", "internlm3", "baichuan")
# In the order in which transformers looks for weights.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
COPIED_BYTES = 1 << 24  # at once, from a store
QKV = ("q_proj", "k_proj", "v_proj")


def has_transformers() -> bool:
    """Return whether ``transformers`` is installed."""
    return importlib.util.find_spec("transformers") is not None


def fixed_batch(vocab_size: int) -> Tensor:
    """Return [TEXTS, LENGTH] token ids, always the same."""
    generator = torch.Generator().manual_seed(20)
    return torch.randint(vocab_size, (TEXTS, LENGTH), generator=generator)


def wide_dtype(dtype: str) -> str:
    """Return the dtype to compute in: float64 for float64 weights, else float32."""
    return "float64" if dtype == "float64" else "float32"


@torch.inference_mode()
def stock_logits(folder: Path, dtypes: Sequence[str]) -> Tensor:
    """Return the logits [TEXTS, LENGTH, V] of a local folder.

    ``transformers`` loads it without remote code. InternLM's folders, for which it has no
    class, are computed as the Llama that they describe.

    Args:
        dtypes: what the weights are rounded to, one after the other.
    Raises:
        CheckpointError: transformers misses tensors of the model, or finds others.
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = folder / "config.json"
    record = json.loads(config.read_text(encoding="utf-8"))
    if record["model_type"] in WITHOUT_CLASS:
        model = _as_llama(folder, record, transformers)
    else:
        model = _loaded(folder, dtypes[0], transformers)
    for module in model.modules():
        _widen_scale(module, wide_dtype(dtypes[-1]))
        _round_while_running(module, dtypes)
    if _is_baichuan2(record):
        # After the hook that rounds the rows, as Baichuan2 normalizes what is stored.
        model.lm_head.register_forward_pre_hook(_normalize_rows)
    batch = fixed_batch(model.config.vocab_size)
    model.eval()
    logits: Tensor = model(batch, use_cache=False).logits
    return logits


def _loaded(folder: Path, dtype: str, transformers: Any) -> Any:
    """Load a folder the usual way."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(
            str(folder),
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever it raises says something about the folder
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"transformers cannot load it: {type(error).__name__}: {reason}",
            where=str(folder),
            code="EVO-HF-006",
        ) from None
    wrong = {}
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info.get(key) or ()))
        wrong[key] = [name for name in names if not name.endswith(BUFFERS)]
    if any(wrong.values()):
        raise CheckpointError(
            f"transformers reports {wrong}", where=str(folder), code="EVO-HF-006"
        )
    return model


def _widen_scale(module: nn.Module, dtype: str) -> None:
    """Give Gemma's embedding its factor sqrt(hidden_size) in the dtype to compute in.

    It is a constant, not a weight; loading in bfloat16 has rounded it.
    """
    scale = getattr(module, "scalar_embed_scale", None)
    if scale is not None:
        module.embed_scale = torch.tensor(scale, dtype=getattr(torch, dtype))


def _round_while_running(module: nn.Module, dtypes: Sequence[str]) -> None:
    """Let a module's own weights be rounded, and widened to compute in, before it runs.

    They are put back after it.
    """
    # model.to(float32) would hold the whole model in float32, twice the memory that its
    # files take. So only the weights of the module that runs are wide.
    own_parameters = module.named_parameters(recurse=False)
    stored = dict(own_parameters)
    if not stored:
        return
    last = dtypes[-1]
    steps = [*dtypes, wide_dtype(last)]

    def widen(module: nn.Module, _: Any) -> None:
        wide = {}
        for name, parameter in stored.items():
            rounded = _round(parameter.detach(), steps)
            wide_parameter = nn.Parameter(rounded, requires_grad=False)
            wide[name] = wide_parameter
        _set_parameters(module, wide)

    def put_back(module: nn.Module, *_: Any) -> None:
        _set_parameters(module, stored)

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(put_back)


def _set_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        setattr(module, name, parameter)


def _round(value: Tensor, dtypes: Sequence[str]) -> Tensor:
    """Convert a tensor to one dtype after the other."""
    for name in dtypes:
        dtype = getattr(torch, name)
        value = value.to(dtype)
    return value


def _is_baichuan2(record: dict[str, Any]) -> bool:
    """Return whether a folder is of Baichuan2; the first Baichuan has a vocabulary of 64,000 and a plain head."""
    return bool(record["model_type"] == "baichuan" and record["vocab_size"] != 64000)


def _normalize_rows(head: nn.Module, _: Any) -> None:
    rows = head.get_parameter("weight")
    head.weight = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))


def _as_llama(folder: Path, record: dict[str, Any], transformers: Any) -> Any:
    """Build the Llama that a folder of InternLM, InternLM2, InternLM3 or Baichuan describes.

    All are Llamas with biases that are switched by ``bias``; InternLM2 has other names
    and one matrix for queries, keys and values. In InternLM3 ``bias`` is that of the
    attention output and the feed-forward network, ``qkv_bias`` the others'. Baichuan has
    one matrix with the rows of q, of k and of v.
    """
    # 1. The weights under a Llama's names.
    kind = record["model_type"]
    settings = _llama_settings(record)
    config = transformers.LlamaConfig.from_dict(settings)
    weights = _read_weights(folder)
    if kind == "internlm2":
        weights = _llama_names(weights, config)
    if kind == "baichuan":
        weights = _without_w_pack(weights)
    if config.tie_word_embeddings and "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    # 2. A Llama that takes them as they are, without being initialized first.
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    if kind == "internlm3" and config.attention_bias:
        names = model.state_dict().keys()
        _add_zero_biases(weights, names)
    model.load_state_dict(weights, assign=True)

    # 3. Its table of angles is computed and not stored, so it is still without values.
    decoder = model.model
    rotary_class = type(decoder.rotary_emb)
    decoder.rotary_emb = rotary_class(config)
    return model


def _add_zero_biases(weights: dict[str, Tensor], names: Iterable[str]) -> None:
    """Add the biases of attention that are off: a Llama has all of them or none."""
    for name in names:
        is_off = name not in weights
        if is_off and _is_attention_bias(name):
            name_of_weight = name.replace(".bias", ".weight")
            weight = weights[name_of_weight]
            weights[name] = weight.new_zeros(len(weight))


def _llama_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the Llama that a config.json of these families means."""
    kind = record["model_type"]
    bias = bool(record.get("bias", kind == "internlm"))
    # The InternLM of 2023 has its base in a section ``rotary``.
    rotary = record.get("rotary") or {}
    base = rotary.get("base", 10000.0)
    return {
        **record,
        "model_type": "llama",
        "attention_bias": bias or bool(record.get("qkv_bias")),
        "mlp_bias": bias and kind == "internlm3",
        "rope_theta": record.get("rope_theta") or base,
    }


def _is_attention_bias(name: str) -> bool:
    return ".self_attn." in name and name.endswith(".bias")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder with the libraries that wrote them."""
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        if file.suffix == ".safetensors":
            stored |= load_file(file)
        else:
            stored |= torch.load(file, map_location="cpu", weights_only=True)
    weights = {}
    for name, value in stored.items():
        if not name.endswith(BUFFERS):
            weights[name] = value
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """Return the files with weights: the first kind that is there, or those that its index names."""
    candidates = [folder / name for name in WEIGHT_FILES]
    existing = [file for file in candidates if file.exists()]
    first = existing[0]
    if first.suffix != ".json":
        return [first]
    return [folder / name for name in _indexed_files(first)]


def _indexed_files(index: Path) -> list[str]:
    """Return the names of the files in an index of tensors, each once."""
    text = index.read_text(encoding="utf-8")
    file_of_tensor = json.loads(text)["weight_map"]
    names = set(file_of_tensor.values())
    return sorted(names)


# InternLM2's module -> Llama's
_LLAMA_MODULES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _llama_names(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return InternLM2's weights under Llama's names, with the fused weight as three."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".attention.wqkv." not in name:
            llama_name = _llama_name(name)
            renamed[llama_name] = value
            continue
        for part, rows in _split_wqkv(value, config).items():
            llama_name = name.replace("attention.wqkv", f"self_attn.{part}")
            renamed[llama_name] = rows
    return renamed


def _split_wqkv(value: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the rows of q, k and v.

    Rows of ``wqkv``: for each key/value head its query heads, then the key, then the
    value.
    """
    queries = config.num_attention_heads // config.num_key_value_heads  # R
    heads = {
        "q_proj": queries,
        "k_proj": 1,
        "v_proj": 1,
    }
    sizes = list(heads.values())
    # [G (R + 2) H, ...] -> [G, R + 2, H, ...]: the heads of a group beside each other.
    columns = value.shape[1:]
    shape = (-1, sum(sizes), config.head_dim)
    groups = value.reshape(*shape, *columns)
    parts = torch.split(groups, sizes, dim=1)
    projections = {}
    for name, part in zip(heads, parts, strict=True):
        projections[name] = part.flatten(0, 2)
    return projections


def _without_w_pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Baichuan's weights with the rows of each W_pack in three matrices: of q, of k and of v."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".W_pack." not in name:
            renamed[name] = value
            continue
        matrices = value.chunk(3)
        parts = zip(QKV, matrices, strict=True)
        for part, matrix in parts:
            llama_name = name.replace("W_pack", part)
            renamed[llama_name] = matrix.contiguous()
    return renamed


def _llama_name(name: str) -> str:
    if name.startswith("output."):
        return name.replace("output.", "lm_head.", 1)
    for theirs, llama in _LLAMA_MODULES.items():
        if f".{theirs}." in name:
            return name.replace(theirs, llama)
    return name


@contextmanager
def local_copy(folder: HfFolder) -> Iterator[str]:
    """Yield the local path of a folder; of one in a store, a copy that is deleted at the end."""
    if isinstance(folder.storage, LocalStorage):
        yield folder.path
        return
    storage = folder.storage
    names = {"config.json", *folder.files.values()}
    for name in storage.list(folder.path):
        if name in WEIGHT_FILES and name.endswith("json"):
            names.add(name)
    with TemporaryDirectory(prefix="evomesh-compare-") as copy:
        for name in sorted(names):
            source = join(folder.path, name)
            target = Path(copy, name)
            _download(storage, source, target)
        yield copy


def _download(storage: Storage, source: str, target: Path) -> None:
    size = storage.size(source)
    with open(target, "wb") as file:
        for start in range(0, size, COPIED_BYTES):
            length = min(COPIED_BYTES, size - start)
            file.write(storage.read(source, start, length))
