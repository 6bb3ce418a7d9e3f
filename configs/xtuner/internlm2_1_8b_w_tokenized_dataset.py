"""InternLM2 1.8B: full fine-tuning on token files, with XTuner's names.

Command:   evomesh xtuner train internlm2_1_8b_w_tokenized_dataset --deepspeed deepspeed_zero1
Hardware:  1 GPU of 80 GB or more of them
Expect:    weights of internlm/internlm2-1_8b; docs/xtuner.md says what each key becomes
"""

_base_ = "internlm2_7b_w_tokenized_dataset.py"

# a hub id in the local cache, or a folder
pretrained_model_name_or_path = "internlm/internlm2-1_8b"
tokenizer = dict(pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path))
