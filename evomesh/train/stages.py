"""This rank's part of the model, and the schedule that runs micro-batches through all parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from evomesh.config.layout import pipeline_schedule
from evomesh.config.schema import Config, ModelConfig
from evomesh.errors import UserError
from evomesh.layers.dtype import parameter_dtype, promote
from evomesh.models.decoder import Decoder
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, clear_padding, initialize_weights
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.modes import TensorMode
from evomesh.parallel.weights import shard_weights
from evomesh.pipeline.schedule import PipelineSchedule, Schedule, SingleStageSchedule
from evomesh.pipeline.stages import layer_ranges, stages_of_rank


@dataclass(frozen=True)
class ModelStages:
    """Attributes:
    models: one for each chunk that this rank holds; one in all without a pipeline.
    schedule: what runs them.
    module: all of them as one module.
    """

    models: list[LanguageModel]
    schedule: Schedule
    module: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """By global name: layer indices are global, so no two chunks share one."""
        return {name: parameter for model in self.models for name, parameter in model.named_parameters()}

    def initialize(self, seed: int, grid: Grid) -> None:
        for model in self.models:
            initialize_weights(model, seed, grid)


def build_stages(config: Config, grid: Grid, mode: TensorMode, device: torch.device) -> ModelStages:
    """Builds this rank's chunks with uninitialised parameters, weights sharded where the config says so."""
    ranges: list[range] | list[None] = [None]
    kind = pipeline_schedule(config)
    if grid.pp.size > 1:
        chunks = config.model.num_chunks
        ends = end_weights(config.model) if config.parallel.pipeline.balance else None
        table = layer_ranges(config.model.num_layers, grid.pp.size, chunks, ends)
        ranges = [table[stage] for stage in stages_of_rank(grid.pp.rank, grid.pp.size, chunks, kind)]
    models = [_build(config, grid, mode, device, layers) for layers in ranges]
    if grid.pp.size == 1:
        return ModelStages(models, SingleStageSchedule(models[0]), models[0])
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
    return ModelStages(models, schedule, nn.ModuleList(models) if len(models) > 1 else models[0])


def end_weights(model: ModelConfig) -> tuple[float, float]:
    """Embedding and head by their parameters, in units of one layer."""
    query_and_output = 2 * model.hidden_size
    key_and_value = 2 * model.kv_heads * model.head_dim
    layer = model.hidden_size * (
        query_and_output + key_and_value + (3 if model.use_swiglu else 2) * model.mlp_width
    )
    end = model.vocab_size * model.hidden_size / layer
    return end, end


def _build(
    config: Config, grid: Grid, mode: TensorMode, device: torch.device, layers: range | None
) -> LanguageModel:
    axis = grid.zero if config.parallel.zero1.fsdp else grid.wp
    if axis.size == 1:
        return build_model(config.model, grid=grid, mode=mode, device=device, layer_range=layers)
    # On the meta device first, so that no rank ever holds a whole block that is not in use.
    auto = config.model.compile == "auto"
    settings = config.model.model_copy(update={"compile": device.type == "cuda"}) if auto else config.model
    model = build_model(settings, grid=grid, mode=mode, device="meta", layer_range=layers)
    shard_weights(model, _units(model, axis), axis, device, overlap=config.parallel.weight.overlap)
    clear_padding(model, grid)
    return model


def _units(model: nn.Module, axis: Axis) -> list[nn.Module]:
    """What is gathered as one: the blocks; and, where the axis cuts all weights, embedding and head too.

    Of a user's own model only the blocks: whether other weights are read outside their module's forward, who knows.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleDict | nn.ModuleList) or not len(layers):
        raise UserError(
            f"{type(model).__name__} has no layers whose weights could be cut",
            where="parallel.weight.size" if axis.name == "wp" else "parallel.zero1.fsdp",
            expected="a model with its blocks in self.layers, an nn.ModuleDict or nn.ModuleList",
        )
    blocks = list(layers.values() if isinstance(layers, nn.ModuleDict) else layers)
    if axis.name == "wp" or not isinstance(model, Decoder):
        return blocks
    return [part for part in (model.embedding, *blocks, model.head) if part is not None]
