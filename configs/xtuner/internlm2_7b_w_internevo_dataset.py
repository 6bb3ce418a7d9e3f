"""InternLM2 7B: full fine-tuning on InternEvo's token files, with XTuner's names.

Command:   evomesh xtuner train internlm2_7b_w_internevo_dataset --deepspeed deepspeed_zero1
Hardware:  8 GPUs of 80 GB
Expect:    weights of internlm/internlm2-7b; docs/xtuner.md says what each key becomes
"""

_base_ = "internlm2_7b_w_tokenized_dataset.py"
