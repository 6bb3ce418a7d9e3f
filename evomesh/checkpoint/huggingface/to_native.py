"""Import a foreign model folder as a native checkpoint: weights only, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.huggingface.compare_logits import (
    largest_logit_difference,
    native_logits,
)
from evomesh.checkpoint.huggingface.folder import HfFolder, open_folder
from evomesh.checkpoint.huggingface.load import ForeignTensor, foreign_tensors
from evomesh.checkpoint.huggingface.match import describe_folder
from evomesh.checkpoint.huggingface.original import describe_original
from evomesh.checkpoint.huggingface.stock_logits import (
    has_transformers,
    local_copy,
    stock_logits,
)
from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, LocalPart
from evomesh.checkpoint.native.commit import (
    commit,
    new_attempt,
    new_record,
    refuse_committed,
)
from evomesh.checkpoint.native.find import Checkpoint, open_checkpoint
from evomesh.checkpoint.native.format import CommitRecord, layout_record
from evomesh.checkpoint.native.plan import TensorType, WriteItem, in_file_order
from evomesh.checkpoint.native.read import read_tensor, refuse_not_finite
from evomesh.checkpoint.native.store_errors import as_checkpoint_error
from evomesh.checkpoint.native.unfinished import discard
from evomesh.checkpoint.native.write import Pieces, PieceSource, live_pieces
from evomesh.config.data import DataConfig
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config, GenerationConfig, ModelConfig
from evomesh.config.user import expand_home
from evomesh.data.tokenizer import check_embedded, check_tokenizer_fits, load_tokenizer
from evomesh.errors import UserError
from evomesh.layers.dtype import parameter_dtype
from evomesh.quantities import counted, readable
from evomesh.storage.base import Storage, join
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import open_storage


def from_hf(
    source: str,
    target: str,
    dtype: str | None,
    compare: bool,
    report: Callable[[str], None],
    tokenizer: str | None = None,
) -> str:
    """Write step 0 into the save folder ``target`` and return the step folder.

    Args:
        tokenizer: path that the checkpoint names; None: the folder's own; "none": no tokenizer.

    Raises:
        CheckpointError: not a folder of a known architecture, wrong tensors, a
            tokenizer larger than the embedding, no space; nothing is left then.
    """
    folder = open_folder(source)
    config, weights = read_folder(folder, dtype, report, tokenizer)
    model = config.model
    if config.data.tokenizer_path is not None:
        check_tokenizer_fits(
            load_tokenizer(config.data.tokenizer_path),
            model.vocab_size,
            "import the weights alone with --tokenizer none, or give another one with --tokenizer PATH",
        )
    storage, root = open_storage(target)
    state = describe_original(folder, model.dtype)
    step, record = commit_weights(
        storage, root, config, weights, folder.path, state=state
    )
    if compare:
        try:
            report(_compare(open_checkpoint(storage, step), model, folder))
        except BaseException as error:
            discard(storage, step, record.attempt)
            if isinstance(error, OSError):
                raise as_checkpoint_error(error, step) from None
            raise
    report(
        f"wrote {step}: {model.model_type}, {model.dtype}, {readable(record.tensor_bytes)}"
    )
    return step


def commit_weights(
    storage: Storage,
    root: str,
    config: Config,
    weights: Mapping[str, ForeignTensor],
    source: str,
    *,
    state: dict[str, Any],
) -> tuple[str, CommitRecord]:
    """Commit the weights of a foreign folder as step 0 of a save folder; return the step folder and its record.

    Args:
        source: the foreign folder, for errors.
    Raises:
        CheckpointError: step 0 is there, no space, or a weight is not finite; nothing is left then.
    """
    step = refuse_committed(storage, root, 0)
    tensors = _tensor_types(config.model, weights)
    record = new_record(
        0,
        new_attempt(),
        config=config_to_dict(config),
        state=state,
        layout=layout_record(1),
    )
    items = [_write_items(tensors)]
    converted = _converted(weights, source)
    return step, commit(storage, step, items, tensors, record, converted)


def read_folder(
    folder: HfFolder,
    dtype: str | None,
    report: Callable[[str], None],
    tokenizer: str | None = None,
) -> tuple[Config, dict[str, ForeignTensor]]:
    """Return the config that a folder describes, and its weights, none of them read yet.

    The config has the sections of its model, its tokenizer and its generation ids.

    Args:
        dtype: of the parameters; None: the folder's.
        tokenizer: path that the config names; None: the folder's own; "none": no tokenizer.

    Raises:
        CheckpointError: not a folder of a known architecture, or wrong tensors.
    """
    described = describe_folder(folder, dtype)
    model = described.model
    tensors = foreign_tensors(folder, described.naming, model)
    weights = dict(tensors)
    config = Config(
        model=model,
        data=DataConfig(
            seq_len=model.max_position_embeddings,
            tokenizer_path=_tokenizer_path(folder, tokenizer, model, report),
        ),
        generation=_generation_section(folder, model.vocab_size),
    )
    return config, weights


def _tensor_types(
    model: ModelConfig, weights: Mapping[str, ForeignTensor]
) -> dict[str, TensorType]:
    dtype = fmt.DTYPE_NAMES[parameter_dtype(model.dtype)]
    return {name: TensorType(dtype, tensor.shape) for name, tensor in weights.items()}


def _write_items(tensors: Mapping[str, TensorType]) -> list[WriteItem]:
    """Return the items of whole tensors whose bytes are not read yet."""
    return in_file_order(
        WriteItem(name, dtype, shape, LocalPart(torch.empty(0), Box.whole(shape)))
        for name, (dtype, shape) in tensors.items()
    )


def _converted(weights: Mapping[str, ForeignTensor], source: str) -> PieceSource:
    """Return a source that converts each tensor when it is written.

    Only one is in memory at a time.
    """

    def pieces(item: WriteItem) -> Pieces:
        name = item.name
        tensor = weights[name]
        stored = tensor.read()
        dtype = fmt.DTYPES[item.dtype]
        rounded = stored.to(dtype)
        # 1e5 is finite in the folder and infinite in float16: looked at after rounding.
        refuse_not_finite(name, stored, rounded, source)
        contiguous = rounded.contiguous()
        part = LocalPart(contiguous, item.part.box)
        in_memory = replace(item, part=part)
        yield from live_pieces(in_memory)

    return pieces


def _tokenizer_path(
    folder: HfFolder,
    given: str | None,
    model: ModelConfig,
    report: Callable[[str], None],
) -> str | None:
    if given == "none":
        return None
    if given is not None:
        path = expand_home(given).resolve()
        tokenizer = load_tokenizer(path)
    else:
        if not isinstance(folder.storage, LocalStorage):
            report(
                "the checkpoint names no tokenizer: copy the folder's here, and give it with --tokenizer PATH"
            )
            return None
        path = Path(folder.path).resolve()
        try:
            tokenizer = load_tokenizer(path)
        except UserError as refusal:
            _report_unusable(refusal, report)
            return None
    spare = model.vocab_size - tokenizer.vocab_size
    if spare > 0:
        report(
            f"{path}: the embedding has {model.vocab_size} rows, the tokenizer {tokenizer.vocab_size} ids: "
            f"of no token: the last {counted(spare, 'row', '')}"
        )
    return str(path)


def _report_unusable(refusal: UserError, report: Callable[[str], None]) -> None:
    """Report why a folder's tokenizer is left out; a folder without one has nothing that would be missed."""
    if refusal.code != "EVO-TOKEN-001":
        report(
            f"the checkpoint names no tokenizer, as that of the folder cannot be used: {refusal.found}; "
            "give one with --tokenizer PATH"
        )


