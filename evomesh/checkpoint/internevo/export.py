"""Write InternEvo's model files of any tensor x pipeline (x weight) size from one of our checkpoints.

Shapes: N attention heads, G key/value heads, R = N / G query heads per key/value head, H head dim, D model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from evomesh.checkpoint.internevo.model import (
    BLOCK_MODULES,
    file_name,
    groups_to_blocks,
)
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.read import read_tensor
from evomesh.checkpoint.standard_weights import standard_weight
from evomesh.config.model import differing_key
from evomesh.config.schema import ModelConfig
from evomesh.pipeline.stages import layer_ranges

LAYER_PARAMETER = re.compile(r"^layers\.(\d+)\.(.+)\.(weight|bias)$")
V1_MODULES = {ours: theirs for theirs, ours in BLOCK_MODULES.items()}  # of INTERNLM
V1_TOP = {"embedding": "embedding", "norm": "norm", "head": "head"}
V2_TOP = {"embedding": "tok_embeddings", "norm": "norm", "head": "output"}

# Returns the shard of each tensor-parallel rank, None for a rank whose file lacks the
# parameter.
Shards = list[Tensor | None]
ShardFunction = Callable[[Tensor, int], Shards]


def write_model(
    found: Checkpoint,
    model: ModelConfig,
    target: str,
    tensor: int,
    pipeline: int,
    weight: int | None = None,
) -> list[str]:
    """Write one of our checkpoints as InternEvo's and return the model files.

        model_tp{t}_pp{p}.pt    state dict of a rank
        model_config.pt         the model section, a plain dict
        {step}.step             marks the folder as complete

    Args:
        weight: weight-parallel size of isp, whose files are
            ``model_tp{t}_wp{w}_pp{p}.pt``; None: not isp.

    Raises:
        CheckpointError: sizes that do not divide, a family that InternEvo does not have,
            or a target that is in use.
    """
    _refuse_sizes(model, tensor, pipeline, weight, found.folder)
    if os.path.isdir(target) and os.listdir(target):
        raise CheckpointError(
            "the folder is not empty",
            where=target,
            fix="give a new folder",
            code="EVO-CLI-005",
        )
    os.makedirs(target, exist_ok=True)
    stages = layer_ranges(model.num_layers, pipeline)
    written = []
    # One stage at a time is in memory, with the tensors of all its ranks.
    for pp, layers in enumerate(stages):
        states = _stage_states(found, model, layers, tensor, weight)
        for (tp, wp), state in states.items():
            wp_in_name = None if weight is None else wp
            name = file_name(tp, wp_in_name, pp)
            file = os.path.join(target, name)
            torch.save(state, file)
            written.append(file)
    section = _plain_section(model)
    section_file = os.path.join(target, "model_config.pt")
    torch.save(section, section_file)
    # InternEvo takes a folder with this file for complete, so it is written last.
    step_file = os.path.join(target, f"{found.step}.step")
    torch.save({"step": found.step}, step_file)
    return written


def _stage_states(
    found: Checkpoint,
    model: ModelConfig,
    layers: range,
    tensor: int,
    weight: int | None,
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Return the state dict of each (tp, wp) rank of one stage.

    Memory: the weights of the stage, once per replica.
    """
    states: dict[tuple[int, int], dict[str, Tensor]] = {}
    for position in product(range(tensor), range(weight or 1)):
        states[position] = {}
    for name, record in found.records().items():
        if name.startswith("optim."):
            continue
        parameters = _foreign_parameters(name, layers, model)
        if not parameters:
            continue
        stored = read_tensor(found, record)
        whole = standard_weight(name, stored, model).to(stored.dtype)
        for their_name, shard in parameters:
            for position, part in _rank_shards(name, whole, shard, tensor, weight):
                states[position][their_name] = part
    return states


