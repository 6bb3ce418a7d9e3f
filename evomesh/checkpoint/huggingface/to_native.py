"""``from-hf``: a foreign model folder as a checkpoint of ours, weights only, one tensor at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from evomesh.checkpoint.huggingface.compare_logits import (
    folder_logits,
    has_transformers,
    largest_difference,
    native_logits,
    read_tensor,
)
from evomesh.checkpoint.huggingface.config import read_config, rotary_of
from evomesh.checkpoint.huggingface.files import whole
from evomesh.checkpoint.huggingface.folder import HfFolder, open_folder
from evomesh.checkpoint.huggingface.load import ForeignTensor, tensors
from evomesh.checkpoint.huggingface.names import NAMINGS, our_shapes
from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native import write
from evomesh.checkpoint.native.boxes import Box, LocalPart
from evomesh.checkpoint.native.disk_space import readable
from evomesh.checkpoint.native.find import Checkpoint, open_checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.plan import WriteItem, in_file_order
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config, DataConfig, GenerationConfig, ModelConfig
from evomesh.data.tokenizer import check_tokenizer_fits, load_tokenizer
from evomesh.errors import UserError
from evomesh.layers.dtype import parameter_dtype
from evomesh.storage.base import Storage, join
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import open_storage


def from_hf(source: str, target: str, dtype: str | None, compare: bool, report: Callable[[str], None]) -> str:
    """Writes step 0 into the save folder ``target`` and returns the step folder.

    Raises:
        CheckpointError: not a folder of a known architecture, wrong tensors, no space; nothing is left then.
    """
    folder = open_folder(source)
    config, weights = read_folder(folder, dtype, report)
    model = config.model
    storage, root = open_storage(target)
    step = join(root, fmt.folder_name(0))
    if storage.exists(join(step, fmt.COMMIT)):
        raise CheckpointError("step 0 is already committed there", where=target, fix="give another folder")
    entries = _entries(model)
    _refuse_full(
        storage, root, sum(entry.part.box.numel * fmt.DTYPES[entry.dtype].itemsize for entry in entries)
    )
    attempt = secrets.token_hex(4)
    try:
        body = _write(storage, root, step, attempt, entries, weights, config)
        write.publish(storage, step, body)
        if compare:
            report(_compare(open_checkpoint(storage, step), model, folder))
    except OSError as error:
        _clean(storage, step, attempt)
        raise write.refusal(error, step) from None
    except BaseException:
        _clean(storage, step, attempt)
        raise
    report(f"wrote {step}: {model.model_type}, {model.dtype}, {readable(body['tensor_bytes'])}")
    return step


def read_folder(
    folder: HfFolder, dtype: str | None, report: Callable[[str], None]
) -> tuple[Config, dict[str, ForeignTensor]]:
    """The config that describes a folder's model, tokenizer and generation ids, and its weights, none read yet.

    Args:
        dtype: of the parameters; None: the folder's.
    Raises:
        CheckpointError: not a folder of a known architecture, wrong tensors, or a tokenizer larger than the embedding.
    """
    record = folder.json("config.json")
    model = read_config(record, join(folder.path, "config.json"), dtype)
    naming = NAMINGS[record["model_type"]]
    weights = dict(tensors(folder, naming, model, tied=bool(record.get("tie_word_embeddings"))))
    config = Config(
        model=model,
        data=DataConfig(
            seq_len=model.max_position_embeddings, tokenizer_path=_tokenizer(folder, model, report)
        ),
        generation=_generation(folder, record),
    )
    return config, weights


def _entries(model: ModelConfig) -> list[WriteItem]:
    word = fmt.DTYPE_NAMES[parameter_dtype(model.dtype)]
    shapes = our_shapes(model).items()
    return in_file_order(
        [WriteItem(name, word, shape, LocalPart(torch.empty(0), whole(shape))) for name, shape in shapes]
    )


def _refuse_full(storage: Storage, root: str, needed: int) -> None:
    free = storage.free_bytes(root)
    if free is not None and free < needed:
        raise CheckpointError(
            f"the checkpoint needs {readable(needed)}, {readable(free)} are free",
            where=root,
            fix="free space, or import a smaller --dtype",
        )


def _write(
    storage: Storage,
    root: str,
    step: str,
    attempt: str,
    entries: list[WriteItem],
    weights: Mapping[str, ForeignTensor],
    config: Config,
) -> dict[str, Any]:
    def pieces(entry: WriteItem) -> Iterator[tuple[Box, memoryview]]:
        """The bytes of one of our tensors, made from theirs at the moment it is written."""
        tensor = weights[entry.name].read().to(fmt.DTYPES[entry.dtype]).contiguous()
        yield from write.live_pieces(
            WriteItem(entry.name, entry.dtype, entry.shape, LocalPart(tensor, entry.part.box))
        )

    storage.make_folder(step)
    message = write.write_data(storage, step, attempt, 0, entries, pieces)
    storage.sync(root)
    body = write.body(0, attempt, {}, config_to_dict(config))
    body |= {"layout": dict.fromkeys(("world", "tp", "wp", "pp", "dp", "zero"), 1)}
    body |= {"parent": None, "snapshot": False}
    return body | write.write_index(
        storage, step, attempt, {e.name: (e.dtype, e.shape) for e in entries}, [message]
    )


def _clean(storage: Storage, step: str, attempt: str) -> None:
    for name in (fmt.COMMIT, fmt.index_name(attempt), fmt.file_name(attempt, 0)):
        storage.delete(join(step, name))
    if not storage.list(step):
        storage.delete_folder(step)


def _tokenizer(folder: HfFolder, model: ModelConfig, report: Callable[[str], None]) -> str | None:
    if not isinstance(folder.storage, LocalStorage):
        report("the checkpoint names no tokenizer: copy the folder's here, and give it with --tokenizer PATH")
        return None
    path = Path(folder.path).resolve()
    try:
        tokenizer = load_tokenizer(path)
    except UserError:
        return None
    check_tokenizer_fits(tokenizer, model.vocab_size)
    return str(path)


def _generation(folder: HfFolder, config: dict[str, Any]) -> GenerationConfig | None:
    there = folder.storage.exists(join(folder.path, "generation_config.json"))
    ids = config | (folder.json("generation_config.json") if there else {})
    eos, bos, pad = ids.get("eos_token_id"), ids.get("bos_token_id"), ids.get("pad_token_id")
    if eos is None:
        return None
    return GenerationConfig(
        eos_id=tuple(eos) if isinstance(eos, list) else (eos,),
        bos_id=1 if bos is None else bos,
        pad_id=pad,
    )


def _compare(found: Checkpoint, model: ModelConfig, folder: HfFolder) -> str:
    if not has_transformers():
        return "logits were not compared: transformers is not installed"
    records = found.records()
    dtype = {"tf32": "float32"}.get(model.dtype, model.dtype)
    rotary = rotary_of(Config(model=model))
    theirs = folder_logits(folder, model, rotary, dtype)
    ours = native_logits(model, lambda name: read_tensor(found, records[name]), dtype)
    difference = largest_difference(ours, theirs, model, dtype, folder.path)
    return f"largest logit difference between the native model and transformers: {difference:.3g}"
