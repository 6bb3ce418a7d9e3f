"""InternLM2 7B: grouped key/value heads, no biases, 7,737,708,544 parameters.

Command:   torchrun --nnodes=1 --nproc_per_node=8 train.py --config configs/7B_internlm2.py --launcher torch
Hardware:  8 GPUs of 80 GB; 131,072 tokens a step
Expect:    loss about ln(92544) = 11.4 at step 0
"""

_base_ = "_base_/7B.py"

JOB_NAME = "7b_internlm2_train"
model_type = "INTERNLM2_PUBLIC"

model = dict(vocab_size=92544, num_kv_attention_heads=8, no_bias=True, mlp_ratio=3.5)
parallel = dict(zero1=dict(size=8))
monitor = dict(alert=dict(alert_file_path=f"llm_alter/{JOB_NAME}_alert.log"))
