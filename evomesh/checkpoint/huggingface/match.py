"""Compare the tensors of a foreign folder with its config.json, and with the model that they are loaded into.

All of it needs the headers of the weight files only; one exception is a tied head that
is stored none the less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from evomesh.checkpoint.huggingface.config import read_config
from evomesh.checkpoint.huggingface.folder import HfFolder, WeightFolder
from evomesh.checkpoint.huggingface.names import (
    NAME_MAPS,
    NameMap,
    TensorLink,
    foreign_shapes,
    tensor_links,
)
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import ModelConfig
from evomesh.storage.base import join

LISTED = 40  # tensors of a kind that a message names
ROWS = 4096  # of the head and the embedding, compared at a time


@dataclass(frozen=True)
class FolderModel:
    """The model that the config.json of a folder describes.

    Attributes:
        tied: its head is its embedding.
    """

    model: ModelConfig
    naming: NameMap
    tied: bool


def describe_folder(folder: HfFolder, dtype: str | None = None) -> FolderModel:
    """Read the config.json of a folder and check that the folder does not contradict itself.

    Args:
        dtype: of the parameters; None: the folder's.
    Raises:
        CheckpointError: an unknown architecture or setting, sizes that are not those of the tensors, or a tied head
            beside another one.
    """
    record = folder.json("config.json")
    where = join(folder.path, "config.json")
    naming = NAME_MAPS.get(str(record.get("model_type")))
    problems = [] if naming is None else _contradictions(record, folder, naming)
    try:
        model = read_config(record, where, dtype)
        # What an absent key means is up to the family: Gemma's are tied.
        tied = model.tie_word_embeddings
        if naming is not None and problems:
            problems += _mismatches(folder, naming, model, tied)
    except CheckpointError as error:
        # A size that no tensor has can make another setting look impossible: 32
        # instead of 36 dims, say, give heads of an odd width.
        if not problems:
            raise
        problems.append(f"as it is, {error.found}")
    if problems:
        raise CheckpointError(
            "config.json contradicts the tensors:\n  " + "\n  ".join(problems),
            where=folder.path,
            expected="the sizes of the tensors",
            fix="restore the config.json that was saved with these weights",
            code="EVO-HF-003",
        )
    assert naming is not None  # read_config refuses unknown families
    if tied:
        refuse_another_head(folder, naming)
    return FolderModel(model, naming, tied)


def _contradictions(
    record: Mapping[str, Any], folder: HfFolder, naming: NameMap
) -> list[str]:
    """Return a line for each size in config.json that the tensors show to be another one."""
    try:
        shapes = folder.shapes
    except CheckpointError:
        return []  # without readable tensors nothing contradicts; their reader says why
    lines = [
        f"{key} is {record[key]}, but {evidence}"
        for key, size, evidence in _sizes_of_tensors(shapes, naming)
        if isinstance(record.get(key), int) and record[key] != size
    ]
    return lines + list(_contradictions_of_heads(record, shapes, naming))


def _contradictions_of_heads(
    record: Mapping[str, Any], shapes: Mapping[str, Coordinates], naming: NameMap
) -> Iterator[str]:
    """Yield a line for each count of heads that does not give the rows of its projection.

    Without ``head_dim`` in config.json any count of heads that divides the width is
    possible.
    """
    projections = naming.modules["layers.{}.attention.wqkv"]
    width = record.get("head_dim")
    if len(set(projections)) != 3 or not isinstance(width, int):
        return
    queries, keys, _ = (f"{name.format(0)}.weight" for name in projections)
    for key, name in (
        ("num_attention_heads", queries),
        ("num_key_value_heads", keys),
    ):
        count = record.get(key)
        if not isinstance(count, int) or name not in shapes:
            continue
        if count * width != shapes[name][0]:
            yield f"{key} is {count} and head_dim {width}, but {name} is {list(shapes[name])}"


def _sizes_of_tensors(
    shapes: Mapping[str, Coordinates], naming: NameMap
) -> Iterator[tuple[str, int, str]]:
    """Yield (key of config.json, size, the tensor that has it)."""
    embedding = naming.weight("embedding")
    gate_module = naming.modules["layers.{}.feed_forward.w1"]
    gate = gate_module[0].format(0) + ".weight"
    # One tensor may hold gate and up projection.
    parts_of_gate = list(naming.modules.values()).count(gate_module)
    for key, name, dim, parts in (
        ("vocab_size", embedding, 0, 1),
        ("hidden_size", embedding, 1, 1),
        ("intermediate_size", gate, 0, parts_of_gate),
    ):
        shape = shapes.get(name, ())
        if len(shape) == 2:
            size = shape[dim] // parts
            yield key, size, f"{name} is {list(shape)}"

    count = _count_layers(shapes, naming)
    if count:
        yield "num_hidden_layers", count, f"the tensors are of {count} layers"


def _count_layers(names: Iterable[str], naming: NameMap) -> int:
    """Return the largest layer number in the names of tensors plus one, 0 without any.

    In model.layers.31.input_layernorm.weight the number is between the two dots after
    what all layers begin with.
    """
    norm = naming.modules["layers.{}.attention_norm"][0]
    prefix, _, _ = norm.partition("{}")
    count = 0
    for name in names:
        if not name.startswith(prefix):
            continue
        layer, _, _ = name.removeprefix(prefix).partition(".")
        if layer.isdecimal():
            count = max(count, int(layer) + 1)
    return count


def refuse_another_head(folder: WeightFolder, naming: NameMap) -> None:
    """Refuse a folder that ties its head to its embedding and holds a head with other values.

    Readers disagree: older versions of transformers drop that head, newer ones keep it.
    """
    embedding = naming.weight("embedding")
    head = naming.weight("head")
    shapes = folder.shapes
    if head not in shapes or embedding not in shapes:
        return
    is_equal = shapes[head] == shapes[embedding]
    # Some rows at a time, since both may be gigabytes; the first difference ends it.
    for first in range(0, shapes[head][0], ROWS):
        if not is_equal:
            break
        rows = min(ROWS, shapes[head][0] - first)
        box = Box((first, 0), (rows, shapes[head][1]))
        is_equal = torch.equal(folder.read(head, box), folder.read(embedding, box))
    if not is_equal:
        raise CheckpointError(
            f"tie_word_embeddings is true, but {head} differs from {embedding}: versions of transformers disagree "
            "which of them is the head",
            where=join(folder.path, "config.json"),
            expected="equal tensors, or no head",
            fix=f"set tie_word_embeddings to false to keep {head}, or remove that tensor",
            code="EVO-HF-003",
        )


def match_tensors(
    folder: WeightFolder, name_map: NameMap, config: ModelConfig, tied: bool = False
) -> list[TensorLink]:
    """Return all links of the model, after comparing names and shapes with the folder's headers.

    Args:
        tied: the folder may lack the head, which then is the embedding.
    Raises:
        CheckpointError: the first ``LISTED`` tensors that are missing, unexpected, or of another shape.
    """
    problems = _mismatches(folder, name_map, config, tied)
    if problems:
        raise CheckpointError(
            "the tensors are not those of this model:\n  " + "\n  ".join(problems),
            where=folder.path,
            fix="compare the model section with the folder's config.json",
            code="EVO-HF-003",
        )
    return _links(folder, name_map, config, tied)


def _links(
    folder: WeightFolder, name_map: NameMap, config: ModelConfig, tied: bool
) -> list[TensorLink]:
    links = tensor_links(config, name_map)
    if tied and name_map.weight("head") not in folder.shapes:
        links = [_tied(link, name_map) for link in links]
    return links


def _tied(link: TensorLink, name_map: NameMap) -> TensorLink:
    """Return the link, for the head one to the foreign embedding."""
    if link.native != "head.weight":
        return link
    return replace(link, foreign=(name_map.weight("embedding"),))


def _mismatches(
    folder: WeightFolder, name_map: NameMap, config: ModelConfig, tied: bool
) -> list[str]:
    """Describe the differences between the model's tensors and those of a folder, one line per kind."""
    expected = foreign_shapes(_links(folder, name_map, config, tied))
    found = dict(folder.shapes)
    if config.tie_word_embeddings:
        # A folder may repeat the embedding as the head (see `refuse_another_head`).
        found.pop(name_map.weight("head"), None)
    missing = []
    differing = []
    for name, shape in expected.items():
        if name not in found:
            missing.append(f"{name} {list(shape)}")
        elif found[name] != shape:
            differing.append(f"{name} is {list(found[name])}, not {list(shape)}")
    unexpected = [
        f"{name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())
    ]
    kinds = {
        "missing": missing,
        "of another shape": differing,
        "unexpected": unexpected,
    }
    return [_listed(kind, tensors) for kind, tensors in kinds.items() if tensors]


def _listed(kind: str, tensors: list[str]) -> str:
    shown = "; ".join(tensors[:LISTED])
    more = f"; and {len(tensors) - LISTED} more" if len(tensors) > LISTED else ""
    return f"{kind} ({len(tensors)}): {shown}{more}"
