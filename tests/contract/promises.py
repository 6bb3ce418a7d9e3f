"""What InternEvo's guide, the XTuner migration and the tutorial promise, one row each.

Tests say with ``@covers("promise:NAME")`` which promise they hold. Sources: ``usage`` (InternEvo's guide; its Chinese
and English versions differ), ``xtuner`` (migration guide), ``tokenized`` (XTuner's page on tokenized datasets),
``tutorial`` (train_your_internlm). Keys of a config have their own table: tests/contract/config_keys.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        name: what a test's marker calls it.
        issue: the issue that will keep it; 0 once a test covers it.
    """

    name: str
    source: str
    words: str
    issue: int = 0


PROMISES: tuple[Promise, ...] = (
    # configuration
    Promise("7b-example", "usage zh", "the 7B example's values load unchanged"),
    Promise(
        "english-example",
        "usage en",
        "int forms of parallel, load_ckpt_folder, float16: the values load",
    ),
    Promise("defaults", "usage", "documented defaults"),
    Promise("7b-parameters", "usage", "the 7B example has 7,321,948,160 parameters"),
    Promise("7b-tokens-per-step", "usage", "131,072 tokens a step on 8 GPUs"),
    Promise("data-parallel-size", "usage", "data parallel = GPUs / pipeline / tensor"),
    Promise("packed-length", "usage", "packed_length = micro_bsz * seq_len"),
    Promise("zero1-sizes", "usage", "zero1 <= 0, 1 and more than 1"),
    Promise("auto-resume-default", "usage", "auto_resume absent means True"),
    Promise(
        "load-ckpt-info-unused",
        "usage",
        "load_ckpt_info is not used while auto_resume is True",
    ),
    Promise("recompute-forms", "usage", "checkpoint: True, False or a fraction"),
    Promise("dtypes", "usage", "dtype: torch.float16, half, bfloat16, float32, tf32"),
    Promise("eos-ids", "usage zh", "eos_id: one id or a list"),
    Promise("streaming", "usage zh", 'data.type="streaming" with tokenizer_path'),
    Promise("dataset-weights", "xtuner", "data.dataset_weights"),
    Promise(
        "gradient-accumulation",
        "xtuner",
        "micro_num and gradient_accumulation mean the same",
    ),
    Promise("config-leaves-nothing", "usage", "reading a config leaves nothing behind"),
    Promise(
        "config-check-is-fast", "usage", "config check in under a second, without torch"
    ),
    # data
    Promise(
        "tokenizer-tool",
        "usage",
        "tools/tokenizer.py --text_input_path --bin_output_path: txt, json, jsonl",
    ),
    Promise(
        "example-lines",
        "usage",
        "the three example lines and their meta (0, 11), (90, 15), (208, 13)",
    ),
    Promise("type-folders", "usage", "type folders cn, en, code, ja, ar, kaoshi"),
    Promise(
        "alpaca-tool",
        "usage",
        "tools/alpaca_tokenizer.py DATASET OUT TOKENIZER --split_ratio 0.1",
    ),
    Promise(
        "pack-sample-into-one", "usage", "pack_sample_into_one: both ways of attention"
    ),
    Promise("synthetic-data", "usage", "train_folder None: synthetic data"),
    Promise("rampup", "usage", "rampup_batch_size: start, increment, interval"),
    Promise("skip-batches", "usage", "skip_batches"),
    Promise("shared-memory", "usage zh", "use_shm and shm_path"),
    Promise("data-order", "tokenized", "data_order_path and tools/get_data_order.py"),
    Promise("save-optimizer", "tokenized", "save_optimizer=False"),
    Promise("raw-jsonl-beside-types", "tutorial", "a raw jsonl beside en/ is no type"),
    # training
    Promise("torchrun", "usage", "torchrun ... train.py --config C --launcher torch"),
    Promise("srun", "usage", "srun ... python train.py --config C"),
    Promise("profiling", "usage", "train.py --profiling"),
    Promise(
        "log-line",
        "usage",
        "log line: tflops, step, loss, tgs, lr, loss_scale, grad_norm, micro_num ... fwd_bwd_time",
    ),
    Promise("tflops", "usage", "63.27 TFLOPS at 1424.64 tokens a second and GPU"),
    Promise(
        "batch-figures",
        "usage",
        "num_consumed_tokens, num_samples_in_batch, largest_length, largest_batch, smallest_batch",
    ),
    Promise(
        "start-lines",
        "usage",
        "start lines of the log: sizes, seeds, New Run, number of elements on ranks",
    ),
    Promise("lr-schedule", "usage", "lr: linear warm-up, then cosine to eta_min"),
    Promise(
        "loss-scale",
        "usage",
        "fp16 loss scale: growth, back-off, hysteresis, minimum and maximum",
    ),
    Promise("register-module", "usage", "models by model_initializer.register_module"),
    Promise("tensor-modes", "usage", "tensor modes mtp, msp, fsp, isp"),
    Promise("weight-overlap", "usage", "weight parallel with overlap"),
    Promise("interleaved", "usage", "pipeline, interleaved with num_chunks > 1"),
    Promise(
        "buckets-and-overlap",
        "usage",
        "reduce_bucket_size, overlap_sync_grad, overlap_sync_param, all_gather_size",
    ),
    Promise("alerts", "usage", "monitor.alert: Feishu and light monitor"),
    Promise(
        "xtuner-config", "tokenized", "XTuner's configs, with the edits of its guides"
    ),
    Promise(
        "xtuner-train",
        "tokenized",
        "xtuner train CONFIG --launcher --deepspeed --work-dir",
    ),
    Promise(
        "deepspeed",
        "tokenized",
        "--deepspeed deepspeed_zero1|2|3, zero*_offload, a JSON file",
    ),
    Promise("nproc-per-node", "tokenized", "NPROC_PER_NODE and Aliyun DLC's variables"),
    # checkpoints
    Promise(
        "path-forms", "usage", "save_ckpt_folder with local:, boto3: and no prefix"
    ),
    Promise(
        "uploads-and-snapshots",
        "usage",
        "async_upload, async_upload_tmp_folder, oss_snapshot_freq",
    ),
    Promise("content", "usage", "content: model, sampler, optimizer, scheduler, all"),
    Promise("ckpt-types", "usage", "ckpt_type internevo, internlm, normal"),
    Promise("ckpt-types-hf", "usage zh", "ckpt_type hf and llama"),
    Promise(
        "internevo-files", "xtuner", "model_tp{i}_pp{j}.pt and model_config.pt are read"
    ),
    # generation and export
    Promise(
        "generation-section",
        "usage zh",
        "generate.py --config with a generation section",
    ),
    Promise("dynamic-ntk", "usage", "use_dynamic_ntk_rope up to 16k"),
    Promise("web-demo", "usage", "web_demo"),
    Promise(
        "convert2hf",
        "tutorial",
        "tools/transformers/convert2hf.py --src_folder --tgt_folder --tokenizer",
    ),
    Promise("tensorboard", "tutorial", "tensorboard --logdir"),
    Promise(
        "tutorial-end-to-end",
        "tutorial",
        "get_dataset, tokenizer, torchrun, convert2hf, test.py, in this order",
    ),
    Promise("copy-cfg", "tokenized", "xtuner copy-cfg NAME DIR writes NAME_copy.py"),
    Promise("pth-to-hf", "tokenized", "pth_to_hf CONFIG SRC DST"),
    Promise(
        "xtuner-checkpoints",
        "tokenized",
        "iter_N.pth of mmengine and of DeepSpeed's ZeRO 1, 2, 3: pth_to_hf, --resume, load_from",
    ),
)

