"""Import a checkpoint of XTuner as one of evomesh: weights only, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

from evomesh.checkpoint.deepspeed.load import native_tensors
from evomesh.checkpoint.deepspeed.weights import XTunerWeights
from evomesh.checkpoint.huggingface.to_native import commit_weights
from evomesh.config.schema import Config
from evomesh.storage.urls import open_storage


def from_xtuner(
    source: str,
    target: str,
    config: Config,
    dtype: str | None,
    report: Callable[[str], None],
) -> None:
    """Write step 0 into the save folder ``target``.

    Args:
        config: of the training; its model is what the weights are of.
        dtype: of the stored weights; None: the config's.
    Raises:
        CheckpointError: no such checkpoint, not complete, of another model, or no space; nothing is left then.
    """
    weights = XTunerWeights(source)
    model = config.model
    if dtype is not None:
        model = model.model_copy(update={"dtype": dtype})
    tensors = dict(native_tensors(weights, model))
    storage, root = open_storage(target)
    described = config.model_copy(update={"model": model})
    commit_weights(storage, root, described, tensors, weights.path, state={})
    kind = "a file" if weights.stage is None else f"ZeRO {weights.stage} of DeepSpeed"
    report(
        f"read {weights.path}: {kind}, {len(tensors)} tensors; its optimizer state is not used"
    )
