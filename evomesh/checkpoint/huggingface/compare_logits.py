"""Compare the logits of a fixed batch, computed by the native model and by ``transformers``.

Both use the same rounded weights. Neither ever holds more than one layer (or the
embedding, or the head) of the model in memory.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.checkpoint.huggingface.config import (
    CLASSES,
    RotaryScaling,
    SpecialTokenIds,
    build_config,
)
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.huggingface.names import (
    INTERNLM2,
    LLAMA,
    TensorLink,
    native_to_foreign,
    tensor_links,
)
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import ModelConfig
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.registry import build_model

TEXTS = 2  # sequences in the fixed batch
LENGTH = 32  # tokens of each
TOLERANCE = (
    1e-4  # of the largest logit: both compute in float32, the weights being equal
)
NORM_HEAD = {
    "float16": 5e-3,
    "bfloat16": 4e-2,
}  # an exported head is rounded after its rows are normalized

TensorReader = Callable[[str], Tensor]  # reads an unsharded tensor by its name


def has_transformers() -> bool:
    """Return whether ``transformers`` is installed."""
    return importlib.util.find_spec("transformers") is not None


def fixed_batch(vocab_size: int) -> Tensor:
    """Return [TEXTS, LENGTH] token ids, always the same."""
    generator = torch.Generator().manual_seed(20)
    return torch.randint(vocab_size, (TEXTS, LENGTH), generator=generator)


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
    rounded_dtype = getattr(torch, dtype)
    rows = list(fixed_batch(config.vocab_size))
    for layer in range(config.num_layers):
        stage = build_model(config, layer_range=range(layer, layer + 1)).eval()
        for name, parameter in stage.named_parameters():
            parameter.copy_(weights(name).to(rounded_dtype))
        rows = [stage(row, single_sequence(LENGTH)) for row in rows]
        if layer == config.num_layers - 1:
            rows = [stage.logits(row) for row in rows]
        del stage  # freed before the next one is built
    return torch.stack(rows)


@torch.inference_mode()
def stock_logits(record: dict[str, Any], weights: TensorReader, dtype: str) -> Tensor:
    """Return logits [TEXTS, LENGTH, V] of a model of ``transformers``; a module has weights only while it runs.

    Args:
        record: content of a config.json, of an architecture with Llama's weight names.
        weights: reads a tensor by its name in that model.
    """
    transformers: Any = importlib.import_module("transformers")
    wide = wide_dtype(dtype)
    settings = {**record, "dtype": wide, "tie_word_embeddings": False}
    model_class = getattr(transformers, CLASSES[record["model_type"]])
    config = model_class.config_class.from_dict(settings)
    with torch.device("meta"):
        model = model_class(config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(
        config
    )  # its table is computed, not stored

    def load_weights(module: nn.Module, path: str, names: list[str]) -> None:
        for name in names:
            rounded = weights(f"{path}.{name}").to(getattr(torch, dtype))
            value = rounded.to(getattr(torch, wide))
            setattr(module, name, nn.Parameter(value, requires_grad=False))

    def drop_weights(module: nn.Module, names: list[str]) -> None:
        for name in names:
            nothing = torch.empty(0, device="meta")
            setattr(module, name, nn.Parameter(nothing, requires_grad=False))

    # The model is built without storage. Hooks load the weights of a module before it
    # runs and drop them afterwards.
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if names:
            module.register_forward_pre_hook(
                lambda module, _, path=path, names=names: load_weights(
                    module, path, names
                )
            )
            module.register_forward_hook(
                lambda module, *_, names=names: drop_weights(module, names)
            )
    logits: Tensor = model(fixed_batch(config.vocab_size), use_cache=False).logits
    return logits


def folder_logits(
    folder: HfFolder, model: ModelConfig, rotary: RotaryScaling, dtype: str
) -> Tensor:
    """Return logits [TEXTS, LENGTH, V] of a folder of any architecture; InternLM's are computed as a Llama.

    Args:
        model: the section that the folder's config.json describes.
    """
    record = folder.json("config.json")
    architecture = record["model_type"]
    if architecture in ("internlm", "internlm2"):
        no_ids = SpecialTokenIds(None, ())
        record = build_config(model, "llama", rotary, no_ids, dtype)
    reader = (
        _internlm2_reader(folder, model)
        if architecture == "internlm2"
        else _llama_reader(folder)
    )
    return stock_logits(record, reader, dtype)


def _llama_reader(folder: HfFolder) -> TensorReader:
    """Return a reader of Llama's tensors; a head that is tied to the embedding is the embedding."""
    embedding = LLAMA.weight("embedding")
    head = LLAMA.weight("head")
    tied = head not in folder.shapes

    def weights(name: str) -> Tensor:
        return folder.read(embedding if tied and name == head else name)

    return weights


def _internlm2_reader(folder: HfFolder, model: ModelConfig) -> TensorReader:
    """Return a reader of InternLM2's tensors under Llama's names; the fused projection is split."""
    halves = model.model_copy(
        update={"qk_interleaved": False}
    )  # as both architectures have it
    llama_links = tensor_links(halves, LLAMA)
    fused_links = tensor_links(halves, INTERNLM2)
    # Llama's name -> its link, InternLM2's name, and the position among the parts of the fused tensor.
    sources: dict[str, tuple[TensorLink, str, int]] = {}
    embedding = LLAMA.weight("embedding")
    head = LLAMA.weight("head")
    for link, fused in zip(llama_links, fused_links, strict=True):
        for position, name in enumerate(link.foreign):
            sources[name] = (link, fused.foreign[0], position)

    def weights(name: str) -> Tensor:
        link, source, position = sources[
            embedding if halves.tie_word_embeddings and name == head else name
        ]
        parts = native_to_foreign(link, folder.read(source), halves, LLAMA)
        return parts[position]

    return weights


@torch.inference_mode()
def loaded_logits(folder: Path, vocab_size: int, dtype: str) -> Tensor:
    """Return logits [TEXTS, LENGTH, V] of a folder that ``transformers`` loads the usual way, without remote code."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=getattr(torch, wide_dtype(dtype)),
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {}
    for key in ("missing_keys", "unexpected_keys"):
        names = info.get(key) or ()
        wrong[key] = sorted(map(str, names))
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
    difference = float((ours - theirs).abs().max())
    size = float(ours.abs().max())
    tolerance = NORM_HEAD.get(dtype, TOLERANCE) if config.norm_head else TOLERANCE
    limit = size * tolerance
    if not difference <= limit:
        raise CheckpointError(
            f"logits differ by up to {difference:.3g} from the native model's (largest logit {size:.3g})",
            where=where,
            expected=f"at most {limit:.2g}",
            fix="nothing was kept; please report this model's config",
        )
    return difference