# Where this system differs from InternEvo on purpose.
DIFFERENCES: tuple[tuple[str, str], ...] = (
    (
        "loss",
        "mean over all target tokens of a step, not mean of micro-batch means; loss.reduction brings that back",
    ),
    (
        "gradient norm",
        "one norm over all parameters is clipped, and printed as one number",
    ),
    (
        "grad_profiling",
        "the norm of a layer is that of all its gradients, where InternEvo adds the norms of its parameters; zeros are "
        "counted, where InternEvo gives their share; rows of the head go to .npy files",
    ),
    ("NaN", "counts as a failed step, as inf does; too many in a row end the run"),
    ("lr in the log", "the rate that this step used; InternEvo prints the next one"),
    ("min_length", "counts tokens; InternEvo's guide says rows"),
    (
        "data tails",
        "dropped as documented, but counted and printed; data.remainder keeps them",
    ),
    ("resume", "only from a checkpoint that verifies; any layout"),
    ("bfloat16", "no loss scale"),
    (
        "exit codes",
        "2: wrong input, 6: the numbers went wrong, 75: start the same command again",
    ),
    (
        "global batch",
        "dp = GPUs / pipeline / tensor; the migration guide divides by tensor twice",
    ),
    ("tools/tokenizer.py", "replaces its output; InternEvo appends to it"),
    (
        "tools/alpaca_tokenizer.py",
        "`<eoh>`, `<eoa>` and the line break have the tokenizer's own ids, for V7_sft.model 103027, 103028 and 364, "
        "where InternEvo's script writes 103167, 103166 and 13; --split_ratio holds out other records",
    ),
    ("log prefix", "names evomesh's files: report.py in step"),
    ("first checkpoint", "checkpoint_every=50 writes step 50 first, not 49"),
    (
        "paths of the hub",
        "found in the local cache, never downloaded by a run; the error prints the command",
    ),
    ("--work-dir", "holds logs and checkpoints, as XTuner's does"),
    ("config typos", "an error with the nearest key, not silence"),
)
