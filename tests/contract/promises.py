"""What the documents promise, one row each, with the test that holds it or the issue that will.

Sources: ``usage`` (the InternEvo guide; zh and en differ), ``xtuner`` (migration guide), ``tokenized`` (the tokenised
dataset page), ``tutorial`` (train_your_internlm). Keys of a config have their own table:
evomesh/config/compatibility.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """Attributes:
    test: "tests/...py::test_name"; empty while the row is off.
    issue: the issue that turns the row on; 0 once it is on.
    """

    source: str
    words: str
    test: str = ""
    issue: int = 0

    @property
    def on(self) -> bool:
        return bool(self.test)


DATA = "tests/unit/data/"
DOCUMENTS = "tests/contract/test_config_documents.py::"
CONFIG = "tests/unit/config/test_loader.py::"
CLI = "tests/unit/config/test_cli.py::"
CHECKPOINT = "tests/unit/checkpoint/"
TRAIN = "tests/e2e/test_train.py::"

PROMISES: tuple[Promise, ...] = (
    # configuration
    Promise("usage zh", "the 7B example's values load unchanged", DOCUMENTS + "test_chinese_guide"),
    Promise(
        "usage en",
        "int forms of parallel, load_ckpt_folder, float16: the values load",
        DOCUMENTS + "test_english_guide",
    ),
    Promise("usage", "documented defaults", DOCUMENTS + "test_default"),
    Promise(
        "usage",
        "the 7B example has 7,321,948,160 parameters",
        DOCUMENTS + "test_parameters_of_the_7b_example",
    ),
    Promise("usage", "131,072 tokens a step on 8 GPUs", DOCUMENTS + "test_tokens_per_step"),
    Promise("usage", "data parallel = GPUs / pipeline / tensor", DOCUMENTS + "test_data_parallel_size"),
    Promise("usage", "packed_length = micro_bsz * seq_len", DOCUMENTS + "test_tokens_per_step"),
    Promise("usage", "zero1 <= 0, 1 and more than 1", "tests/unit/config/test_bad_configs.py::test_world"),
    Promise("usage", "auto_resume absent means True", DOCUMENTS + "test_default"),
    Promise(
        "usage", "load_ckpt_info is not used while auto_resume is True", DOCUMENTS + "test_chinese_guide"
    ),
    Promise("usage", "checkpoint: True, False or a fraction", DOCUMENTS + "test_recompute_forms"),
    Promise("usage", "dtype: torch.float16, half, bfloat16, float32, tf32", DOCUMENTS + "test_dtypes"),
    Promise("usage zh", "eos_id: one id or a list", DOCUMENTS + "test_generation_block"),
    Promise("usage zh", 'data.type="streaming" with tokenizer_path', DATA + "test_streaming.py::*"),
    Promise("xtuner", "data.dataset_weights", DATA + "test_mixture.py::test_weights_of_a_config"),
    Promise(
        "xtuner",
        "micro_num and gradient_accumulation mean the same",
        DOCUMENTS + "test_gradient_accumulation",
    ),
    Promise("usage", "reading a config leaves nothing behind", CONFIG + "test_files_of_one_name_do_not_meet"),
    Promise("usage", "config check in under a second, without torch", CLI + "test_check_is_fast"),
    # data
    Promise(
        "usage",
        "tools/tokenizer.py --text_input_path --bin_output_path: txt, json, jsonl",
        DATA + "test_chat.py::test_the_documents_tools",
    ),
    Promise(
        "usage",
        "the three example lines and their meta (0, 11), (90, 15), (208, 13)",
        DATA + "test_bin_dataset.py::test_documented_example_is_written",
    ),
    Promise(
        "usage", "type folders cn, en, code, ja, ar, kaoshi", DATA + "test_build.py::test_documented_types"
    ),
    Promise(
        "usage",
        "tools/alpaca_tokenizer.py DATASET OUT TOKENIZER --split_ratio 0.1",
        DATA + "test_chat.py::test_the_documents_tools",
    ),
    Promise("usage", "pack_sample_into_one: both ways of attention", DATA + "test_packed.py::*"),
    Promise("usage", "train_folder None: synthetic data", TRAIN + "test_synthetic_data_and_no_checkpoint"),
    Promise(
        "usage", "rampup_batch_size: start, increment, interval", DATA + "test_sampler.py::test_rampup_sizes"
    ),
    Promise("usage", "skip_batches", TRAIN + "test_stopped_and_resumed_equals_straight_to_the_bit"),
    Promise("usage zh", "use_shm and shm_path", DATA + "test_shared.py::*"),
    Promise(
        "tokenized",
        "data_order_path and tools/get_data_order.py",
        DATA + "test_look.py::test_order_and_the_documents_tool_agree",
    ),
    Promise("tokenized", "save_optimizer=False", CHECKPOINT + "test_resume.py::test_weights_only_says_so"),
    Promise(
        "tutorial", "a raw jsonl beside en/ is no type", DATA + "test_build.py::test_types_files_and_report"
    ),
    # training
    Promise(
        "usage",
        "torchrun ... train.py --config C --launcher torch",
        "tests/e2e/test_layouts.py::test_torchrun",
    ),
    Promise("usage", "srun ... python train.py --config C", "tests/e2e/test_layouts.py::test_srun"),
    Promise(
        "usage",
        "train.py --profiling",
        "tests/unit/monitor/test_profile.py::test_writes_trace_and_table_once",
    ),
    Promise(
        "usage",
        "log line: tflops, step, loss, tgs, lr, loss_scale, grad_norm, micro_num ... fwd_bwd_time",
        "tests/unit/monitor/test_metrics.py::test_line_is_the_documented_one",
    ),
    Promise(
        "usage",
        "63.27 TFLOPS at 1424.64 tokens a second and GPU",
        "tests/unit/monitor/test_metrics.py::test_tflops_of_the_documented_step",
    ),
    Promise(
        "usage",
        "num_consumed_tokens, num_samples_in_batch, largest_length, largest_batch, smallest_batch",
        "tests/unit/train/test_report.py::test_samples_are_document_pieces",
    ),
    Promise(
        "usage",
        "start lines of the log: sizes, seeds, New Run, number of elements on ranks",
        "tests/dist/test_launch.py::*",
    ),
    Promise(
        "usage",
        "lr: linear warm-up, then cosine to eta_min",
        "tests/unit/optim/test_schedule.py::test_documented_table",
    ),
    Promise(
        "usage",
        "fp16 loss scale: growth, back-off, hysteresis, minimum and maximum",
        "tests/unit/optim/test_scaler.py::*",
    ),
    Promise("usage", "models by model_initializer.register_module", "tests/unit/models/test_registry.py::*"),
    Promise("usage", "tensor modes mtp, msp, fsp, isp", "tests/dist/test_matrix.py::*"),
    Promise("usage", "weight parallel with overlap", "tests/dist/test_matrix.py::*"),
    Promise("usage", "pipeline, interleaved with num_chunks > 1", "tests/e2e/test_layouts.py::*"),
    Promise(
        "usage",
        "reduce_bucket_size, overlap_sync_grad, overlap_sync_param, all_gather_size",
        "tests/dist/test_zero_overlap.py::*",
    ),
    Promise("usage", "monitor.alert: Feishu and light monitor", issue=8),
    Promise("tokenized", "--deepspeed deepspeed_zero1|2|3", "tests/unit/config/test_deepspeed.py::*"),
    Promise("tokenized", "NPROC_PER_NODE and Aliyun DLC's variables", "tests/unit/train/test_launch.py::*"),
    # checkpoints
    Promise(
        "usage", "save_ckpt_folder with local:, boto3: and no prefix", "tests/unit/storage/test_storage.py::*"
    ),
    Promise(
        "usage",
        "async_upload, async_upload_tmp_folder, oss_snapshot_freq",
        "tests/unit/storage/test_storage.py::test_checkpoints",
    ),
    Promise(
        "usage",
        "content: model, sampler, optimizer, scheduler, all",
        CHECKPOINT + "test_resume.py::test_content_mixtures",
    ),
    Promise(
        "usage",
        "ckpt_type internevo, internlm, normal",
        CHECKPOINT + "test_resume.py::test_without_auto_resume",
    ),
    Promise(
        "usage zh",
        "ckpt_type hf and llama",
        "tests/e2e/test_convert_hf.py::test_training_starts_from_a_folder",
    ),
    Promise(
        "xtuner",
        "model_tp{i}_pp{j}.pt and model_config.pt are read",
        CHECKPOINT + "test_internevo.py::test_read_and_write_back",
    ),
    # generation and hand-over
    Promise(
        "usage zh",
        "generate.py --config with a generation section",
        "tests/e2e/test_generate.py::test_the_documents_section",
    ),
    Promise(
        "usage",
        "use_dynamic_ntk_rope up to 16k",
        "tests/unit/generate/test_against_transformers.py::test_dynamic_ntk_beyond_the_trained_length",
    ),
    Promise("usage", "web_demo", "tests/e2e/test_serve.py::test_page_and_api_answer"),
    Promise(
        "tutorial",
        "tools/transformers/convert2hf.py --src_folder --tgt_folder --tokenizer",
        "tests/e2e/test_convert_hf.py::test_tools",
    ),
    Promise("tutorial", "tensorboard --logdir", "tests/unit/monitor/test_tracker.py::*"),
    Promise("tokenized", "xtuner copy-cfg: evomesh config copy", CLI + "test_list_and_copy"),
    Promise("tokenized", "pth_to_hf CONFIG SRC DST", "tests/e2e/test_convert_hf.py::test_tools"),
)

# Where this system differs from InternEvo on purpose.
DIFFERENCES: tuple[tuple[str, str], ...] = (
    (
        "loss",
        "mean over all target tokens of a step, not mean of micro-batch means; loss.reduction brings that back",
    ),
    ("gradient norm", "one norm over all parameters is clipped, and printed as one number"),
    ("NaN", "counts as a failed step, as inf does; too many in a row end the run"),
    ("lr in the log", "the rate that this step used; InternEvo prints the next one"),
    ("min_length", "counts tokens; the documents' text says rows"),
    ("data tails", "dropped as documented, but counted and printed; data.remainder keeps them"),
    ("resume", "only from a checkpoint that verifies; any layout"),
    ("bfloat16", "no loss scale"),
    ("exit codes", "2: wrong input, 6: the numbers went wrong, 75: start me again"),
    ("global batch", "dp = GPUs / pipeline / tensor; the migration guide divides by tensor twice"),
    ("config typos", "an error with the nearest key, not silence"),
)
