"""Let stock transformers continue a text with the exported model."""

from transformers import AutoModelForCausalLM, AutoTokenizer

path = "ckpts/7b_pretrain/hf"
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
inputs = tokenizer(["The statement is "], return_tensors="pt")
inputs.pop("token_type_ids", None)
output = model.generate(**inputs, max_length=30)
print(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))