def _generation_section(folder: HfFolder, vocab_size: int) -> GenerationConfig | None:
    """Return a section with the folder's special ids, None if it has no eos id.

    Raises:
        UserError: an id that ends an answer has no row in the embedding.
    """
    ids = folder.json("config.json")
    if folder.storage.exists(join(folder.path, "generation_config.json")):
        ids |= folder.json("generation_config.json")
    eos = ids.get("eos_token_id")
    bos = ids.get("bos_token_id")
    if eos is None:
        return None
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    for token in eos_ids:
        check_embedded(token, vocab_size, f"eos_token_id of {folder.path}")
    return GenerationConfig(
        eos_id=eos_ids,
        bos_id=1 if bos is None else bos,
        pad_id=ids.get("pad_token_id"),
    )


def _compare(found: Checkpoint, model: ModelConfig, folder: HfFolder) -> str:
    if not has_transformers():
        return "logits were not compared: transformers is not installed"
    dtype = "float32" if model.dtype == "tf32" else model.dtype
    with local_copy(folder) as original:
        theirs = stock_logits(Path(original), [dtype])
    records = found.records()

    def read(name: str) -> Tensor:
        record = records[name]
        return read_tensor(found, record)

    ours = native_logits(model, read, dtype)
    sides = ("the native model", "transformers")
    difference = largest_logit_difference(ours, theirs, folder.path, sides=sides)
    return f"largest logit difference between the native model and transformers: {difference:.3g}"
