"""Train the model of parallel_blocks.py on synthetic data.

From this folder, run: evomesh train config.py
"""

from parallel_blocks import build

from evomesh import register_model

register_model("PARALLEL_BLOCKS", build)

JOB_NAME = "parallel_blocks"
model_type = "PARALLEL_BLOCKS"
model = dict(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    mlp_ratio=2.0,
    multiple_of=32,
    vocab_size=1000,
    dtype="torch.float32",
    first_gain=0.5,  # a parameter of this model's builder
)
data = dict(seq_len=128, micro_bsz=4, micro_num=1, total_steps=20, train_folder=None)
adam = dict(lr=1e-3)
