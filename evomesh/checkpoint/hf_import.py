"""``from-hf``: a foreign model folder as a checkpoint of ours, weights only, one tensor at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint import format as fmt
from evomesh.checkpoint import write
from evomesh.checkpoint.boxes import Box, Part
from evomesh.checkpoint.find import Found, open_checkpoint
from evomesh.checkpoint.forecast import readable
from evomesh.checkpoint.format import CheckpointError
from evomesh.checkpoint.hf_config import read_config
from evomesh.checkpoint.hf_folder import HfFolder, local_folder, read_json
from evomesh.checkpoint.hf_load import checked
from evomesh.checkpoint.hf_names import NAMINGS, Link, Naming, our_shapes, to_ours
from evomesh.checkpoint.hf_verify import (
    has_transformers,
    largest_difference,
    native_logits,
    read_tensor,
    transformers_logits,
)
from evomesh.checkpoint.plan import Entry, in_file_order
from evomesh.config.record import redacted
from evomesh.config.schema import Config, DataConfig, GenerationConfig, ModelConfig
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError
from evomesh.layers.dtype import parameter_dtype
from evomesh.storage.base import Storage, join
from evomesh.storage.urls import open_storage


def from_hf(source: str, target: str, dtype: str | None, compare: bool, report: Callable[[str], None]) -> str:
    """Writes step 0 into the save folder ``target`` and returns the step folder.

    Raises:
        CheckpointError: not a folder of a known architecture, wrong tensors, no space; nothing is left then.
    """
    folder = HfFolder(local_folder(source))
    place = str(folder.path / "config.json")
    record = read_json(folder.path / "config.json")
    model = read_config(record, place, dtype)
    naming = NAMINGS[record["model_type"]]
    links = checked(folder, naming, model, tied=bool(record.get("tie_word_embeddings")))
    config = Config(
        model=model,
        data=DataConfig(seq_len=model.max_position_embeddings, tokenizer_path=_tokenizer(folder.path, model)),
        generation=_generation(folder.path, record),
    )
    storage, root = open_storage(target)
    step = join(root, fmt.folder_name(0))
    if storage.exists(join(step, fmt.COMMIT)):
        raise CheckpointError("step 0 is already committed there", where=target, fix="give another folder")
    attempt = secrets.token_hex(4)
    try:
        body = _write(storage, root, step, attempt, _Source(folder, naming, model, links), config)
        write.publish(storage, step, body)
        found = open_checkpoint(storage, step)
        if compare:
            report(_compare(found, model, folder.path, str(record["model_type"])))
    except OSError as error:
        _clean(storage, step, attempt)
        raise write.refusal(error, step) from None
    except BaseException:
        _clean(storage, step, attempt)
        raise
    report(f"wrote {step}: {model.model_type}, {model.dtype}, {readable(body['tensor_bytes'])}")
    return step


class _Source:
    """The bytes of our tensors, each made from theirs at the moment it is written."""

    def __init__(self, folder: HfFolder, naming: Naming, model: ModelConfig, links: list[Link]) -> None:
        self.folder, self.naming, self.model = folder, naming, model
        self.links = {link.ours: link for link in links}
        self.dtype = parameter_dtype(model.dtype)

    def entries(self) -> list[Entry]:
        word = fmt.DTYPE_NAMES[self.dtype]
        shapes = our_shapes(self.model)
        boxes = {name: Box((0,) * len(shape), shape) for name, shape in shapes.items()}
        return in_file_order([Entry(n, word, shapes[n], Part(torch.empty(0), box)) for n, box in boxes.items()])

    def pieces(self, entry: Entry) -> Iterator[tuple[Box, memoryview]]:
        link = self.links[entry.name]
        values = [self.folder.read(name) for name in link.theirs]
        tensor = to_ours(link, values, self.model, self.naming).to(self.dtype).contiguous()
        yield from write.live_pieces(Entry(entry.name, entry.dtype, entry.shape, Part(tensor, entry.part.box)))


def _write(storage: Storage, root: str, step: str, attempt: str, source: _Source, config: Config) -> dict[str, Any]:
    entries = source.entries()
    storage.make_folder(step)
    message = write.write_data(storage, step, attempt, 0, entries, source.pieces)
    storage.sync(root)
    body = write.body(0, attempt, {}, redacted(config))
    body |= {"layout": dict.fromkeys(("world", "tp", "wp", "pp", "dp", "zero"), 1)}
    body |= {"parent": None, "snapshot": False}
    return body | write.write_index(storage, step, attempt, {e.name: (e.dtype, e.shape) for e in entries}, [message])


def _clean(storage: Storage, step: str, attempt: str) -> None:
    for name in (fmt.COMMIT, fmt.index_name(attempt), fmt.file_name(attempt, 0)):
        storage.delete(join(step, name))
    if not storage.list(step):
        storage.delete_folder(step)


def _tokenizer(folder: Path, model: ModelConfig) -> str | None:
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        return None
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {model.vocab_size} rows",
            where=str(tokenizer.path),
        )
    return str(folder.resolve())


def _generation(folder: Path, config: dict[str, Any]) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    ids = config | (read_json(file) if file.is_file() else {})
    eos, bos, pad = ids.get("eos_token_id"), ids.get("bos_token_id"), ids.get("pad_token_id")
    if eos is None:
        return None
    return GenerationConfig(
        eos_id=tuple(eos) if isinstance(eos, list) else (eos,),
        bos_id=1 if bos is None else bos,
        pad_id=pad,
    )


def _compare(found: Found, model: ModelConfig, folder: Path, kind: str) -> str:
    if kind != "llama" or not has_transformers():
        missing = "is not installed" if kind == "llama" else f"has no {kind} of its own"
        return f"logits were not compared: transformers {missing}"

    def stored() -> Iterator[tuple[str, Tensor]]:
        for record in found.records().values():
            yield record.name, read_tensor(found, record)

    dtype = {"tf32": "float32"}.get(model.dtype, model.dtype)
    theirs = transformers_logits(folder, model.vocab_size, dtype)
    ours = native_logits(model, stored(), dtype)
    difference = largest_difference(ours, theirs, model, dtype, str(folder))
    return f"largest difference of logits, native model and transformers: {difference:.3g}"