def _rank_shards(
    name: str, whole: Tensor, shard: ShardFunction, tensor: int, weight: int | None
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield ((tp, wp), shard) of one parameter for each rank that holds it.

    isp replicates a block over tp and shards its matrices over wp; all else is sharded
    over tp and replicated over wp.
    """
    wp_size = weight or 1
    in_isp_block = weight is not None and LAYER_PARAMETER.match(name) is not None
    over_wp = in_isp_block and "norm" not in name
    tp_shards = 1 if in_isp_block else tensor
    shards = shard(whole, tp_shards)
    for tp, wp in product(range(tensor), range(wp_size)):
        position = (tp, wp)
        part = shards[tp % tp_shards]
        if part is None:
            continue
        if over_wp:
            parts = part.chunk(wp_size)
            part = parts[wp]
        # torch.save writes the whole storage of a view: without the clone each file
        # would hold the tensor of all ranks.
        yield position, part.contiguous().clone()


def _plain_section(model: ModelConfig) -> dict[str, bool | int | float | str]:
    section = {}
    for key, value in model.model_dump().items():
        if isinstance(value, bool | int | float | str):
            section[key] = value
    return section


def _refuse_sizes(
    model: ModelConfig, tensor: int, pipeline: int, weight: int | None, where: str
) -> None:
    """Check that InternEvo has the family, and that the sizes divide its sharded dims.

    Raises:
        CheckpointError: one of the two is not so.
    """
    _refuse_family(model, where)
    sharded = {
        "the number of key/value heads": model.kv_heads,
        "the vocabulary": model.vocab_size,
        "the width of the mlp": model.mlp_width,
    }
    for described, size in sharded.items():
        if size % tensor:
            raise CheckpointError(
                f"{described}, {size}, is not divisible by --tensor {tensor}",
                where=where,
                code="EVO-CKPT-019",
            )
    if weight:
        for rows in _block_rows(model):
            if rows % weight:
                raise CheckpointError(
                    f"matrices of {rows} rows are not divisible by --weight {weight}",
                    where=where,
                    code="EVO-CKPT-019",
                )
    if pipeline > model.num_layers:
        raise CheckpointError(
            f"{model.num_layers} layers are too few for --pipeline {pipeline}",
            where=where,
            code="EVO-CKPT-019",
        )


def _refuse_family(model: ModelConfig, where: str) -> None:
    """Check that one of InternEvo's families computes what the model does.

    Raises:
        CheckpointError: none does.
    """
    if model.model_type not in ("INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"):
        raise CheckpointError(
            f"InternEvo has no model type {model.model_type!r}",
            where=where,
            code="EVO-CKPT-019",
        )
    unusual = differing_key(model)
    if unusual is not None:
        raise CheckpointError(
            f"InternEvo's families do not have {unusual}={getattr(model, unusual)!r}",
            where=where,
            code="EVO-CKPT-019",
        )
    # One switch has the biases of all projections, and the width of a head is not
    # stored.
    plain_heads = (
        model.attention_width == model.hidden_size
        and model.has_qkv_bias == model.has_o_bias
    )
    has_others = model.qk_norm or model.sliding_window or model.mlp_bias
    if has_others or not plain_heads:
        raise CheckpointError(
            "InternEvo's families have no qk_norm, no window, no mlp_bias, no head_dim but hidden_size / "
            "num_attention_heads, and biases in all attention projections or in none",
            where=where,
            code="EVO-CKPT-019",
        )
    if model.tie_word_embeddings:
        raise CheckpointError(
            "InternEvo's families have an output head beside the embedding, and this model has one weight for both",
            where=where,
            fix="export it for transformers: evomesh convert to-hf",
            code="EVO-CKPT-019",
        )
    if model.rope_scaling is not None:
        raise CheckpointError(
            f"InternEvo has no rope_scaling of type {model.rope_scaling.type!r}",
            where=where,
            code="EVO-CKPT-019",
        )


def _block_rows(model: ModelConfig) -> tuple[int, ...]:
    """Return the rows of a block's matrices.

    Those of queries, keys and values come first, merged or not.
    """
    kv_rows = model.kv_heads * model.head_dim
    merged_rows = model.hidden_size + 2 * kv_rows
    qkv_rows = kv_rows if model.model_type == "LLAMA2" else merged_rows
    return (qkv_rows, model.hidden_size, model.mlp_width)


def _shard_rows(whole: Tensor, ranks: int) -> Shards:
    return list(whole.chunk(ranks))


def _shard_columns(whole: Tensor, ranks: int) -> Shards:
    return list(whole.chunk(ranks, 1))


def _replicate(whole: Tensor, ranks: int) -> Shards:
    return [whole] * ranks


def _first_rank_only(whole: Tensor, ranks: int) -> Shards:
    return [whole] + [None] * (ranks - 1)


def _foreign_parameters(
    name: str, layers: range, model: ModelConfig
) -> list[tuple[str, ShardFunction]]:
    """Return their names for one of our tensors in a stage, and how each is sharded.

    [] if another stage holds it.
    """
    v1 = model.model_type == "INTERNLM"
    match = LAYER_PARAMETER.match(name)
    if match is None:
        return _foreign_top(name, layers, model)
    number = int(match[1])
    module = match[2]
    kind = match[3]
    if number not in layers:
        return []
    blocks = "blocks" if v1 else "layers"
    # Their numbers begin anew in each stage.
    prefix = f"{blocks}.{number - layers.start}."
    if module == "attention.wqkv" and model.model_type == "LLAMA2":
        parameters = []
        for letter in "qkv":
            shard = _shard_one_of_qkv(model, letter)
            parameters.append((f"{prefix}attention.w{letter}.{kind}", shard))
        return parameters
    if module == "attention.wqkv" and v1:
        return [(f"{prefix}mixer.Wqkv.{kind}", _shard_blocks(model))]
    their_module = V1_MODULES[module] if v1 else module
    shard = _block_shard(module, kind, v1)
    return [(f"{prefix}{their_module}.{kind}", shard)]


def _foreign_top(
    name: str, layers: range, model: ModelConfig
) -> list[tuple[str, ShardFunction]]:
    """Do ``_foreign_parameters`` outside the blocks.

    The embedding is in the first stage, norm and head are in the last.
    """
    module, kind = name.rsplit(".", 1)
    is_first = layers.start == 0
    is_last = layers.stop == model.num_layers
    in_stage = is_first if module == "embedding" else is_last
    if not in_stage:
        return []
    names = V1_TOP if model.model_type == "INTERNLM" else V2_TOP
    # InternEvo shards the embedding along D, not along the vocabulary as the head.
    shards = {"embedding": _shard_columns, "norm": _replicate, "head": _shard_rows}
    return [(f"{names[module]}.{kind}", shards[module])]


def _block_shard(module: str, kind: str, v1: bool) -> ShardFunction:
    """Return how a parameter of a block is sharded whose layout is ours."""
    if "norm" in module:
        return _replicate
    if module not in ("attention.wo", "feed_forward.w2"):
        return _shard_rows
    if kind == "weight":
        return _shard_columns
    # A bias, added after the sum over ranks.
    return _first_rank_only if v1 else _replicate


def _shard_blocks(model: ModelConfig) -> ShardFunction:
    """Return a function that shards wqkv by heads, each shard in INTERNLM's order.

    That is [q; k; v] of the heads of the shard.
    """

    def shard(whole: Tensor, ranks: int) -> Shards:
        heads = model.num_attention_heads // ranks
        return [groups_to_blocks(part, heads) for part in whole.chunk(ranks)]

    return shard


def _shard_one_of_qkv(model: ModelConfig, letter: str) -> ShardFunction:
    """Return a function that takes q, k or v out of wqkv and shards it by rows."""
    queries = model.num_attention_heads // model.kv_heads  # R
    k = queries  # positions of k and v in a group, after the queries
    v = queries + 1
    positions = {
        "q": slice(0, k),
        "k": slice(k, v),
        "v": slice(v, v + 1),
    }
    position = positions[letter]
    heads_of_groups = (model.kv_heads, queries + 2, model.head_dim)

    def shard(whole: Tensor, ranks: int) -> Shards:
        # N = 4, G = 2: the rows of wqkv are q0 q1 k0 v0, q2 q3 k1 v1, each of H rows.
        columns = whole.shape[1:]
        groups = whole.reshape(*heads_of_groups, *columns)  # [G, R + 2, H, D]
        chosen = groups[:, position]
        rows = chosen.flatten(0, 2)  # [N H, D], [G H, D] for k and v
        return list(rows.chunk(ranks))

    return shard
