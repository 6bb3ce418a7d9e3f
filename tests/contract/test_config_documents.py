"""Configuration as the documents have it: their values, forms, defaults and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomesh.config.layout import data_parallel_size
from evomesh.config.loader import LoadedConfig, load_config
from evomesh.config.reading.draft import leaves
from evomesh.config.reading.spellings import TOP_LEVEL
from evomesh.config.size import parameter_count, tokens_per_step
from tests.support.covers import covers

SEVEN_B = str(Path(__file__).parents[2] / "configs" / "7B_sft.py")
Load = Callable[..., LoadedConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write(*sets: str, text: str = "") -> LoadedConfig:
        path = tmp_path / "config.py"
        path.write_text(text)
        return load_config(str(path), sets)

    return write


# key as the documents write it -> its documented default
DEFAULTS: dict[str, Any] = {
    "JOB_NAME": "AnonymousJob",
    "seed": 1024,
    "model_type": "INTERNLM",
    "use_fp32_norm": False,
    "cudnn_deterministic": False,
    "cudnn_benchmark": False,
    "data.type": "tokenized",
    "data.seq_len": 2048,
    "data.micro_num": 1,
    "data.micro_bsz": 1,
    "data.total_steps": 50000,
    "data.train_folder": None,
    "data.valid_folder": None,
    "data.valid_every": 0,
    "data.skip_batches": "",
    "data.rampup_batch_size": "",
    "data.seed": 1024,
    "data.use_shm": False,
    "data.shm_path": "/dev/shm/metacache",
    "data.diag_outlier_ratio": 1.1,
    "data.pack_sample_into_one": False,
    "ckpt.enable_save_ckpt": False,  # True as soon as there is a folder
    "ckpt.checkpoint_every": math.inf,
    "ckpt.auto_resume": True,
    "ckpt.load_ckpt_info": None,
    "ckpt.async_upload": False,
    "ckpt.stop_file_path": None,
    "parallel.zero1.size": -1,
    "parallel.zero1.fsdp": False,
    "parallel.tensor.size": 1,
    "parallel.tensor.mode": "mtp",
    "parallel.pipeline.size": 1,
    "parallel.pipeline.interleaved_overlap": False,
    "parallel.weight.size": 1,
    "parallel.weight.overlap": False,
    "grad_scaler.fp16.initial_scale": 2.0**16,
    "grad_scaler.growth_factor": 2.0,
    "grad_scaler.backoff_factor": 0.5,
    "grad_scaler.hysteresis": 2,
    "hybrid_zero_optimizer.overlap_sync_grad": False,
    "hybrid_zero_optimizer.overlap_sync_param": False,
    "hybrid_zero_optimizer.use_split_tensor_optim": False,
    "lr_scheduler.init_steps": 0,
    "lr_scheduler.warmup_ratio": 0.0,
    "lr_scheduler.eta_min": 0.0,
    "model.dtype": "float16",
    "model.checkpoint": 0.0,
    "model.num_chunks": 1,
    "model.qk_interleaved": False,
    "model.norm_type": "rmsnorm",
    "model.layer_norm_epsilon": 1e-5,
    "model.use_flash_attn": True,
    "model.rope_base": 10000.0,
    "monitor.alert.enable_feishu_alert": False,
    "monitor.alert.feishu_alert_address": None,
    "monitor.alert.light_monitor_address": None,
    "generation": None,
}


@covers("promise:defaults", "promise:auto-resume-default")
@pytest.mark.parametrize("key", DEFAULTS)
def test_default(key: str, load: Load) -> None:
    values = dict(leaves(load().config.model_dump()))
    assert values[TOP_LEVEL.get(key, key)] == DEFAULTS[key]


def test_defaults_that_follow_others(load: Load) -> None:
    config = load("data.micro_num=3", "ckpt.save_ckpt_folder=x").config
    assert config.data.validation_micro_num == 3
    assert config.ckpt.enable_save_ckpt
    assert config.lr_scheduler.total_steps is None  # data.total_steps


@covers("promise:7b-example", "promise:load-ckpt-info-unused")
def test_chinese_guide() -> None:
    loaded = load_config(SEVEN_B)
    config = loaded.config
    assert config.run.job_name == "7b_train"
    assert config.run.tensorboard_queue == 10
    assert (
        config.data.micro_num,
        config.data.micro_bsz,
        config.data.valid_every,
        config.data.min_length,
    ) == (
        4,
        2,
        50,
        50,
    )
    assert config.model.dtype == "bfloat16"
    assert config.ckpt.load_ckpt_info is not None
    assert config.ckpt.load_ckpt_info.content == ("model",)
    keys = {words.partition(" ")[0] for words in loaded.warnings}
    assert keys == {
        "ckpt.load_ckpt_info",
        "monitor.alert.alert_file_path",
        "ckpt.async_upload",
        "data.train_folder",
        "grad_scaler",
        "parallel.weight.overlap",
        "parallel.pipeline.interleaved_overlap",
    }


ENGLISH = """
ckpt = dict(enable_save_ckpt=False, save_ckpt_folder="local:a", load_ckpt_folder="local:a/",
            load_ckpt_info=dict(path="local:b", content=("model",), ckpt_type="internlm"), checkpoint_every=50,
            async_upload=True, async_upload_tmp_folder="/dev/shm/tmp/", oss_snapshot_freq=int(50 / 2))
