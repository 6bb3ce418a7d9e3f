"""Every key a config file may have, with an example. One row is one test and one line of docs/compatibility.md.

What a key does stands in the schema, or in the tables of other spellings and ignored keys (evomesh/config/explain.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["effect", "warning", "refusal", "later"]


@dataclass(frozen=True)
class CompatibilityRow:
    """One key of a config file.

    Attributes:
        key: as written in a config file, dotted.
        example: a value that shows the outcome.
        outcome: "effect"; "warning" (accepted, reported once as without effect); "refusal"; "later" (refused where a
            config asks for it, because it is not available yet).
        along: further settings that the example needs, each ``key=value``.
    """

    key: str
    example: Any
    outcome: Outcome
    along: tuple[str, ...] = ()


E: Outcome = "effect"
W: Outcome = "warning"
R: Outcome = "refusal"
L: Outcome = "later"
ISP = ("parallel.tensor.mode=isp",)
STAGES = ("parallel.pipeline.size=2", "model.num_chunks=2", "data.micro_num=2")
LINEAR = ("model.rope_scaling=dict(type='linear', factor=2.0)",)
LLAMA3 = (
    "model.rope_scaling=dict(type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, "
    "original_max_position_embeddings=8192)",
)
YARN = (
    "model.rope_scaling=dict(type='yarn', factor=4.0, original_max_position_embeddings=2048)",
)
LONGROPE = (
    f"model.rope_scaling=dict(type='longrope', short_factor={[1.0] * 32}, long_factor={[4.0] * 32}, "
    "original_max_position_embeddings=2048)",
)
FP16 = ("model.dtype=torch.float16",)

ROWS: tuple[CompatibilityRow, ...] = (
    CompatibilityRow("JOB_NAME", "7b_train", E),
    CompatibilityRow("seed", 7, E),
    CompatibilityRow("deterministic", True, E),
    CompatibilityRow("cudnn_deterministic", True, E),
    CompatibilityRow("cudnn_benchmark", True, E),
    CompatibilityRow("enable_tb", False, E),
    CompatibilityRow("tensorboard_folder", "tb", E),
    CompatibilityRow("resume_tb_folder", "tb", E),
    CompatibilityRow("tensorboard", {"queue_max_length": 5}, E),
    CompatibilityRow("tensorboard.queue_max_length", 5, E),
    CompatibilityRow("run_dir", "out", E),
    CompatibilityRow("max_consecutive_skips", 5, E),
    CompatibilityRow("model_type", "LLAMA2", E),
    CompatibilityRow("use_fp32_norm", True, E),
    CompatibilityRow("output_tf32", True, L),
    CompatibilityRow("metric_dtype", "bf16", W),
    CompatibilityRow("batch_count", 5, W),
    CompatibilityRow("alert_address", "x", W),
    CompatibilityRow("moe", {"top_k": 2}, W),
    CompatibilityRow("data.type", "streaming", E),
    CompatibilityRow("data.seq_len", 1024, E),
    CompatibilityRow("data.micro_num", 2, E),
    CompatibilityRow("data.micro_bsz", 2, E),
    CompatibilityRow("data.packed_length", 8192, E),
    CompatibilityRow("data.batch_size", 4, W),
    CompatibilityRow("data.total_steps", 100, E),
    CompatibilityRow("data.epochs", 2.0, E),
    CompatibilityRow("data.train_folder", "data", E),
    CompatibilityRow("data.valid_folder", "data", E),
    CompatibilityRow("data.valid_micro_num", 2, E),
    CompatibilityRow("data.valid_every", 10, E),
    CompatibilityRow("data.valid_min_length", 10, E),
    CompatibilityRow("data.min_length", 50, E),
    CompatibilityRow("data.min_length_dict", {"code": 10}, E),
    CompatibilityRow("data.pack_sample_into_one", True, E),
    CompatibilityRow("data.remainder", "pad", E),
    CompatibilityRow("data.order", "xtuner", E),
    CompatibilityRow("data.data_order_path", "order.txt", E),
    CompatibilityRow("data.dataset_weights", {"cn": 2.0}, E),
    CompatibilityRow("data.skip_batches", "1,3-5", E),
    CompatibilityRow("data.rampup_batch_size", "1 1 10", E, ("data.micro_num=4",)),
    CompatibilityRow("data.seed", 3, E),
    CompatibilityRow("data.num_worker", 2, E),
    CompatibilityRow("data.gradient_accumulation", 3, R),
    CompatibilityRow("data.use_packed_dataset", False, W),
    CompatibilityRow("data.fixed_random_dataset_seqlen", False, E),
    CompatibilityRow("data.empty_cache_and_diag_interval", 10, E),
    CompatibilityRow("data.diag_outlier_ratio", 1.5, E),
    CompatibilityRow("data.use_shm", True, E),
    CompatibilityRow("data.shm_path", "/tmp/x", E),
    CompatibilityRow("data.tokenizer_path", "tok.json", E),
    CompatibilityRow("data.content_name", "body", E),
    CompatibilityRow("data.subset_name", "en", E),
    CompatibilityRow("data.split_name", "train_sft", E),
    CompatibilityRow("data.valid_split_name", "test", E),
    CompatibilityRow("data.allow_tokenizer_mismatch", True, E),
    CompatibilityRow("model.num_layers", 4, E),
    CompatibilityRow("model.hidden_size", 1024, E),
    CompatibilityRow("model.vocab_size", 1000, E),
    CompatibilityRow("model.num_attention_heads", 16, E),
    CompatibilityRow("model.num_kv_attention_heads", 4, E, ("model_type=LLAMA2",)),
    CompatibilityRow("model.from_hf", "tests/support/llama_sizes", E),
    CompatibilityRow("model.head_dim", 128, E, ("model_type=LLAMA2",)),
    CompatibilityRow("model.qkv_bias", False, E, ("model_type=LLAMA2",)),
    CompatibilityRow("model.o_bias", False, E, ("model_type=LLAMA2",)),
    CompatibilityRow("model.qk_norm", True, E, ("model_type=LLAMA2",)),
    CompatibilityRow("model.sliding_window", 4096, E, ("model_type=MISTRAL",)),
    CompatibilityRow(
        "model.use_sliding_window",
        False,
        E,
        ("model_type=MISTRAL", "model.sliding_window=4096"),
    ),
    CompatibilityRow("model.tie_word_embeddings", True, E),
    CompatibilityRow("model.mlp_ratio", 2.5, E),
    CompatibilityRow("model.multiple_of", 64, E),
    CompatibilityRow("model.dtype", "torch.bfloat16", E),
    CompatibilityRow("model.checkpoint", 0.5, E),
    CompatibilityRow("model.norm_type", "layernorm", E),
    CompatibilityRow("model.layer_norm_epsilon", 1e-6, E),
    CompatibilityRow("model.apply_post_layer_norm", True, E),
    CompatibilityRow("model.use_swiglu", False, E),
    CompatibilityRow("model.no_bias", True, E, ("model_type=LLAMA2",)),
    CompatibilityRow("model.qk_interleaved", True, E),
    CompatibilityRow("model.adapt_hf", False, E),
    CompatibilityRow("model.rope_base", 1e6, E),
    CompatibilityRow("model.rope_scaling_factor", 2.0, E),
    CompatibilityRow("model.max_position_embeddings", 4096, E),
    CompatibilityRow("model.use_dynamic_ntk_rope", True, E),
    CompatibilityRow("model.rope_scaling.type", "default", E, LINEAR),
    CompatibilityRow("model.rope_scaling.factor", 4.0, E, LINEAR),
    CompatibilityRow(
        "model.rope_scaling.original_max_position_embeddings", 4096, E, YARN
    ),
    CompatibilityRow("model.rope_scaling.low_freq_factor", 2.0, E, LLAMA3),
    CompatibilityRow("model.rope_scaling.high_freq_factor", 8.0, E, LLAMA3),
    CompatibilityRow("model.rope_scaling.beta_fast", 16.0, E, YARN),
    CompatibilityRow("model.rope_scaling.beta_slow", 2.0, E, YARN),
    CompatibilityRow("model.rope_scaling.attention_factor", 1.5, E, YARN),
    CompatibilityRow("model.rope_scaling.mscale", 0.5, E, YARN),
    CompatibilityRow("model.rope_scaling.mscale_all_dim", 0.5, E, YARN),
    CompatibilityRow("model.rope_scaling.truncate", False, E, YARN),
    CompatibilityRow("model.rope_scaling.short_factor", [2.0] * 32, E, LONGROPE),
    CompatibilityRow("model.rope_scaling.long_factor", [8.0] * 32, E, LONGROPE),
    CompatibilityRow("model.embed_grad_scale", 0.5, E),
    CompatibilityRow("model.embed_split_hidden", True, E),
    CompatibilityRow("model.parallel_output", False, W),
    CompatibilityRow("model.norm_head", True, E),
    CompatibilityRow("model.residual_in_fp32", True, E),
    CompatibilityRow("model.use_scaled_init", False, E),
    CompatibilityRow("model.init_type", "uniform", E),
    CompatibilityRow("model.embedding_init_std", 0.1, E),
    CompatibilityRow("model.attn_wqkv_init_std", 0.1, E),
    CompatibilityRow("model.attn_other_init_std", 0.1, E),
    CompatibilityRow("model.ffn_uplayer_init_std", 0.1, E),
    CompatibilityRow("model.ffn_other_init_std", 0.1, E),
    CompatibilityRow("model.out_head_init_std", 0.1, E),
    CompatibilityRow("model.drop_rate", 0.1, R),
    CompatibilityRow("model.attn_drop_rate", 0.1, R),
    CompatibilityRow("model.dropout_selective_checkpoint", False, W),
    CompatibilityRow("model.num_chunks", 4, E, STAGES),
    CompatibilityRow("model.use_flash_attn", False, W),
    CompatibilityRow("model.compile", False, E),
    CompatibilityRow("model.enable_qkv_fusion", False, W),
    CompatibilityRow("model.mlp_layer_fusion", True, W),
    CompatibilityRow("model.selective_checkpoint", True, W),
    CompatibilityRow("model.is_reward", True, R),
    CompatibilityRow("model.deepnorm", True, R),
    CompatibilityRow("model.num_experts", 4, R),
    CompatibilityRow("model.moe_use_residual", True, R),
    CompatibilityRow("parallel.zero1", 8, E),
    CompatibilityRow("parallel.zero1.size", 8, E),
    CompatibilityRow("parallel.zero1.fsdp", True, E),
    CompatibilityRow("parallel.tensor", 2, E),
    CompatibilityRow("parallel.tensor.size", 2, E),
    CompatibilityRow("parallel.tensor.mode", "msp", E),
    CompatibilityRow("parallel.sequence_parallel", True, E),
    CompatibilityRow("parallel.pipeline", 2, E),
    CompatibilityRow("parallel.pipeline.size", 2, E),
    CompatibilityRow("parallel.pipeline.interleaved_overlap", True, E),
    CompatibilityRow("parallel.pipeline.mode", "ZBV", E, STAGES),
    CompatibilityRow("parallel.pipeline.schedule", "zbv", E, STAGES),
    CompatibilityRow("parallel.pipeline.balance", True, E),
    CompatibilityRow("parallel.weight", 2, E, ISP),
    CompatibilityRow("parallel.weight.size", 2, E, ISP),
    CompatibilityRow("parallel.weight.overlap", True, E),
    CompatibilityRow("parallel.weight.memory_pool", True, W),
    CompatibilityRow("parallel.timeout", 300.0, E),
    CompatibilityRow("parallel.expert", 2, W),
    CompatibilityRow("parallel.expert_weight", 2, W),
    CompatibilityRow("parallel.gqa", True, R),
    CompatibilityRow("parallel.sequence_2D", {"enable": True}, R),
    CompatibilityRow("hybrid_zero_optimizer.overlap_sync_grad", True, E),
    CompatibilityRow("hybrid_zero_optimizer.overlap_sync_param", True, E),
    CompatibilityRow("hybrid_zero_optimizer.zero_overlap_communication", True, E),
    CompatibilityRow("hybrid_zero_optimizer.reduce_bucket_size", 1000, E),
    CompatibilityRow("hybrid_zero_optimizer.clip_grad_norm", 0.5, E),
    CompatibilityRow("hybrid_zero_optimizer.use_split_tensor_optim", True, E),
    CompatibilityRow("hybrid_zero_optimizer.all_gather_size", 1000, E),
    CompatibilityRow("grad_scaler.fp16.initial_scale", 2.0**10, E, FP16),
    CompatibilityRow("grad_scaler.fp16.min_scale", 2.0, E, FP16),
    CompatibilityRow("grad_scaler.fp16.growth_interval", 10, E, FP16),
    CompatibilityRow("grad_scaler.growth_factor", 4, E, FP16),
    CompatibilityRow("grad_scaler.backoff_factor", 0.25, E, FP16),
    CompatibilityRow("grad_scaler.max_scale", 2.0**20, E, FP16),
    CompatibilityRow("grad_scaler.hysteresis", 3, E, FP16),
    CompatibilityRow("adam.lr", 1e-3, E),
    CompatibilityRow("adam.adam_beta1", 0.8, E),
    CompatibilityRow("adam.adam_beta2", 0.9, E),
    CompatibilityRow("adam.adam_beta2_c", 0.8, E),
    CompatibilityRow("adam.adam_eps", 1e-6, E),
    CompatibilityRow("adam.weight_decay", 0.1, E),
    CompatibilityRow("adam.no_decay", ["bias", "norm"], E),
    CompatibilityRow("lr_scheduler.total_steps", 50, E),
    CompatibilityRow("lr_scheduler.init_steps", 10, E),
    CompatibilityRow("lr_scheduler.warmup_ratio", 0.1, E),
    CompatibilityRow("lr_scheduler.warmup_start", 0.1, E),
    CompatibilityRow("lr_scheduler.eta_min", 1e-6, E),
    CompatibilityRow("lr_scheduler.last_epoch", 5, W),
    CompatibilityRow("beta2_scheduler.init_beta2", 0.9, E),
    CompatibilityRow("beta2_scheduler.c", 0.8, E),
    CompatibilityRow("beta2_scheduler.cur_iter", 5, W),
    CompatibilityRow("loss.label_smoothing", 0.1, E),
    CompatibilityRow("loss.reduction", "micro_batch", E),
    CompatibilityRow("loss.op_type", "flash_vocab_parallel", W),
    CompatibilityRow("loss.moe_loss_coeff", 0.1, W),
    CompatibilityRow("ckpt.enable_save_ckpt", False, E, ("ckpt.save_ckpt_folder=x",)),
    CompatibilityRow("ckpt.save_ckpt_folder", "local:x", E),
    CompatibilityRow("ckpt.checkpoint_every", 50, E),
    CompatibilityRow("ckpt.checkpoint_every_epochs", 1.0, E),
    CompatibilityRow("ckpt.load_ckpt_info", {"path": "x"}, E),
    CompatibilityRow("ckpt.load_ckpt_info.path", "x", E),
    CompatibilityRow(
        "ckpt.load_ckpt_info.content", ["all"], E, ("ckpt.load_ckpt_info.path=x",)
    ),
    CompatibilityRow(
        "ckpt.load_ckpt_info.ckpt_type", "hf", E, ("ckpt.load_ckpt_info.path=x",)
    ),
    CompatibilityRow(
        "ckpt.load_ckpt_info.fallback", True, E, ("ckpt.load_ckpt_info.path=x",)
    ),
    CompatibilityRow("ckpt.load_ckpt_folder", "x", E),
    CompatibilityRow("ckpt.load_model_only_folder", "x", E),
    CompatibilityRow("ckpt.load_optimizer", False, E, ("ckpt.load_ckpt_folder=x",)),
    CompatibilityRow("ckpt.auto_resume", False, E),
    CompatibilityRow("ckpt.allow_changed_model", True, E),
    CompatibilityRow("ckpt.async_upload", True, W),
    CompatibilityRow("ckpt.async_upload_tmp_folder", "/tmp/x", E),
    CompatibilityRow("ckpt.s3_endpoint", "http://h:9000", E),
    CompatibilityRow("ckpt.oss_snapshot_freq", 25, E),
    CompatibilityRow("ckpt.snapshot_ckpt_folder", "x", E),
    CompatibilityRow("ckpt.stop_file_path", "stop", E),
    CompatibilityRow("ckpt.save_optimizer", False, E),
    CompatibilityRow("ckpt.keep_last", 3, E),
    CompatibilityRow("ckpt.keep_every", 100, E),
    CompatibilityRow("ckpt.generate_meta_data", True, W),
    CompatibilityRow("ckpt.enable_internevo2hf_ckpt", True, R),
    CompatibilityRow("monitor.alert.enable_feishu_alert", True, L),
    CompatibilityRow("monitor.alert.feishu_alert_address", "http://x", W),
    CompatibilityRow("monitor.alert.light_monitor_address", "http://x", L),
    CompatibilityRow("monitor.alert.alert_file_path", "alert.log", W),
    CompatibilityRow("monitor.tensorboard", {"queue_max_length": 5}, E),
    CompatibilityRow("monitor.tensorboard.queue_max_length", 5, E),
    CompatibilityRow("generation.output_folder", "x", E),
    CompatibilityRow("generation.ckpt_folder", "x", E),
    CompatibilityRow("generation.data_folder", "x", E),
    CompatibilityRow("generation.batch_size", 2, E),
    CompatibilityRow("generation.bos_id", 3, E),
    CompatibilityRow("generation.eos_id", [2, 0], E),
    CompatibilityRow("generation.pad_id", 0, E),
    CompatibilityRow("generation.additional_eos_token_list", [5], E),
    CompatibilityRow("generation.max_length", 50, E),
    CompatibilityRow("generation.max_new_tokens", 50, E),
    CompatibilityRow("generation.do_sample", False, E),
    CompatibilityRow("generation.temperature", 0.5, E),
    CompatibilityRow("generation.num_beams", 2, E),
    CompatibilityRow("generation.top_k", 5, E),
    CompatibilityRow("generation.top_p", 0.5, E),
    CompatibilityRow("generation.min_p", 0.5, E),
    CompatibilityRow("generation.repetition_penalty", 1.5, E),
    CompatibilityRow("generation.length_penalty", 2, E),
    CompatibilityRow("generation.num_return_sequences", 2, E),
    CompatibilityRow("generation.seed", 3, E),
)
