"""This rank's part of the model, and the schedule that runs micro-batches through it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch
from torch import nn

from evomesh.config.layout import pipeline_schedule
from evomesh.config.schema import Config, ModelConfig
from evomesh.errors import UserError
from evomesh.layers.compiler import compiles_blocks
from evomesh.layers.dtype import parameter_dtype, promote
from evomesh.models.decoder import Decoder
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, clear_padding, initialize_weights
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import TensorMode
from evomesh.parallel.spec import spec_of, with_spec
from evomesh.parallel.weights import shard_weights
from evomesh.pipeline.schedule import PipelineSchedule, Schedule, SingleStageSchedule
from evomesh.pipeline.stages import layer_ranges, stages_of_rank
from evomesh.train.sharding_units import (
    gather_points,
    sharding_units,
    units_read_in_forward_only,
)


@dataclass(frozen=True)
class ModelStages:
    """This rank's part of the model.

    Attributes:
        models: one per chunk that this rank holds; a single one without a pipeline.
        schedule: runs micro-batches through them.
        module: all of them as one module.
    """

    models: list[LanguageModel]
    schedule: Schedule
    module: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by global name: layer indices are global, so no two chunks share a name."""
        return {
            name: parameter
            for model in self.models
            for name, parameter in model.named_parameters()
        }

    def initialize(self, seed: int, grid: Grid) -> None:
        """Fill the weights with their initial values."""
        for model in self.models:
            initialize_weights(model, seed, grid)


def build_stages(
    config: Config, grid: Grid, mode: TensorMode, device: torch.device
) -> ModelStages:
    """Build this rank's chunks with uninitialized parameters, weights sharded where the config asks for it."""
    # 1. The chunks of this rank: one without a pipeline, several with an interleaved
    #    one.
    kind = pipeline_schedule(config)
    models = [
        _build_chunk(config, grid, mode, device, layer_range)
        for layer_range in _layer_ranges(config, grid, kind)
    ]
    if config.loss.z_loss_coeff:
        _refuse_missing_z_loss(config.model.model_type, models[0])
    if grid.pp.size > 1:
        _tie_ends(models)
    if grid.pp.size == 1:
        return ModelStages(models, SingleStageSchedule(models[0]), models[0])

    # 2. The schedule that sends hidden states between them, in the dtype of the
    #    residual stream.
    dtype = parameter_dtype(config.model.dtype)
    schedule = PipelineSchedule(
        models,
        grid,
        mode,
        schedule=kind,
        hidden_size=config.model.hidden_size,
        dtype=promote(dtype) if config.model.residual_in_fp32 else dtype,
        device=device,
    )
    module = nn.ModuleList(models) if len(models) > 1 else models[0]
    return ModelStages(models, schedule, module)


def build_optimizer(config: Config, stages: ModelStages, grid: Grid) -> ZeroOptimizer:
    """Build the optimizer of all parameters of this rank, as the config has it."""
    return ZeroOptimizer(
        stages.parameters().items(),
        config.adam,
        config.hybrid_zero_optimizer,
        grid,
        stages.module,
        config.optimizer,
        config.model.width_multiplier,
    )


def _refuse_missing_z_loss(name: str, model: LanguageModel) -> None:
    """Refuse z-loss with a custom model whose ``loss`` would not take it."""
    parameters = inspect.signature(model.loss).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "z_loss_coeff" not in parameters and not takes_any:
        raise UserError(
            f"loss of model type {name!r} takes no z_loss_coeff",
            where="loss.z_loss_coeff",
            expected="loss(hidden, labels, grad_scale, label_smoothing, z_loss_coeff), "
            "as in evomesh.models.language_model.LanguageModel",
            fix="add the parameter and pass it to linear_cross_entropy, or remove loss.z_loss_coeff",
            code="EVO-MODEL-002",
        )


def _tie_ends(models: list[LanguageModel]) -> None:
    """Let the first and the last stage of a pipeline train one embedding where it is tied.

    In a V-shaped pipeline one rank holds both: they share the parameter. Elsewhere two
    ranks hold a copy each, whose gradient is a summand over the axis ``ends``.
    """
    decoders = [model for model in models if isinstance(model, Decoder)]
    tied = [
        model
        for model in decoders
        if model.config.tie_word_embeddings and model.embedding is not None
    ]
    if not tied:
        return
    weight = tied[0].embedding_weight
    if len(tied) == 1:
        spec = spec_of(weight)
        with_spec(weight, replace(spec, partial=spec.partial | {"ends"}))
    for model in tied[1:]:
        model.share_embedding(weight)


def _layer_ranges(config: Config, grid: Grid, kind: str) -> list[range] | list[None]:
    """Return the layers of each chunk of this rank; one None, which means all layers, without a pipeline."""
    pp = grid.pp
    if pp.size == 1:
        return [None]
    # The layers are split into stages, of which a rank has one for each of its chunks.
    model = config.model
    chunks = model.num_chunks
    ends = None
    if config.parallel.pipeline.balance:
        ends = end_weights(model)
    ranges = layer_ranges(model.num_layers, pp.size, chunks, ends)
    own_stages = stages_of_rank(pp.rank, pp.size, chunks, kind)
    own_ranges = []
    for stage in own_stages:
        own_ranges.append(ranges[stage])
    return own_ranges


def end_weights(model: ModelConfig) -> tuple[float, float]:
    """Return the sizes of embedding and head, in parameters of one layer."""
    # Wqkv and wo, over hidden_size.
    attention_width = model.qkv_width + model.attention_width
    mlp_matrices = 3 if model.use_swiglu else 2
    layer = model.hidden_size * (attention_width + mlp_matrices * model.mlp_width)
    end = model.vocab_size * model.hidden_size / layer
    return end, end


def _build_chunk(
    config: Config,
    grid: Grid,
    mode: TensorMode,
    device: torch.device,
    layer_range: range | None,
) -> LanguageModel:
    axis = grid.zero if config.parallel.zero1.fsdp else grid.wp
    if axis.size == 1:
        return build_model(
            config.model, grid=grid, mode=mode, device=device, layer_range=layer_range
        )
    # Built on the meta device first, so that no rank ever holds the unsharded weights
    # of a block it is not using. What "auto" means depends on the training device,
    # which build_model cannot see from the meta device.
    settings = config.model.model_copy(
        update={"compile": compiles_blocks(config.model.compile, device)}
    )
    model = build_model(
        settings, grid=grid, mode=mode, device="meta", layer_range=layer_range
    )
    weight = config.parallel.weight
    units = sharding_units(model, axis, weight)
    shard_weights(
        model,
        units,
        axis,
        device,
        prefetch=gather_points(model, axis, weight) if weight.overlap else (),
        read_in_forward_only=units_read_in_forward_only(model, units),
    )
    clear_padding(model, grid)
    return model