data = dict(seq_len=2048, micro_num=4, micro_bsz=2, valid_micro_num=4, valid_every=50, min_length=50,
            pack_sample_into_one=False, total_steps=50000, skip_batches="", rampup_batch_size="",
            empty_cache_and_diag_interval=10, diag_outlier_ratio=1.1)
hybrid_zero_optimizer = dict(overlap_sync_grad=True, overlap_sync_param=True, reduce_bucket_size=2**29,
                             clip_grad_norm=1.0)
model = dict(checkpoint=False, num_attention_heads=32, embed_split_hidden=True, vocab_size=103168, hidden_size=4096,
             num_layers=32, mlp_ratio=8 / 3, dtype="torch.float16", norm_type="rmsnorm", use_flash_attn=True,
             num_chunks=1)
parallel = dict(zero1=8, tensor=1, pipeline=dict(size=1, interleaved_overlap=True), sequence_parallel=False)
monitor = dict(alert=dict(enable_feishu_alert=False, feishu_alert_address=None, light_monitor_address=None))
"""


@covers("promise:english-example")
def test_english_guide(load: Load) -> None:
    loaded = load(text=ENGLISH)
    parallel = loaded.config.parallel
    assert (
        parallel.zero1.size,
        parallel.tensor.size,
        parallel.tensor.mode,
        parallel.pipeline.size,
    ) == (
        8,
        1,
        "mtp",
        1,
    )
    assert loaded.config.model.dtype == "float16"
    assert loaded.config.ckpt.load_ckpt_info is not None
    assert loaded.config.ckpt.load_ckpt_info.path == "local:b"
    assert any(words.startswith("ckpt.load_ckpt_folder") for words in loaded.warnings)
    assert (
        load(
            "parallel.sequence_parallel=True", text=ENGLISH
        ).config.parallel.tensor.mode
        == "msp"
    )


@covers("promise:eos-ids")
def test_generation_block(load: Load) -> None:
    text = (
        'generation = dict(ckpt_folder="a", output_folder="b", batch_size=1, eos_id=[2, 0], bos_id=1, max_length=100,\n'
        "do_sample=True, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1, length_penalty=1.0)\n"
    )
    generation = load(text=text).config.generation
    assert generation is not None
    assert generation.eos_id == (2, 0)
    generation = load("generation.eos_id=5", text=text).config.generation
    assert generation is not None
    assert generation.eos_id == (5,)


@covers("promise:gradient-accumulation")
def test_gradient_accumulation(load: Load) -> None:
    assert (
        load("data.micro_num=4", "data.gradient_accumulation=4").config.data.micro_num
        == 4
    )


@covers("promise:recompute-forms")
@pytest.mark.parametrize(
    ("form", "fraction"), [("True", 1.0), ("False", 0.0), ("0.2", 0.2), ("1", 1.0)]
)
def test_recompute_forms(form: str, fraction: float, load: Load) -> None:
    assert load(f"model.checkpoint={form}").config.model.checkpoint == fraction


@covers("promise:dtypes")
def test_dtypes(load: Load) -> None:
    forms = {
        "float16": "float16",
        "half": "float16",
        "bfloat16": "bfloat16",
        "float32": "float32",
        "tf32": "tf32",
    }
    assert {
        form: load(f"model.dtype=torch.{form}").config.model.dtype for form in forms
    } == forms


@covers("promise:7b-parameters")
def test_parameters_of_the_7b_example() -> None:
    assert parameter_count(load_config(SEVEN_B).config.model) == 7_321_948_160
    by_name = {"7B_llama2": 7_241_732_096, "7B_internlm2": 7_737_708_544}
    for name, count in by_name.items():
        assert (
            parameter_count(load_config(SEVEN_B.replace("7B_sft", name)).config.model)
            == count
        )


@covers("promise:7b-tokens-per-step", "promise:packed-length")
def test_tokens_per_step() -> None:
    config = load_config(SEVEN_B).config
    assert config.data.packed_length == 4096
    assert tokens_per_step(config) == 2048 * 2 * 4
    assert tokens_per_step(config, 8) == 131_072


@covers("promise:data-parallel-size")
def test_data_parallel_size() -> None:
    config = load_config(SEVEN_B).config
    assert data_parallel_size(config.parallel, 8) == 8
    parallel = config.parallel
    split = parallel.model_copy(
        update={
            "tensor": parallel.tensor.model_copy(update={"size": 2}),
            "pipeline": parallel.pipeline.model_copy(update={"size": 2}),
        }
    )
    assert data_parallel_size(split, 64) == 16
