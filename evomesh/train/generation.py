"""The ``generation`` section of a config: a sharded model answers folders of prompts, on one process or many."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evomesh.checkpoint.detect import kind_of
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.resume import decide, restore
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.families import ARCHITECTURE_KEYS
from evomesh.config.loader import LoadedConfig
from evomesh.config.record import config_to_dict
from evomesh.config.schema import (
    CheckpointConfig,
    Config,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    TensorConfig,
)
from evomesh.config.warning_lines import warning_lines
from evomesh.data.chat import end_of_answer_ids
from evomesh.data.prompts import find_tasks, read_prompts
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams
from evomesh.generate.prompt_folder import (
    answer_prompts,
    create_output_folder,
    find_prompt_folder,
    summarize_results,
    warn_of_end_ids,
    write_results,
)
from evomesh.generate.staged import StagedModel
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.exchange import default_exchange
from evomesh.storage.urls import open_storage
from evomesh.train.launch import RunContext, launch
from evomesh.train.launchers import spawn_ranks
from evomesh.train.stages import build_stages

logger = logging.getLogger(__name__)

# settings that change what given weights compute, but no shape
MODEL_SETTINGS_WITHOUT_SHAPE = (
    "model_type",
    "num_attention_heads",
    "layer_norm_epsilon",
    "norm_type",
    "apply_post_layer_norm",
    "use_swiglu",
    "qk_interleaved",
    *ARCHITECTURE_KEYS,
    "sliding_window",
    "layer_types",
    "rope_base",
    "rope_scaling",
    "norm_head",
    "nope_layers",
    "mup",
)


def run_generation_section(
    loaded: LoadedConfig, launcher: str = "auto", port: int = 8888
) -> None:
    """Answer every prompt of ``generation.data_folder`` (else ``data.valid_folder``) and write the results.

    Raises:
        UserError: the section, the prompts or the checkpoint cannot be used.
    """
    # 1. Everything that can be refused without a model: settings, folders, and all prompts, so that a broken file
    #    ends the run before anything is computed.
    spawn_ranks(launcher)
    section = loaded.config.generation
    if section is None:
        raise UserError(
            "the config has no generation section",
            where="generation",
            fix="add generation = dict(...)",
            code="EVO-CLI-009",
        )
    vocab_size = loaded.config.model.vocab_size
    end_ids = end_of_answer_ids(None, section, vocab_size)
    sampling = replace(SamplingParams.from_config(section), eos_ids=end_ids)
    prompt_folder, key = find_prompt_folder(loaded.config)
    output = create_output_folder(section, prompt_folder)
    tasks = {
        task: read_prompts(files, vocab_size)
        for task, files in find_tasks(prompt_folder, key, vocab_size).items()
    }
    tokenizer = _load_tokenizer(loaded.config.data.tokenizer_path)
    config = inference_layout(loaded.config)
    with launch(config, launcher, port=port) as context:
        is_main = context.rank == 0
        if is_main:
            _log_warnings(loaded, config)

        # 2. This rank's part of the model.
        model = load_stage(config, context)

        # 3. Task by task: answer on all ranks, write on the first.
        first_number = 0
        for task, prompts in tasks.items():
            if warning := warn_of_end_ids(task, prompts, sampling):
                logger.warning("%s", warning)
            started = time.perf_counter()
            results = answer_prompts(
                model,
                prompts,
                sampling,
                batch_size=section.batch_size,
                dp=context.grid.dp,
                first_number=first_number,
                paged=section.paged,
            )
            first_number += len(prompts)
            if is_main:
                write_results(output, task, results, sampling, tokenizer)
                logger.info(
                    "%s",
                    summarize_results(task, results, time.perf_counter() - started),
                )


def _load_tokenizer(path: str | None) -> Tokenizer | None:
    return load_tokenizer(path, "data.tokenizer_path") if path else None


def _log_warnings(loaded: LoadedConfig, config: Config) -> None:
    for warning in warning_lines(loaded.warnings, loaded.path):
        logger.warning("%s", warning)
    if warning := warn_of_larger_shards(loaded.config.parallel, config.parallel):
        logger.warning("%s", warning)


def inference_layout(config: Config) -> Config:
    """Return the config with the layout for decoding: tensor mode mtp, contiguous stages, the rest data parallel.

    msp and fsp shard weights as mtp does, and the activations they save are nothing for
    one token per sequence. The weight axis of isp becomes the tensor axis, as far as it
    divides heads and widths, so that no rank gathers whole blocks.
    """
    parallel = config.parallel
    tensor_size = parallel.tensor.size
    if parallel.tensor.mode == "isp":
        tensor_size = _largest_tensor_size(config.model, parallel)
    layout = ParallelConfig(
        tensor=TensorConfig(size=tensor_size),
        pipeline=PipelineConfig(size=parallel.pipeline.size),
    )
    changes = {"num_chunks": 1, "compile": False}
    model = config.model.model_copy(update=changes)
    sections = {"parallel": layout, "model": model}
    return config.model_copy(update=sections)


def _largest_tensor_size(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the largest size that divides the weight or the tensor axis of isp, and all heads and widths."""
    # A size divides the widths if it divides their greatest common divisor; so the
    # largest for one axis is the common divisor with that.
    width = math.gcd(model.num_attention_heads, model.kv_heads, model.mlp_width)
    axes = (parallel.weight.size, parallel.tensor.size)
    return max(math.gcd(axis, width) for axis in axes)


