"""Present a checkpoint of XTuner as a folder of weights under the names of its base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from evomesh.checkpoint.deepspeed.find import find_checkpoint
from evomesh.checkpoint.deepspeed.gather import Weight, gather_weights
from evomesh.checkpoint.deepspeed.shards import INERT, open_zero_folder
from evomesh.checkpoint.huggingface.folder import BUFFERS
from evomesh.checkpoint.huggingface.names import INTERNLM2, LLAMA, NameMap
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.pickles import open_pickle
from evomesh.checkpoint.stored_tensor import StoredTensor

MODEL = "llm."  # of XTuner's SupervisedFinetune, before the base model's names
WRAPPER = "module."  # of wrappers for data parallelism
ADAPTER_MARKS = ("base_model.model.", ".lora_A.", ".lora_B.")


class XTunerWeights:
    """The weights of an ``iter_N.pth``, file or folder; ``read`` reads one, nothing else does.

    Attributes:
        path: of the checkpoint.
        record: what is stored beside the weights: ``meta``, and the counters of DeepSpeed.
        stage: of ZeRO; None for a file.

    Raises:
        CheckpointError: there is no such checkpoint, it is not complete, or not one of a whole language model.
    """

    reads_boxes = False

    def __init__(self, url: str) -> None:
        place = find_checkpoint(url)
        self.path = str(place)
        self.stage: int | None = None
        self.record: Mapping[str, Any]
        if place.is_dir():
            folder = open_zero_folder(place)
            self.stage = folder.stage
            self.record = folder.first
            found = gather_weights(folder)
        else:
            self.record, found = _open_file(place)
        self._weights = _without_prefixes(found, self.path)

    @property
    def shapes(self) -> dict[str, Coordinates]:
        return {name: weight.shape for name, weight in self._weights.items()}

    @property
    def naming(self) -> NameMap:
        """Return the names of the base model's family, which the weights have."""
        embedding = INTERNLM2.weight("embedding")
        return INTERNLM2 if embedding in self._weights else LLAMA

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Read one tensor, or only a box of it, in its stored dtype."""
        whole = self._weights[name].read()
        return whole if box is None else whole[box.within(Box.whole(whole.shape))]


def _open_file(file: Path) -> tuple[Mapping[str, Any], dict[str, Weight]]:
    """Open a file of mmengine: a dict with state_dict, meta and message_hub, or a state dict alone."""
    content = open_pickle(str(file), INERT)
    record: Mapping[str, Any] = content if isinstance(content, Mapping) else {}
    state = record.get("state_dict", record)
    weights: dict[str, Weight] = {}
    if isinstance(state, Mapping):
        for name, value in state.items():
            if isinstance(value, StoredTensor):
                weights[name] = value
    if not weights:
        raise CheckpointError(
            "holds no named tensors",
            where=str(file),
            expected="a checkpoint of XTuner: a dict with state_dict",
            code="EVO-CKPT-020",
        )
    return record, weights


def _without_prefixes(weights: Mapping[str, Weight], where: str) -> dict[str, Weight]:
    """Return the weights under the base model's names.

    Raises:
        CheckpointError: adapters, or parts of another model beside the language model.
    """
    plain = {name.removeprefix(WRAPPER): weight for name, weight in weights.items()}
    _refuse_adapters(plain, where)
    # Trainers other than XTuner save the language model alone.
    has_prefix = any(name.startswith(MODEL) for name in plain)
    named = {}
    others = []
    for name, weight in plain.items():
        bare = name.removeprefix(MODEL)
        if has_prefix and bare == name:
            # Counters and the like are no model's.
            if len(weight.shape) > 1:
                others.append(name)
        elif not bare.endswith(BUFFERS):
            named[bare] = weight
    if others:
        raise CheckpointError(
            f"{len(others)} tensors are not of the language model: {', '.join(others[:4])}",
            where=where,
            expected=f"names that start with {MODEL}",
            fix="image and reward models are not part of evomesh: convert it with XTuner",
            code="EVO-CKPT-020",
        )
    return named


def _refuse_adapters(names: Iterable[str], where: str) -> None:
    for name in names:
        if any(mark in name for mark in ADAPTER_MARKS):
            raise CheckpointError(
                f"holds an adapter ({name}), and LoRA adapters are not part of evomesh",
                where=where,
                fix="merge it with XTuner or peft; evomesh reads the merged folder",
                code="EVO-CONFIG-009",
            )
