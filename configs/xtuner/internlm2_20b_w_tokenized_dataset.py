"""InternLM2 20B: full fine-tuning on token files, with XTuner's names.

Command:   evomesh xtuner train internlm2_20b_w_tokenized_dataset --deepspeed deepspeed_zero1
Hardware:  32 GPUs of 80 GB, with --deepspeed deepspeed_zero3
Expect:    weights of internlm/internlm2-20b; docs/xtuner.md says what each key becomes
"""

_base_ = "internlm2_7b_w_tokenized_dataset.py"

# a hub id in the local cache, or a folder
pretrained_model_name_or_path = "internlm/internlm2-20b"
tokenizer = dict(pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path))