def warn_of_larger_shards(trained: ParallelConfig, used: ParallelConfig) -> str:
    """Return a warning if decoding needs more memory for weights on each rank than training did; else ""."""
    weight_size = trained.weight.size
    tensor_size = used.tensor.size
    if trained.tensor.mode != "isp" or tensor_size >= weight_size:
        return ""
    return (
        f"each rank holds 1/{tensor_size} of its layers' weights, not 1/{weight_size} as "
        f"parallel.weight.size={weight_size} suggests: heads, key/value heads and the feed-forward width have no "
        "larger divisor in common with it (a larger parallel.pipeline.size shards them further)"
    )


def load_stage(config: Config, context: RunContext) -> LanguageModel:
    """Build this rank's part of the model and fill it from the checkpoint that the config names."""
    grid = context.grid
    stages = build_stages(config, grid, context.mode, context.device)
    parameters = stages.parameters()
    load_weights(config, parameters, context)
    (model,) = stages.models  # the layout has one chunk a rank
    model.eval()
    if grid.pp.size == 1:
        return model
    return StagedModel(model, grid.pp, config.model)


def load_weights(
    config: Config, parameters: dict[str, Any], context: RunContext
) -> None:
    """Read ``generation.ckpt_folder``, else the newest in ``ckpt.save_ckpt_folder``: native, InternEvo or HF.

    Raises:
        UserError: neither is set, or there is no checkpoint of this model.
    """
    assert config.generation is not None
    path = config.generation.ckpt_folder or config.ckpt.save_ckpt_folder
    if path is None:
        raise UserError(
            "no weights: neither generation.ckpt_folder nor ckpt.save_ckpt_folder is set",
            where="generation.ckpt_folder",
            expected="a checkpoint folder",
            code="EVO-GEN-004",
        )
    with contextlib.closing(default_exchange()) as exchange:
        reader = CheckpointReader(context.grid, exchange)
        start = _find_weights(path, reader)
        logger.info("%s", start.reason)
        if start.checkpoint is None:
            restore(start, reader, parameters, config.model.model_dump())
            return
        reader.load(start.checkpoint, parameters, strict=False, cast=True)
    trained_with = start.checkpoint.config.get("model", {})
    for line in other_settings(config, trained_with):
        logger.warning("%s", line)


def other_settings(config: Config, trained_with: Mapping[str, Any]) -> list[str]:
    """Describe each setting that changes what the weights of a checkpoint compute, and that no shape shows.

    Args:
        trained_with: the model section of the checkpoint, in which tuples are lists and sections are dicts.
    """
    settings = config_to_dict(config)["model"]
    lines = []
    for key in MODEL_SETTINGS_WITHOUT_SHAPE:
        value = settings[key]
        if key in trained_with and trained_with[key] != value:
            lines.append(
                f"model.{key} is {value}, but the checkpoint was trained with {trained_with[key]}"
            )
    return lines


def _find_weights(path: str, reader: CheckpointReader) -> StartPoint:
    """Decide what the weights of a model are read from."""
    kind = kind_of(*open_storage(path))
    info = LoadConfig(
        path=path, ckpt_type=kind if kind in ("hf", "llama") else "internevo"
    )
    chosen = CheckpointConfig(auto_resume=False, load_ckpt_info=info)
    return decide(chosen, reader, folder=None)
