"""Comparison of two folders that should hold one model: logits of a fixed batch, by two programs.

Both use the same rounded weights. Neither program ever holds more than one layer (or the embedding, or the head)
of the model in memory.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.checkpoint.huggingface.config import RotaryScaling, SpecialTokenIds, build_config
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.huggingface.names import INTERNLM2, LLAMA, native_to_foreign, tensor_links
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import ModelConfig
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.registry import build_model

TEXTS, LENGTH = 2, 32  # the fixed batch
TOLERANCE = 1e-4  # of the largest logit: both compute in float32, the weights being equal
NORM_HEAD = {"float16": 5e-3, "bfloat16": 4e-2}  # an exported head is rounded after its rows are normalized

TensorReader = Callable[[str], Tensor]  # reads an unsharded tensor by its name


def has_transformers() -> bool:
    """Return whether ``transformers`` is installed."""
    return importlib.util.find_spec("transformers") is not None


def fixed_batch(vocab_size: int) -> Tensor:
    """Return [TEXTS, LENGTH] token ids, always the same."""
    return torch.randint(vocab_size, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(20))


def wide_dtype(dtype: str) -> str:
    """Return the dtype to compute in: float64 for a float64 export, else float32."""
    return "float64" if dtype == "float64" else "float32"


@torch.inference_mode()
def native_logits(config: ModelConfig, weights: TensorReader, dtype: str) -> Tensor:
    """Return the native model's logits [TEXTS, LENGTH, V], its weights rounded to ``dtype``, one layer at a time."""
    changes = {
        "dtype": wide_dtype(dtype),
        "use_fp32_norm": False,
        "compile": False,
        "residual_in_fp32": False,
    }
    config = config.model_copy(update=changes)
    rows = list(fixed_batch(config.vocab_size))
    for layer in range(config.num_layers):
        stage = build_model(config, layer_range=range(layer, layer + 1)).eval()
        for name, parameter in stage.named_parameters():
            parameter.copy_(weights(name).to(getattr(torch, dtype)))
        rows = [stage(row, single_sequence(LENGTH)) for row in rows]
        if layer == config.num_layers - 1:
            rows = [stage.logits(row) for row in rows]
        del stage  # so that the next one does not add to it
    return torch.stack(rows)


@torch.inference_mode()
def llama_logits(record: dict[str, Any], weights: TensorReader, dtype: str) -> Tensor:
    """Return logits [TEXTS, LENGTH, V] of the Llama of ``transformers``; a module has weights only while it runs.

    Args:
        record: content of a config.json.
        weights: by the names of that Llama.
    """
    transformers: Any = importlib.import_module("transformers")
    wide = wide_dtype(dtype)
    config = transformers.LlamaConfig.from_dict({**record, "dtype": wide, "tie_word_embeddings": False})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is computed, not stored

    def load_weights(module: nn.Module, path: str, names: list[str]) -> None:
        for name in names:
            rounded = weights(f"{path}.{name}").to(getattr(torch, dtype))
            value = rounded.to(getattr(torch, wide))
            setattr(module, name, nn.Parameter(value, requires_grad=False))

    def drop_weights(module: nn.Module, names: list[str]) -> None:
        for name in names:
            setattr(module, name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))

    # The model is built without storage. Hooks give each module its weights before it runs, and take them afterwards.
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if names:
            module.register_forward_pre_hook(
                lambda module, _, path=path, names=names: load_weights(module, path, names)
            )
            module.register_forward_hook(lambda module, *_, names=names: drop_weights(module, names))
    logits: Tensor = model(fixed_batch(config.vocab_size), use_cache=False).logits
    return logits


def folder_logits(folder: HfFolder, model: ModelConfig, rotary: RotaryScaling, dtype: str) -> Tensor:
    """Return logits [TEXTS, LENGTH, V] of a folder by ``llama_logits``, as a Llama whatever its architecture.

    Args:
        model: the section that the folder's config.json describes.
    """
    record = folder.json("config.json")
    if record["model_type"] != "llama":
        kind = record["model_type"]
        record = build_config(model, "llama", rotary, SpecialTokenIds(None, ()), dtype)
        if kind == "internlm2":
            return llama_logits(record, _llama_names(folder, model), dtype)
    embedding, head = LLAMA.weight("embedding"), LLAMA.weight("head")
    tied = head not in folder.shapes
    return llama_logits(record, lambda name: folder.read(embedding if tied and name == head else name), dtype)


def _llama_names(folder: HfFolder, model: ModelConfig) -> TensorReader:
    """Return a reader of InternLM2's tensors under Llama's names; the fused projection is split."""
    halves = model.model_copy(update={"qk_interleaved": False})  # as both architectures have it
    pairs = zip(tensor_links(halves, LLAMA), tensor_links(halves, INTERNLM2), strict=True)
    places = {
        name: (link, fused.foreign[0], n) for link, fused in pairs for n, name in enumerate(link.foreign)
    }

    def weights(name: str) -> Tensor:
        link, source, number = places[name]
        return native_to_foreign(link, folder.read(source), halves, LLAMA)[number]

    return weights


@torch.inference_mode()
def loaded_logits(folder: Path, vocab_size: int, dtype: str) -> Tensor:
    """Return logits [TEXTS, LENGTH, V] of a folder that ``transformers`` loads as its users do, without remote code."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=getattr(torch, wide_dtype(dtype)),
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        raise CheckpointError(f"transformers reports {wrong}", where=str(folder))
    model.eval()
    logits: Tensor = model(fixed_batch(vocab_size)).logits
    return logits


def largest_logit_difference(
    ours: Tensor, theirs: Tensor, config: ModelConfig, dtype: str, where: str
) -> float:
    """Return the largest difference between two models' logits.

    Raises:
        CheckpointError: logits are not finite, or differ by more than rounding explains.
    """
    if not bool(torch.isfinite(ours).all()):
        raise CheckpointError("the native model's logits are not finite", where=where)
    difference, size = float((ours - theirs).abs().max()), float(ours.abs().max())
    limit = size * (NORM_HEAD.get(dtype, TOLERANCE) if config.norm_head else TOLERANCE)
    if not difference <= limit:
        raise CheckpointError(
            f"logits differ by up to {difference:.3g} from the native model's (largest logit {size:.3g})",
            where=where,
            expected=f"at most {limit:.2g}",
            fix="nothing was kept; please report this model's config",
        )
    return difference
