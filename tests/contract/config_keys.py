"""Every key a config file may have: what it does here. One row is one test and one line of docs/compatibility.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["effect", "warning", "refusal", "later"]


@dataclass(frozen=True)
class CompatibilityRow:
    """Attributes:
    key: as written in a config file, dotted.
    example: a value that shows the outcome.
    outcome: "effect"; "warning" (accepted, said once that it changes nothing); "refusal"; "later" (refused where a
        config asks for it, because it is not available yet).
    words: what the key does, or why not.
    along: further settings that the example needs, each ``key=value``.
    """

    key: str
    example: Any
    outcome: Outcome
    words: str
    along: tuple[str, ...] = ()


E: Outcome = "effect"
W: Outcome = "warning"
R: Outcome = "refusal"
L: Outcome = "later"
NO_MOE = "mixture-of-experts models are not part of this system"
ISP = ("parallel.tensor.mode=isp",)
STAGES = ("parallel.pipeline.size=2", "model.num_chunks=2", "data.micro_num=2")
FP16 = ("model.dtype=torch.float16",)
GENERATION = "see generation.md"
EXPORTED = "recorded and exported; prompts are taken as they are, and nothing is padded"

ROWS: tuple[CompatibilityRow, ...] = (
    CompatibilityRow("JOB_NAME", "7b_train", E, "names the run's folder and log"),
    CompatibilityRow("seed", 7, E, "initial weights and sampling"),
    CompatibilityRow("cudnn_deterministic", True, E, "forwarded to torch"),
    CompatibilityRow("cudnn_benchmark", True, E, "forwarded to torch"),
    CompatibilityRow("enable_tb", False, E, "TensorBoard files on or off"),
    CompatibilityRow(
        "tensorboard_folder", "tb", E, "where they go; also the environment variable of this name"
    ),
    CompatibilityRow(
        "resume_tb_folder", "tb", E, "earlier files to go on from; also the environment variable of this name"
    ),
    CompatibilityRow("tensorboard", {"queue_max_length": 5}, E, "see tensorboard.queue_max_length"),
    CompatibilityRow("tensorboard.queue_max_length", 5, E, "steps buffered before a write"),
    CompatibilityRow("run_dir", "out", E, "folder of log, metrics and TensorBoard files"),
    CompatibilityRow("max_consecutive_skips", 5, E, "so many steps with inf or NaN in a row end the run"),
    CompatibilityRow(
        "model_type", "LLAMA2", E, "INTERNLM, INTERNLM2_PUBLIC, LLAMA2 or a registered model of your own"
    ),
    CompatibilityRow("use_fp32_norm", True, E, "norms in float32"),
    CompatibilityRow("output_tf32", True, L, "output head in TF32"),
    CompatibilityRow("metric_dtype", "bf16", W, "metrics are always accumulated in at least float32"),
    CompatibilityRow("batch_count", 5, W, "the training state counts"),
    CompatibilityRow(
        "alert_address", "x", W, "older name without effect; monitor.alert.feishu_alert_address"
    ),
    CompatibilityRow("moe", {"top_k": 2}, W, NO_MOE),
    CompatibilityRow(
        "data.type", "streaming", E, "tokenized, or streaming: text tokenised while training reads it"
    ),
    CompatibilityRow("data.seq_len", 1024, E, "longest attention segment, in tokens"),
    CompatibilityRow("data.micro_num", 2, E, "micro-batches of one step"),
    CompatibilityRow("data.micro_bsz", 2, E, "packed length = micro_bsz * seq_len"),
    CompatibilityRow(
        "data.packed_length", 8192, E, "sets micro_bsz where that is absent; else it must agree"
    ),
    CompatibilityRow("data.batch_size", 4, W, "is micro_num"),
    CompatibilityRow("data.total_steps", 100, E, "steps of the training"),
    CompatibilityRow("data.train_folder", "data", E, "tokenised data; None is synthetic data, said once"),
    CompatibilityRow("data.valid_folder", "data", E, "validation sets"),
    CompatibilityRow("data.valid_micro_num", 2, E, "micro-batches of a validation step"),
    CompatibilityRow("data.valid_every", 10, E, "steps between validations; <= 0: never"),
    CompatibilityRow("data.valid_min_length", 10, E, "shorter validation samples are left out"),
    CompatibilityRow(
        "data.min_length", 50, E, "shorter samples, in tokens, are left out (the documents' text says rows)"
    ),
    CompatibilityRow("data.min_length_dict", {"code": 10}, E, "the same by part of the path"),
    CompatibilityRow("data.pack_sample_into_one", True, E, "attention across the samples of a pack"),
    CompatibilityRow("data.remainder", "pad", E, "what happens to tokens that fill no pack"),
    CompatibilityRow("data.order", "xtuner", E, "shuffles and labels as InternEvo or as XTuner has them"),
    CompatibilityRow("data.data_order_path", "order.txt", E, "order of the files, in XTuner's format"),
    CompatibilityRow("data.dataset_weights", {"cn": 2.0}, E, "shares of the packs, by part of the path"),
    CompatibilityRow("data.skip_batches", "1,3-5", E, "steps whose data is consumed and not trained on"),
    CompatibilityRow(
        "data.rampup_batch_size",
        "1 1 10",
        E,
        "micro_num grows: start, increment, steps between",
        ("data.micro_num=4",),
    ),
    CompatibilityRow("data.seed", 3, E, "order of the packs"),
    CompatibilityRow("data.num_worker", 2, E, "background readers"),
    CompatibilityRow("data.gradient_accumulation", 3, R, "must be micro_num, which it means"),
    CompatibilityRow("data.use_packed_dataset", False, W, "data is always packed"),
    CompatibilityRow("data.fixed_random_dataset_seqlen", False, E, "synthetic samples fill seq_len"),
    CompatibilityRow(
        "data.empty_cache_and_diag_interval", 10, E, "steps between freeing caches and looking for slow ranks"
    ),
    CompatibilityRow("data.diag_outlier_ratio", 1.5, E, "how much slower than the median is slow"),
    CompatibilityRow("data.use_shm", True, E, "one copy of the packing index a node"),
    CompatibilityRow("data.shm_path", "/tmp/x", E, "where use_shm keeps it"),
    CompatibilityRow("data.tokenizer_path", "tok.json", E, "tokenizer of the data"),
    CompatibilityRow("data.content_name", "body", E, "text column of streaming data"),
    CompatibilityRow("data.subset_name", "en", E, "subset of streaming data"),
    CompatibilityRow(
        "data.split_name", "train_sft", E, "split of streaming data; default: the one named train"
    ),
    CompatibilityRow(
        "data.valid_split_name",
        "test",
        E,
        "split of streaming data to validate on; default: validation, else test",
    ),
    CompatibilityRow(
        "data.allow_tokenizer_mismatch",
        True,
        E,
        "train although data and validation were tokenised differently",
    ),
    CompatibilityRow("model.num_layers", 4, E, "layers"),
    CompatibilityRow("model.hidden_size", 1024, E, "width"),
    CompatibilityRow("model.vocab_size", 1000, E, "vocabulary"),
    CompatibilityRow("model.num_attention_heads", 16, E, "query heads"),
    CompatibilityRow(
        "model.num_kv_attention_heads",
        4,
        E,
        "key/value heads; INTERNLM has as many as query heads",
        ("model_type=LLAMA2",),
    ),
    CompatibilityRow(
        "model.mlp_ratio",
        2.5,
        E,
        "feed-forward width = int(hidden_size * mlp_ratio), rounded up to multiple_of",
    ),
    CompatibilityRow("model.multiple_of", 64, E, "see mlp_ratio"),
    CompatibilityRow(
        "model.dtype",
        "torch.bfloat16",
        E,
        "torch.float16|half|bfloat16|float32|tf32|float64; absent: float16, said once",
    ),
    CompatibilityRow(
        "model.checkpoint", 0.5, E, "True, False or the fraction of layers whose activations are recomputed"
    ),
    CompatibilityRow("model.norm_type", "layernorm", E, "rmsnorm or layernorm"),
    CompatibilityRow("model.layer_norm_epsilon", 1e-6, E, "epsilon of the norms"),
    CompatibilityRow("model.apply_post_layer_norm", True, E, "norms behind the additions (INTERNLM2_PUBLIC)"),
    CompatibilityRow("model.use_swiglu", False, E, "SwiGLU, or GELU"),
    CompatibilityRow(
        "model.no_bias", True, E, "attention without biases; INTERNLM always has them", ("model_type=LLAMA2",)
    ),
    CompatibilityRow(
        "model.qk_interleaved",
        True,
        E,
        "rotary pairs are neighbours, or first and second half; default by family",
    ),
    CompatibilityRow("model.adapt_hf", False, E, "the opposite of qk_interleaved"),
    CompatibilityRow("model.rope_base", 1e6, E, "rotary base"),
    CompatibilityRow("model.rope_scaling_factor", 2.0, E, "of dynamic NTK"),
    CompatibilityRow("model.max_position_embeddings", 4096, E, "trained length, for dynamic NTK"),
    CompatibilityRow("model.use_dynamic_ntk_rope", True, E, "dynamic NTK beyond the trained length"),
    CompatibilityRow("model.embed_grad_scale", 0.5, E, "scale of the embedding's gradient"),
    CompatibilityRow("model.embed_split_hidden", True, E, "embedding cut by columns or by rows"),
    CompatibilityRow("model.parallel_output", False, W, "the loss never builds the whole logits"),
    CompatibilityRow("model.norm_head", True, E, "rows of the output head are normalised"),
    CompatibilityRow("model.residual_in_fp32", True, E, "residual stream in float32"),
    CompatibilityRow("model.use_scaled_init", False, E, "initial wo and w2 shrink with depth"),
    CompatibilityRow("model.init_type", "uniform", E, "normal or uniform"),
    CompatibilityRow("model.embedding_init_std", 0.1, E, "initial standard deviation; default by family"),
    CompatibilityRow("model.attn_wqkv_init_std", 0.1, E, "initial standard deviation; default by family"),
    CompatibilityRow("model.attn_other_init_std", 0.1, E, "initial standard deviation; default by family"),
    CompatibilityRow("model.ffn_uplayer_init_std", 0.1, E, "initial standard deviation; default by family"),
    CompatibilityRow("model.ffn_other_init_std", 0.1, E, "initial standard deviation; default by family"),
    CompatibilityRow("model.out_head_init_std", 0.1, E, "initial standard deviation; default by family"),
    CompatibilityRow("model.drop_rate", 0.1, R, "there is no dropout"),
    CompatibilityRow("model.attn_drop_rate", 0.1, R, "there is no dropout"),
    CompatibilityRow("model.dropout_selective_checkpoint", False, W, "there is no dropout"),
    CompatibilityRow("model.num_chunks", 4, E, "pieces of a stage in an interleaved pipeline", STAGES),
    CompatibilityRow("model.use_flash_attn", False, W, "the fastest kernel at hand is taken on every device"),
    CompatibilityRow("model.compile", False, E, "torch.compile of the blocks; auto: on CUDA"),
    CompatibilityRow("model.enable_qkv_fusion", False, W, "query, key and value are one matrix"),
    CompatibilityRow("model.mlp_layer_fusion", True, W, "the input matrices are always multiplied apart"),
    CompatibilityRow("model.selective_checkpoint", True, W, "model.checkpoint recomputes whole layers"),
    CompatibilityRow("model.is_reward", True, R, "reward models are not part of this system"),
    CompatibilityRow("model.deepnorm", True, R, "DeepNorm is not part of this system"),
    CompatibilityRow("model.num_experts", 4, R, NO_MOE),
    CompatibilityRow("model.moe_use_residual", True, R, NO_MOE),
    CompatibilityRow("parallel.zero1", 8, E, "int form of zero1.size"),
    CompatibilityRow(
        "parallel.zero1.size", 8, E, "ranks over which optimizer state is cut; <= 0: all data-parallel ranks"
    ),
    CompatibilityRow(
        "parallel.zero1.fsdp", True, E, "weights and gradients cut over the zero1 ranks too (ZeRO-3)"
    ),
    CompatibilityRow("parallel.tensor", 2, E, "int form of tensor.size, mode mtp"),
    CompatibilityRow("parallel.tensor.size", 2, E, "ranks that share a layer or a sequence"),
    CompatibilityRow("parallel.tensor.mode", "msp", E, "mtp, msp, fsp or isp"),
    CompatibilityRow("parallel.sequence_parallel", True, E, "with the int form of tensor: mode msp"),
    CompatibilityRow("parallel.pipeline", 2, E, "int form of pipeline.size"),
    CompatibilityRow("parallel.pipeline.size", 2, E, "stages"),
    CompatibilityRow(
        "parallel.pipeline.interleaved_overlap",
        True,
        E,
        "both ways the same: sends and receives are always asynchronous",
    ),
    CompatibilityRow("parallel.pipeline.mode", "ZBV", E, "older name of pipeline.schedule", STAGES),
    CompatibilityRow(
        "parallel.pipeline.schedule", "zbv", E, "order of the stages' work: 1f1b, interleaved or zbv", STAGES
    ),
    CompatibilityRow("parallel.pipeline.balance", True, E, "stages weigh embedding and head"),
    CompatibilityRow("parallel.weight", 2, E, "int form of weight.size", ISP),
    CompatibilityRow("parallel.weight.size", 2, E, "ranks over which weights are cut (isp)", ISP),
    CompatibilityRow("parallel.weight.overlap", True, E, "gathers behind computation"),
    CompatibilityRow(
        "parallel.weight.memory_pool",
        True,
        W,
        "gathered weights are freed and their memory is used again anyway",
    ),
    CompatibilityRow("parallel.expert", 2, W, NO_MOE),
    CompatibilityRow("parallel.expert_weight", 2, W, NO_MOE),
    CompatibilityRow("parallel.gqa", True, R, "model.num_kv_attention_heads says it"),
    CompatibilityRow("parallel.sequence_2D", {"enable": True}, R, "not part of this system"),
    CompatibilityRow(
        "hybrid_zero_optimizer.overlap_sync_grad", True, E, "gradients reduced behind the backward pass"
    ),
    CompatibilityRow(
        "hybrid_zero_optimizer.overlap_sync_param",
        True,
        E,
        "parameters gathered behind the next forward pass",
    ),
    CompatibilityRow(
        "hybrid_zero_optimizer.zero_overlap_communication", True, E, "older name of overlap_sync_grad"
    ),
    CompatibilityRow("hybrid_zero_optimizer.reduce_bucket_size", 1000, E, "elements of one reduction"),
    CompatibilityRow("hybrid_zero_optimizer.clip_grad_norm", 0.5, E, "largest global gradient norm; 0: any"),
    CompatibilityRow(
        "hybrid_zero_optimizer.use_split_tensor_optim", True, E, "optimizer state cut evenly through tensors"
    ),
    CompatibilityRow("hybrid_zero_optimizer.all_gather_size", 1000, E, "elements of one gather"),
    CompatibilityRow("grad_scaler.fp16.initial_scale", 2.0**10, E, "first loss scale (float16 only)", FP16),
    CompatibilityRow("grad_scaler.fp16.min_scale", 2.0, E, "lowest loss scale", FP16),
    CompatibilityRow("grad_scaler.fp16.growth_interval", 10, E, "good steps before it grows", FP16),
    CompatibilityRow("grad_scaler.growth_factor", 4, E, "how much it grows", FP16),
    CompatibilityRow("grad_scaler.backoff_factor", 0.25, E, "how much it falls", FP16),
    CompatibilityRow("grad_scaler.max_scale", 2.0**20, E, "highest loss scale", FP16),
    CompatibilityRow("grad_scaler.hysteresis", 3, E, "overflows before it falls", FP16),
    CompatibilityRow("adam.lr", 1e-3, E, "peak learning rate"),
    CompatibilityRow("adam.adam_beta1", 0.8, E, "AdamW"),
    CompatibilityRow("adam.adam_beta2", 0.9, E, "AdamW"),
    CompatibilityRow("adam.adam_beta2_c", 0.8, E, "exponent of the beta2 schedule; 0: constant"),
    CompatibilityRow("adam.adam_eps", 1e-6, E, "AdamW"),
    CompatibilityRow("adam.weight_decay", 0.1, E, "AdamW, decoupled"),
    CompatibilityRow(
        "adam.no_decay",
        ["bias", "norm"],
        E,
        "what is left out of weight decay; default as documented: nothing",
    ),
    CompatibilityRow("lr_scheduler.total_steps", 50, E, "length of the schedule; default data.total_steps"),
    CompatibilityRow("lr_scheduler.init_steps", 10, E, "steps before the warm-up"),
    CompatibilityRow("lr_scheduler.warmup_ratio", 0.1, E, "share of the steps that warm up"),
    CompatibilityRow("lr_scheduler.eta_min", 1e-6, E, "learning rate at the end"),
    CompatibilityRow("lr_scheduler.last_epoch", 5, W, "a resume goes on from the checkpoint"),
    CompatibilityRow("beta2_scheduler.init_beta2", 0.9, E, "default adam.adam_beta2"),
    CompatibilityRow("beta2_scheduler.c", 0.8, E, "default adam.adam_beta2_c"),
    CompatibilityRow("beta2_scheduler.cur_iter", 5, W, "a resume goes on from the checkpoint"),
    CompatibilityRow("loss.label_smoothing", 0.1, E, "label smoothing"),
    CompatibilityRow(
        "loss.reduction", "micro_batch", E, "mean over all tokens of a step, or InternEvo's mean of means"
    ),
    CompatibilityRow("loss.op_type", "flash_vocab_parallel", W, "there is one loss"),
    CompatibilityRow("loss.moe_loss_coeff", 0.1, W, NO_MOE),
    CompatibilityRow(
        "ckpt.enable_save_ckpt", False, E, "save; absent: if there is a folder", ("ckpt.save_ckpt_folder=x",)
    ),
    CompatibilityRow(
        "ckpt.save_ckpt_folder",
        "local:x",
        E,
        "where to: local: or plain path, boto3:s3://BUCKET.ENDPOINT/KEY, s3://BUCKET/KEY",
    ),
    CompatibilityRow("ckpt.checkpoint_every", 50, E, "steps between checkpoints; inf: one at the end"),
    CompatibilityRow("ckpt.load_ckpt_info", {"path": "x"}, E, "what to start from, with auto_resume=False"),
    CompatibilityRow("ckpt.load_ckpt_info.path", "x", E, "folder"),
    CompatibilityRow(
        "ckpt.load_ckpt_info.content",
        ["all"],
        E,
        "model, sampler, optimizer, scheduler, all",
        ("ckpt.load_ckpt_info.path=x",),
    ),
    CompatibilityRow(
        "ckpt.load_ckpt_info.ckpt_type",
        "hf",
        E,
        "internevo, internlm, normal; hf, hf_llama, llama; a registered loader of your own",
        ("ckpt.load_ckpt_info.path=x",),
    ),
    CompatibilityRow(
        "ckpt.load_ckpt_folder", "x", E, "older name of load_ckpt_info; a string means content all"
    ),
    CompatibilityRow(
        "ckpt.load_model_only_folder", "x", E, "older name of load_ckpt_info with content model"
    ),
    CompatibilityRow("ckpt.auto_resume", False, E, "go on from the newest good checkpoint; absent: True"),
    CompatibilityRow("ckpt.async_upload", True, W, "for remote folders only"),
    CompatibilityRow("ckpt.async_upload_tmp_folder", "/tmp/x", E, "staging for uploads"),
    CompatibilityRow(
        "ckpt.s3_endpoint",
        "http://h:9000",
        E,
        "where s3://BUCKET/KEY lies; else the environment says, else AWS",
    ),
    CompatibilityRow(
        "ckpt.oss_snapshot_freq",
        25,
        E,
        "steps between snapshots; default half of checkpoint_every in a remote folder, else none",
    ),
    CompatibilityRow("ckpt.snapshot_ckpt_folder", "x", E, "where snapshots go"),
    CompatibilityRow("ckpt.stop_file_path", "stop", E, "a file that ends the run at a step"),
    CompatibilityRow("ckpt.save_optimizer", False, E, "checkpoints of weights alone"),
    CompatibilityRow("ckpt.keep_last", 3, E, "how many of the newest checkpoints stay"),
    CompatibilityRow("ckpt.keep_every", 100, E, "which steps stay for ever"),
    CompatibilityRow("ckpt.generate_meta_data", True, W, "every checkpoint loads in any layout"),
    CompatibilityRow("ckpt.enable_internevo2hf_ckpt", True, R, "export a finished checkpoint"),
    CompatibilityRow("monitor.alert.enable_feishu_alert", True, L, "alerts"),
    CompatibilityRow(
        "monitor.alert.feishu_alert_address",
        "http://x",
        W,
        "webhook of alerts; never written to a log or checkpoint",
    ),
    CompatibilityRow("monitor.alert.light_monitor_address", "http://x", L, "heartbeats"),
    CompatibilityRow("monitor.alert.alert_file_path", "alert.log", W, "file of alerts, which are off"),
    CompatibilityRow("monitor.tensorboard", {"queue_max_length": 5}, E, "as the top-level tensorboard"),
    CompatibilityRow("monitor.tensorboard.queue_max_length", 5, E, "as tensorboard.queue_max_length"),
    CompatibilityRow("generation.output_folder", "x", E, GENERATION),
    CompatibilityRow("generation.ckpt_folder", "x", E, GENERATION),
    CompatibilityRow("generation.data_folder", "x", E, GENERATION),
    CompatibilityRow("generation.batch_size", 2, E, GENERATION),
    CompatibilityRow("generation.bos_id", 3, E, EXPORTED),
    CompatibilityRow("generation.eos_id", [2, 0], E, "one id or a list"),
    CompatibilityRow("generation.pad_id", 0, E, EXPORTED),
    CompatibilityRow("generation.additional_eos_token_list", [5], E, GENERATION),
    CompatibilityRow("generation.max_length", 50, E, "with the prompt"),
    CompatibilityRow("generation.max_new_tokens", 50, E, "without the prompt"),
    CompatibilityRow("generation.do_sample", False, E, GENERATION),
    CompatibilityRow("generation.temperature", 0.5, E, GENERATION),
    CompatibilityRow("generation.num_beams", 2, E, GENERATION),
    CompatibilityRow("generation.top_k", 5, E, GENERATION),
    CompatibilityRow("generation.top_p", 0.5, E, GENERATION),
    CompatibilityRow("generation.min_p", 0.5, E, GENERATION),
    CompatibilityRow("generation.repetition_penalty", 1.5, E, GENERATION),
    CompatibilityRow("generation.length_penalty", 2, E, GENERATION),
    CompatibilityRow("generation.num_return_sequences", 2, E, "answers a prompt"),
    CompatibilityRow("generation.seed", 3, E, GENERATION),
)
