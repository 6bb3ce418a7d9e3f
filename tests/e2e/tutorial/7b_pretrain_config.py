"""A pre-training config with the keys and values of the tutorial's own file.

Only its sizes may come from the environment, so that a test can train it in seconds.
"""

import os

JOB_NAME = "7b_pretrain"
DO_ALERT = False

SEQ_LEN = int(os.environ.get("SEQ_LEN", "2048"))
HIDDEN_SIZE = int(os.environ.get("HIDDEN_SIZE", "4096"))
NUM_ATTENTION_HEAD = int(os.environ.get("NUM_ATTENTION_HEAD", "32"))
NUM_LAYER = int(os.environ.get("NUM_LAYER", "32"))
VOCAB_SIZE = int(os.environ.get("VOCAB_SIZE", "103168"))
TOTAL_STEPS = int(os.environ.get("TOTAL_STEPS", "50000"))
EVERY = int(os.environ.get("EVERY", "100"))
ZERO1_SIZE = int(os.environ.get("ZERO1_SIZE", "8"))
MLP_RATIO = 8 / 3

tensorboard_folder = "logs"

ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder="local:ckpts/7b_pretrain",
    load_model_only_folder=None,
    load_ckpt_folder=None,
    load_optimizer=True,
    checkpoint_every=EVERY,
    async_upload=True,
    async_upload_tmp_folder="/dev/shm/internlm_tmp_ckpt/",
    snapshot_ckpt_folder="local:ckpts/7b_pretrain/snapshot",
    oss_snapshot_freq=EVERY // 2,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_num=4,
    micro_bsz=2,
    valid_micro_num=4,
    valid_every=EVERY,
    pack_sample_into_one=False,
    total_steps=TOTAL_STEPS,
    skip_batches="",
    rampup_batch_size="",
    min_length=50,
    train_folder="data/train",
    valid_folder="data/val",
)

grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)

hybrid_zero_optimizer = dict(
    zero_overlap_communication=True,
    reduce_bucket_size=512 * 1024 * 1024,
    clip_grad_norm=1.0,
)

loss = dict(label_smoothing=0)

adam = dict(
    lr=1e-4,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_beta2_c=0,
    adam_eps=1e-8,
    weight_decay=0.01,
)

lr_scheduler = dict(
    total_steps=data["total_steps"],
    init_steps=0,
    warmup_ratio=0.01,
    eta_min=1e-5,
    last_epoch=-1,
)

beta2_scheduler = dict(
    init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1
)

model = dict(
    checkpoint=False,
    num_attention_heads=NUM_ATTENTION_HEAD,
    embed_split_hidden=True,
    vocab_size=VOCAB_SIZE,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False,
    dtype="torch.float16",
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    num_chunks=1,
)

parallel = dict(
    zero1=ZERO1_SIZE,
    pipeline=dict(size=1, interleaved_overlap=True),
    sequence_parallel=False,
)

cudnn_deterministic = False
cudnn_benchmark = False
