"""Keys and values of the configs in InternEvo's repository, one row each, and what evomesh makes of them.

What all or most of them say is in ``COMMON``; a row says what differs, as keyword arguments with the section and the
key joined by two underscores: ``data__seq_len``. A section that a row's config does not have is named in ``without``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from evomesh.config.schema import ModelFamily

Values = dict[str, Any]

COMMON: Values = {
    "model_type": "INTERNLM",
    "ckpt": dict(enable_save_ckpt=False, save_ckpt_folder="local:llm_ckpts", auto_resume=False, checkpoint_every=50,
                 async_upload=True, async_upload_tmp_folder="/dev/shm/internlm_tmp_ckpt/", oss_snapshot_freq=25),
    "data": dict(seq_len=2048, micro_num=4, micro_bsz=1, valid_micro_num=4, valid_every=0, pack_sample_into_one=False,
                 total_steps=20000, skip_batches="", rampup_batch_size="", min_length=50, train_folder=None,
                 valid_folder=None, empty_cache_and_diag_interval=200, diag_outlier_ratio=1.1),
    "grad_scaler": dict(fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000), growth_factor=2,
                        backoff_factor=0.5, max_scale=2**24, hysteresis=2),
    "hybrid_zero_optimizer": dict(overlap_sync_grad=True, overlap_sync_param=False, reduce_bucket_size=2**29,
                                  clip_grad_norm=1.0),
    "loss": dict(label_smoothing=0),
    "adam": dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01),
    "lr_scheduler": dict(init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1),
    "beta2_scheduler": dict(init_beta2=0.95, c=0, cur_iter=-1),
    "use_fp32_norm": False,
    "model": dict(checkpoint=False, num_chunks=1, embed_split_hidden=True, embed_grad_scale=1, parallel_output=True,
                  apply_post_layer_norm=False, dtype="torch.bfloat16", norm_type="rmsnorm", layer_norm_epsilon=1e-5),
    "parallel": dict(zero1=dict(size=-1), tensor=dict(size=1, mode="mtp"),
                     pipeline=dict(size=1, interleaved_overlap=True), weight=dict(size=1, overlap=True)),
    "cudnn_deterministic": False,
    "cudnn_benchmark": False,
    "monitor": dict(alert=dict(enable_feishu_alert=False, feishu_alert_address=None, light_monitor_address=None,
                               alert_file_path="llm_alter/job_alert.log"),
                    tensorboard=dict(queue_max_length=10)),
}  # fmt: skip
GENERATION = dict(
    ckpt_folder="/path/to/saved/ckpt", output_folder="/path/to/save/generation", batch_size=1, eos_id=[2, 0], bos_id=1,
    max_length=100, do_sample=True, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1, length_penalty=1.0,
)  # fmt: skip


def load_from(path: str | None, ckpt_type: str) -> Values:
    return dict(path=path, content=("model",), ckpt_type=ckpt_type)


def sizes(
    vocab: int, hidden: int, layers: int, heads: int, kv: int | None, ratio: float
) -> Values:
    """Sizes of a model, as keys of a row."""
    kv_heads = {} if kv is None else {"model__num_kv_attention_heads": kv}
    return {
        "model__vocab_size": vocab,
        "model__hidden_size": hidden,
        "model__num_layers": layers,
        "model__num_attention_heads": heads,
        "model__mlp_ratio": ratio,
        **kv_heads,
    }


@dataclass(frozen=True)
class KeySet:
    """Keys and values of one config.

    Attributes:
        name: its path in the folder ``configs`` of InternEvo's repository.
        values: its sections.
        refused: keys that are refused -> a word of the reason.
    """

    name: str
    values: Values
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def outcome(self) -> dict[str, str]:
        """Refused keys; a model type is one of them until its family is there."""
        family = self.values.get("model_type", "INTERNLM")
        renamed = {"INTERNLM2": "INTERNLM2_PUBLIC", "LLAMA": "LLAMA2"}.get(
            family, family
        )
        is_later = family in LATER and renamed not in get_args(ModelFamily)
        return self.refused | ({"model_type": "not available yet"} if is_later else {})


LATER = ("INTERNLM3", "GEMMA", "BAICHUAN2")
MOE = {"model_type": "mixture of experts"}
OLD_MOE = {
    "model_type": "mixture-of-experts",
    "model.num_experts": "mixture-of-experts",
}
IMAGES = {"data.type": "not on images"}


def row(
    name: str,
    refused: dict[str, str] | None = None,
    *,
    without: tuple[str, ...] = (),
    **changes: Any,
) -> KeySet:
    """Return a row: ``COMMON`` with changes, each ``section__key=value`` or ``name=value``."""
    values = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in COMMON.items()
    }
    for key in without:
        del values[key]
    for key, value in changes.items():
        section, _, name_in_section = key.partition("__")
        if name_in_section:
            values.setdefault(section, {})[name_in_section] = value
        else:
            values[section] = value
    steps = values.get("data", {}).get("total_steps")
    if "lr_scheduler" in values:
        values["lr_scheduler"].setdefault("total_steps", steps)
    return KeySet(name, values, refused or {})


ISP_WEIGHT = dict(
    overlap=True, launch_allgather_before="wo", forward_overlap_per="layer"
)
GRID = dict(enable=False, context_size=4, window_size=1,
            device_placement_strategy=dict(head_first=True, interleaved=False))  # fmt: skip
OLD_PARALLEL = dict(zero1=dict(size=-1, fsdp=False), tensor=1, pipeline=dict(size=1, interleaved_overlap=True),
                    sequence_parallel=False)  # fmt: skip
MOE_KEYS = dict(model__moe_type="GShard", parallel__expert=dict(size=-1, no_tp=False),
                parallel__expert_weight=dict(size=1, overlap=True))  # fmt: skip
CHAMELEON = dict(
    model_type="CHAMELEON", data__type="lumina_pickle", data__data_yaml="data.yaml", data__base_path="data/",
    data__num_worker=1, data__micro_bsz=4, data__total_steps=50000, model__no_bias=True, model__mlp_layer_fusion=True,
    ckpt__enable_internevo2hf_ckpt=False,
)  # fmt: skip
CHAMELEON_34B = CHAMELEON | sizes(65536, 8192, 48, 64, 8, 2.6875) | dict(
    adam__clip_grad=4.0, adam__lr=2e-5, model__apply_post_layer_norm=True, model__drop_rate=0.0,
)  # fmt: skip
BASES = (
    "ckpt",
    "data",
    "loss",
    "adam",
    "lr_scheduler",
    "beta2_scheduler",
    "monitor",
    "grad_scaler",
)
HF_MODEL = {"hf": "model code", "parallel.fsdp": "Hugging Face models"}
HUAWEI = sizes(103168, 4096, 32, 32, None, 8 / 3) | dict(
    data__valid_every=500, data__empty_cache_and_diag_interval=500, ckpt__enable_save_ckpt=True,
    model__dtype="torch.float16", model__checkpoint=True, model__layer_norm_epsilon=1e-6, parallel=OLD_PARALLEL,
    monitor=dict(alert=dict(enable_feishu_alert=False, feishu_alert_address=None, light_monitor_address=None)),
)  # fmt: skip

KEY_SETS: tuple[KeySet, ...] = (
    row("7B_sft.py", **sizes(103168, 4096, 32, 32, None, 8 / 3), data__micro_bsz=2, data__valid_every=50,
        ckpt__auto_resume=True, ckpt__load_ckpt_folder="local:llm_ckpts/", model__use_flash_attn=True,
        ckpt__load_ckpt_info=load_from("local:llm_ckpts/xxxx", "internevo"),
        parallel__weight=dict(size=1, overlap=True, memory_pool=True)),
    row("7B_isp_sft.py", model_type="INTERNLM2", **sizes(103168, 4096, 32, 32, None, 8 / 3), model__no_bias=True,
        model__qk_interleaved=False, data__micro_bsz=2, loss__op_type="flash_vocab_parallel", ckpt__auto_resume=True,
        ckpt__load_ckpt_info=load_from("local:llm_ckpts/xxxx", "internevo"),
        parallel__tensor=dict(size=2, mode="isp"), parallel__weight=dict(size=4, **ISP_WEIGHT),
        parallel__sequence_2D=dict(head_size=2, **GRID)),
    row("7B_internlm2.py", model_type="INTERNLM2_PUBLIC", **sizes(92544, 4096, 32, 32, 8, 3.5), model__no_bias=True,
        model__qk_interleaved=False, generation=GENERATION, parallel__tensor=dict(size=2, mode="isp"),
        parallel__weight=dict(size=2, overlap=True),
        parallel__pipeline=dict(size=1, interleaved_overlap=True, mode="1f1b"),
        ckpt__universal_ckpt=dict(enable=False, aysnc_save=True, broadcast_load=False)),
    row("7B_llama2.py", model_type="LLAMA2", **sizes(32000, 4096, 32, 32, 8, 3.5), model__no_bias=True,
        data__micro_num=2, data__total_steps=20, parallel__zero1=dict(size=4),
        parallel__tensor=dict(size=1, mode="isp"), parallel__weight=dict(size=2, overlap=True, memory_pool=True)),
    row("7B_qwen2.py", model_type="QWEN2", **sizes(152064, 3584, 28, 28, 4, 5.25), model__qkv_bias=True,
        model__o_bias=False, model__rope_base=1000000, model__use_sliding_window=False, model__sliding_window=32768,
        model__max_window_layers=28, data__total_steps=20, generation=GENERATION,
        ckpt__enable_internevo2hf_ckpt=False, ckpt__load_ckpt_info=load_from("local:llm_ckpts/xxxx/", "hf")),
    row("8B_internlm3.py", model_type="INTERNLM3", **sizes(128512, 4096, 48, 32, 2, 2.5), model__no_bias=True,
        model__rope_base=50000000, model__enable_qkv_fusion=False, data__seq_len=4096, data__micro_num=1,
        data__micro_bsz=2, ckpt__save_ckpt_folder=None, ckpt__load_ckpt_info=load_from(None, "hf"),
        hybrid_zero_optimizer__overlap_sync_param=True, loss__op_type="py_vocab_parallel", generation=GENERATION,
        parallel__zero1=dict(size=1), parallel__tensor=dict(size=1, mode="isp"),
        parallel__weight=dict(size=16, overlap=True, launch_allgather_before="wo", forward_overlap_per="module"),
        parallel__sequence_2D=dict(head_size=2, **GRID)),
    row("7B_gemma.py", model_type="GEMMA", **sizes(256000, 3072, 28, 16, 16, 8), model__no_bias=True,
        model__head_dim=256, model__add_unit_offset=True, model__use_swiglu=False, model__layer_norm_epsilon=1e-6,
        model__max_position_embeddings=8192, data__total_steps=20, generation=GENERATION,
        ckpt__load_ckpt_info=load_from("local:llm_ckpts_gemma/xxxx/", "hf")),
    row("7B_baichuan2.py", model_type="BAICHUAN2", **sizes(125696, 4096, 32, 32, None, 8 / 3), model__no_bias=True,
        model__layer_norm_epsilon=1e-6, data__total_steps=20, generation=GENERATION,
        ckpt__load_ckpt_info=load_from("local:llm_ckpts_baichuan2/xxxx/", "hf")),
    row("20B_internlm2.py", model_type="INTERNLM2", **sizes(92544, 6144, 48, 48, 8, 8 / 3), model__no_bias=True,
        model__checkpoint=0.5, data__type="tokenized", data__seq_len=16 * 1024, data__total_steps=50,
        data__train_folder="train_ds/tokenized_data", data__valid_folder="train_ds/tokenized_data",
        loss__op_type="py_vocab_parallel", generation=GENERATION, selective_checkpoint=True,
        selective_checkpoint_offload=False, parallel__zero1=dict(size=8), parallel__tensor=dict(size=1, mode="isp"),
        parallel__pipeline=dict(size=4, interleaved_overlap=True, mode="1f1b"),
        parallel__weight=dict(size=4, **ISP_WEIGHT)),
    row("20B_isp_sft.py", {"parallel.tensor.size": "does not divide"}, model_type="INTERNLM2",
        **sizes(92544, 6144, 48, 48, 8, 8 / 3), model__no_bias=True, model__checkpoint=1, data__seq_len=64 * 1024,
        data__train_folder="train_ds/tokenized_data", data__total_steps=50, selective_checkpoint=False,
        selective_checkpoint_offload=False, parallel__tensor=dict(size=32, mode="isp"),
        parallel__weight=dict(size=4, **ISP_WEIGHT), parallel__sequence_2D=dict(head_size=8, **GRID)),
    row("30B_llama2.py", {"int8_training": "int8"}, model_type="LLAMA2", **sizes(32000, 6656, 60, 52, 52, 2.6875),
        int8_training=True, int8_mode="tile_block", model__no_bias=True, model__mlp_layer_fusion=True,
        model__enable_qkv_fusion=True, data__type="streaming", data__train_folder="hf-TinyStories/data",
        data__tokenizer_path="tokenizer_llama2", parallel__tensor=dict(size=4, mode="mtp"),
        parallel__pipeline=dict(size=4, interleaved_overlap=True)),
    row("70B_pretrain_llama2.py", without=("use_fp32_norm",), model_type="LLAMA",
        **sizes(32000, 8192, 80, 64, 8, 3.5), model__no_bias=True, model__checkpoint=True, data__seq_len=4096,
        data__micro_num=12, data__micro_bsz=4, data__valid_every=50, ckpt__save_ckpt_folder=None,
        ckpt__load_ckpt_info=None, ckpt__checkpoint_every=5000000, ckpt__oss_snapshot_freq=2500000,
        parallel=OLD_PARALLEL | dict(tensor=4, pipeline=dict(size=2, interleaved_overlap=True))),
    row("70B_sft_llama2.py", without=("use_fp32_norm",), model_type="LLAMA", **sizes(32000, 8192, 80, 64, 8, 3.5),
        model__no_bias=True, model__checkpoint=True, data__seq_len=8192, data__micro_num=8,
        data__train_folder="dolly/train", data__valid_folder="dolly/valid", data__valid_every=50, adam__lr=2e-5,
        lr_scheduler__eta_min=6e-6, ckpt__save_ckpt_folder=None, ckpt__checkpoint_every=5000000,
        parallel=OLD_PARALLEL | dict(tensor=4, pipeline=dict(size=8, interleaved_overlap=True))),
    row("7B_llama2_zeropp.py", {"parallel.pipeline.use_zeropp": "experimental",
                                "parallel.pipeline.decouple_grad": "experimental"},
        model_type="LLAMA2", **sizes(32000, 4096, 32, 32, 8, 3.5), model__no_bias=True, model__num_chunks=4,
        data__unit_schedule_size=4, data__total_steps=20, hybrid_zero_optimizer__overlap_sync_grad=False,
        parallel__tensor=dict(size=1, mode="isp"), parallel__weight=dict(size=8, overlap=True, memory_pool=False),
        parallel__pipeline=dict(size=4, interleaved_overlap=True, use_zeropp=True, decouple_grad=True)),
    row("7B_hf.py", {"ckpt.load_ckpt_info.path": "internlm/internlm-7b"}, model_type="INTERNLM_FROM_HF",
        **sizes(103168, 4096, 32, 32, None, 8 / 3), model__checkpoint=True, model__adapt_hf=True,
        model__use_flash_attn=False, model__parallel_output=False, data__type="hf",
        data__tokenizer_path="internlm/internlm-7b", data__train_folder="roneneldan/TinyStories",
        data__use_packed_dataset=False, data__seq_len=1024, data__micro_bsz=2, data__use_shm=False,
        ckpt__enable_save_ckpt=True, ckpt__load_ckpt_folder="local:llm_ckpts/",
        ckpt__load_ckpt_info=load_from("internlm/internlm-7b", "hf_model"),
        hybrid_zero_optimizer__use_split_tensor_optim=False, hybrid_zero_optimizer__all_gather_size=2**29),
    row("7B_internlm2_hf.py", HF_MODEL, without=("model_type",),
        model=dict(dtype="torch.bfloat16", checkpoint=0, parallel_output=True), generation=GENERATION,
        hf=dict(cfg="huggingface_models.internlm2", cfg_cls="InternLM2Config", cfg_extra_kwargs=dict(hidden_size=4096)),
        fsdp_wrap_cls=[dict(mod="huggingface_models.internlm2", mod_cls="InternLM2DecoderLayer")],
        parallel__fsdp=dict(enable=True, mode="v1", init_method="meta"), parallel__zero1=dict(size=1)),
    row("deepseek3_hf.py", HF_MODEL | {"loss.mtp_loss_coeff": "multi-token"}, without=("model_type",),
        model=dict(dtype="torch.bfloat16", checkpoint=0, parallel_output=True, device="meta"), pad_token_id=0,
        hf=dict(cfg="huggingface_models.deepseek3", cfg_cls="DeepseekV3Config", cfg_extra_kwargs={}),
        fsdp_wrap_cls=[dict(mod="huggingface_models.deepseek3", mod_cls="DeepseekV3DecoderLayer")],
        loss__mtp_loss_coeff=0.3, data__pack_sample_into_one=True, data__num_worker=0, data__use_packed_dataset=True,
        ckpt__load_ckpt_info=load_from(None, "hh"), generation=GENERATION, parallel__zero1=dict(size=1),
        parallel__fsdp=dict(enable=True, mode="v2", init_method="cuda"), parallel__expert=dict(size=8),
        parallel__expert_weight=dict(size=1, overlap=True), parallel__expert_zero1=dict(size=1)),
    row("7B_MoE4_sft.py", OLD_MOE, model_type="INTERNLM_MoE", **sizes(103168, 4096, 32, 32, None, 4 / 3), **MOE_KEYS,
        model__num_experts=4, model__top_k=2, loss__moe_loss_coeff=0.1, parallel__expert_zero1=dict(size=-1)),
    row("1.8B_MoE16_sft.py", OLD_MOE, model_type="INTERNLM_MoE", **sizes(92544, 1024, 24, 16, None, 1.5), **MOE_KEYS,
        model__num_experts=16, model__moe_use_residual=False, model__multiple_of=128, model__parallel_output=False,
        loss__moe_loss_coeff=0.1, parallel__expert_zero1=dict(size=-1)),
    row("8x7B_mixtral.py", MOE, model_type="MIXTRALMOE", **sizes(32000, 4096, 32, 32, 8, 3.5), **MOE_KEYS,
        model__num_experts=8, model__top_k=2, model__qkv_bias=False, model__o_bias=False,
        model__use_sliding_window=False, model__max_position_embeddings=32768, loss__moe_loss_coeff=0.02),
    row("8x22B_mixtral.py", MOE, model_type="MIXTRALMOE", **sizes(32000, 6144, 56, 48, 8, 8 / 3), **MOE_KEYS,
        model__num_experts=8, model__top_k=2, model__qkv_bias=False, model__o_bias=False,
        model__use_sliding_window=False, model__max_position_embeddings=65536, loss__moe_loss_coeff=0.001),
    row("57B_qwen2_MoE.py", MOE, model_type="QWEN2MOE", **sizes(151936, 3584, 28, 28, 4, 5 / 7), **MOE_KEYS,
        model__num_experts=64, model__num_shared_experts=8, model__top_k=8, model__rope_base=1000000,
        model__use_sliding_window=False, loss__moe_loss_coeff=0.001),
    row("qwen3_30B_A3B.py", MOE, model_type="QWEN3MOE", **sizes(151936, 2048, 48, 32, 4, 0.375), model__head_dim=128,
        model__checkpoint=1, model__moe_type="Dropless", model__num_experts=128, model__num_shared_experts=0,
        model__top_k=8, loss__moe_loss_coeff=0.001, model__use_sliding_window=False,
        model__moe_layer_kwargs=dict(capacity_factor=None, aux_loss_by_layer=False, normalize_expert_weights=True,
                                     scoring_func="softmax", routed_scaling_factor=1.0),
        parallel__tensor=dict(size=1, mode="isp"), parallel__weight=dict(size=8, overlap=True),
        parallel__expert=dict(size=8, no_tp=True), parallel__expert_weight=dict(size=2, overlap=True)),
    row("7B_chameleon.py", IMAGES,
        **CHAMELEON, **sizes(65536, 4096, 32, 32, 32, 2.6875), model__drop_rate=0.05, adam__weight_decay=0.0,
        parallel__tensor=dict(size=4, mode="mtp"),
        parallel__pipeline=dict(size=4, interleaved_overlap=True, zero_bubble=False)),
    row("34B_chameleon.py", IMAGES, **CHAMELEON_34B,
        parallel__pipeline=dict(size=1, interleaved_overlap=True, zero_bubble=False)),
    row("34B_chameleon_2nodes_muxi.py", IMAGES, **CHAMELEON_34B, parallel__tensor=dict(size=2, mode="mtp"),
        parallel__pipeline=dict(size=4, interleaved_overlap=True, zero_bubble=False)),
    row("34B_chameleon_4nodes_tianshu.py", IMAGES, **CHAMELEON_34B, parallel__tensor=dict(size=8, mode="mtp"),
        parallel__pipeline=dict(size=8, interleaved_overlap=True, zero_bubble=False)),
    row("ZHH_test.py", IMAGES, **CHAMELEON_34B | sizes(65536, 128, 16, 64, 8, 2.6875)),
    row("demo_llava.py", {"data.is_multimodal": "multimodal"}, model_type="LLAVA",
        **sizes(32000, 4096, 32, 32, 8, 3.5), model__no_bias=True, data__is_multimodal=True, data__image_size=336,
        data__patch_size=14, data__packed_length=2048, data__total_steps=200, model__image_token_id=200000,
        model__vit_cfg=dict(mm_vision_tower="openai/clip-vit-large-patch14-336"),
        model__vision_proj_cfg=dict(mm_hidden_size=1024, hidden_size=4096)),
    row("20231221_hw_config.py", **HUAWEI, data__seq_len=8192, data__micro_num=2, data__total_steps=50,
        data__train_folder="dolly/train/", adam__lr=1e-5, lr_scheduler__eta_min=6e-6,
        grad_scaler__max_scale=None, ckpt__load_ckpt_info=load_from("internlm-7b", "internlm")),
    row("20231222_hw_pretrain_random.py", **HUAWEI, data__micro_num=1,
        data__total_steps=50, data__train_folder="wiki/train/", adam__lr=2e-6, adam__adam_beta2=0.999,
        ckpt__checkpoint_every=100, ckpt__load_ckpt_info=load_from("init_ckpt", "internlm")),
    row("new_hw_config_sft.py", **HUAWEI, data__micro_num=1,
        data__micro_bsz=4, data__total_steps=1000, data__train_folder="wikitext/train",
        data__valid_folder="wikitext/valid", adam__lr=2e-6, adam__adam_beta2=0.999, model__use_flash_attn=False,
        ckpt__load_ckpt_info=dict(path="init_ckpt", content=["all"], ckpt_type="internlm")),
    row("demo.py", model_type="INTERNLM2", **sizes(92544, 4096, 32, 32, 8, 3.5), model__no_bias=True,
        model__adapt_hf=False, model__checkpoint=0.2, model__rope_base=1000000, data__micro_bsz=2,
        ckpt__load_ckpt_info=load_from(None, "internevo"), enable_tb=True, parallel=OLD_PARALLEL | dict(zero1=8),
        grad_profiling=dict(grad_norm_profiling=False, zero_grad_profiling=False, interval_steps=5,
                            layers=["ScaleColumnParallelLinear"], vocab_grad_norm_profiling=False)),
    row("_base_/default_runtime.py", without=(*(name for name in BASES if name != "grad_scaler"), "model", "parallel",
                                              "hybrid_zero_optimizer", "use_fp32_norm", "model_type"),
        enable_tb=True, grad_profiling=dict(grad_norm_profiling=False, zero_grad_profiling=False, interval_steps=5)),
    row("_base_/models/internlm_7B.py", without=BASES, **sizes(103168, 4096, 32, 32, None, 8 / 3),
        parallel__zero1=dict(size=8)),
    row("_base_/models/internlm_20B.py", without=BASES, **sizes(103168, 5120, 60, 40, None, 8 / 3),
        parallel__zero1=dict(size=8), parallel__tensor=dict(size=4, mode="mtp")),
    row("_base_/models/internlm2_1B.py", without=BASES, model_type="INTERNLM2_PUBLIC",
        **sizes(92544, 2048, 24, 16, 8, 4), model__no_bias=True, model__checkpoint=0.2, model__multiple_of=128,
        model__rope_base=1000000, model__norm_head=True, parallel__zero1=dict(size=8)),
    row("_base_/models/internlm2_7B.py", without=BASES, model_type="INTERNLM2", **sizes(92544, 4096, 32, 32, 8, 3.5),
        model__no_bias=True, model__checkpoint=0.2, model__adapt_hf=False, model__rope_base=1000000,
        parallel=OLD_PARALLEL | dict(zero1=dict(size=8, fsdp=False))),
    row("_base_/models/internlm2_20B.py", without=BASES, model_type="INTERNLM2",
        **sizes(92544, 6144, 48, 48, 8, 8 / 3), model__no_bias=True, model__checkpoint=1.0, model__adapt_hf=True,
        model__rope_base=1000000,
        parallel=OLD_PARALLEL | dict(zero1=dict(size=16, fsdp=False), tensor=2, sequence_parallel=True)),
)  # fmt: skip
# Of the tutorial train_your_internlm: keys of 2023, and top-level names of TensorBoard.
TUTORIAL = row(
    "7b_pretrain_config.py", without=("model_type", "use_fp32_norm", "monitor"),
    **sizes(103168, 4096, 32, 32, None, 8 / 3), model__dtype="torch.float16", model__use_flash_attn=True,
    data__micro_bsz=2, data__valid_every=100, data__total_steps=50000, data__train_folder="data/train",
    data__valid_folder="data/val", hybrid_zero_optimizer__overlap_sync_param=True, enable_tb=True,
    tensorboard_folder="logs", parallel=dict(zero1=8, pipeline=dict(size=1, interleaved_overlap=True),
                                             sequence_parallel=False),
    ckpt=dict(enable_save_ckpt=True, save_ckpt_folder="local:ckpts/7b_pretrain", load_optimizer=True,
              load_model_only_folder=None, checkpoint_every=100,
              snapshot_ckpt_folder="local:ckpts/7b_pretrain/snapshot"),
)  # fmt: skip
