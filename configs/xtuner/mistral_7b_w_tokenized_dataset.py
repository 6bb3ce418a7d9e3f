"""Mistral 7B: full fine-tuning on token files, with XTuner's names.

Command:   evomesh xtuner train mistral_7b_w_tokenized_dataset --deepspeed deepspeed_zero1
Hardware:  8 GPUs of 80 GB
Expect:    weights of mistralai/Mistral-7B-v0.3; docs/xtuner.md says what each key becomes
"""

from xtuner.utils import PROMPT_TEMPLATE

_base_ = "internlm2_7b_w_tokenized_dataset.py"

# a hub id in the local cache, or a folder
pretrained_model_name_or_path = "mistralai/Mistral-7B-v0.3"
tokenizer = dict(pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path))
prompt_template = PROMPT_TEMPLATE.mistral
