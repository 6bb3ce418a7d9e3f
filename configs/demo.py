"""A small language model of Python code and English prose, for two CPU cores.

Command:   make train            (or: evomesh train configs/demo.py, once tools/demo_data.py has run)
Hardware:  2 CPU cores, 2 GiB of memory, about 5 minutes
Expect:    loss 8.3 at step 0, below 4 at the end; README.md shows a whole run
"""

import os

JOB_NAME = "demo"
DATA = os.environ.get("DEMO_DATA", "demo_data")

VOCAB_SIZE = 4096
SEQ_LEN = 512

model_type = "LLAMA2"
model = dict(
    num_layers=4,
    hidden_size=192,
    num_attention_heads=6,
    num_kv_attention_heads=2,
    mlp_ratio=8 / 3,
    vocab_size=VOCAB_SIZE,
    no_bias=True,
    qk_interleaved=False,
    max_position_embeddings=SEQ_LEN,
    dtype="torch.float32",
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_bsz=2,
    micro_num=1,
    total_steps=1500,
    valid_every=500,
    pack_sample_into_one=False,
    train_folder=f"{DATA}/train",
    valid_folder=f"{DATA}/valid",
    tokenizer_path=f"{DATA}/tokenizer",
)

optimizer = dict(type="muon")  # of the hidden layers' matrices; the rest has AdamW
adam = dict(lr=2e-3, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.05)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.05, eta_min=2e-4)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)

ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder="local:llm_ckpts/demo",
    checkpoint_every=500,
    auto_resume=True,
)

parallel = dict(
    zero1=dict(size=-1),
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1),
    weight=dict(size=1),
)
