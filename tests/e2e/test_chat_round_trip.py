"""Chat folders of public shapes from records to answers: everyone sees the ids that training saw, and answers end."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from evomesh.checkpoint.huggingface.checklist import checklist
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.restore import load_model
from evomesh.cli.convert_hf import write_folder
from evomesh.cli.generate import answer_message, complete_prompt
from evomesh.data.chat_message import ChatMessage
from evomesh.data.prepare.conversations import ChatOptions, tokenize_chats
from evomesh.data.records.source_files import find_source_files
from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.tokenizer import encode_prompt, load_tokenizer
from evomesh.evaluate.native import HarnessModel
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from evomesh.serve.load import ModelOptions, load_service
from tests.support.chat_folders import FOLDERS
from tests.support.interpreter import Interpreter
from tests.support.serving import serving

QUESTION = {"role": "user", "content": "what is the 12 é?"}
ANSWER = {"role": "assistant", "content": "the cat"}
CONFIG = """
JOB_NAME = "chat"
model_type = "LLAMA2"
model = dict(
    num_layers=1, hidden_size=32, num_attention_heads=2, num_kv_attention_heads=2, mlp_ratio=2.0, multiple_of=16,
    vocab_size={vocab_size}, no_bias=True, qk_interleaved=False, dtype="torch.float32", max_position_embeddings=128,
)
data = dict(
    seq_len=128, micro_bsz=1, micro_num=2, total_steps=30, train_folder="data", tokenizer_path="tok",
    pack_sample_into_one=False,
)
adam = dict(lr=2e-2)
lr_scheduler = dict(total_steps=30, warmup_ratio=0.1, eta_min=1e-3)
ckpt = dict(save_ckpt_folder="local:ckpts", checkpoint_every=30)
"""


def train(folder: Path, row: str, interpreter: Interpreter) -> list[int]:
    """Train on one conversation and return its ids in the token file."""
    tokenizer = load_tokenizer(FOLDERS[row].write(folder / "tok"))
    records = folder / "chats.jsonl"
    records.write_text(f"{json.dumps({'messages': [QUESTION, ANSWER]})}\n" * 200)
    path = folder / "data/en/chats.bin"
    options = ChatOptions("messages", template="tokenizer")
    tokenize_chats(find_source_files([str(records)]), path, tokenizer, options)
    config = CONFIG.format(vocab_size=tokenizer.vocab_size)
    (folder / "config.py").write_text(config)
    finished = interpreter.run(["evomesh", "train", "config.py"], cwd=folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return list(map(int, BinDataset(path).read(np.array([0]))))


def ask(url: str) -> Any:
    """Return what the server answers to the question."""
    body = {"model": "hf", "messages": [QUESTION], "temperature": 0, "max_tokens": 40}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.parametrize("row", FOLDERS)
def test_prompts_are_those_of_training_and_answers_end(
    row: str,
    interpreter: Interpreter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = train(tmp_path, row, interpreter)
    monkeypatch.chdir(tmp_path)
    write_folder("ckpts", "hf", ExportOptions())
    first_target = next(n for n, token in enumerate(trained) if n and token > 0)
    prompt = [abs(token) for token in trained[:first_target]]
    assert [item.detail for item in checklist("hf") if not item.passed] == []

    # transformers, with the exported folder.
    theirs = AutoTokenizer.from_pretrained("hf", local_files_only=True)
    encoded = theirs.apply_chat_template(
        [QUESTION], add_generation_prompt=True, return_dict=True
    )
    assert encoded["input_ids"] == prompt

    # evomesh with the checkpoint and with the export: generate and eval.
    sampling = SamplingParams(do_sample=False, max_new_tokens=40)
    message = ChatMessage(QUESTION["role"], QUESTION["content"], False)
    for path in ("ckpts", "hf"):
        loaded = load_model(path, template="auto")
        assert loaded.template is not None
        assert loaded.template.encode_prompt([message]) == prompt
        harness = HarnessModel(
            loaded.model, loaded.tokenizer, eos_ids=loaded.eos_ids, context_length=128
        )
        assert harness.tok_encode(harness.apply_chat_template([QUESTION])) == prompt
        greedy = SamplingParams.from_settings(sampling, eos_ids=loaded.eos_ids)
        [[answer]] = generate_tokens(loaded.model, [prompt], greedy)
        assert answer == trained[first_target : first_target + len(answer)]
        assert answer[-1] in loaded.eos_ids

        # ``evomesh generate --prompt``: a text to complete, here the rendered question.
        # It is encoded as transformers does, with a bos in front if the tokenizer adds
        # one: then the template's own would be doubled.
        text = theirs.apply_chat_template(
            [QUESTION], add_generation_prompt=True, tokenize=False
        )
        completed = encode_prompt(loaded.tokenizer, text)
        assert completed == theirs.encode(text) == [*loaded.tokenizer.leading, *prompt]
        capsys.readouterr()
        complete_prompt(loaded, text, sampling)
        if completed == prompt:
            assert ANSWER["content"] in capsys.readouterr().out

        # ``evomesh generate --chat``: the answer alone, to the question as training saw it.
        capsys.readouterr()
        answer_message(loaded, QUESTION["content"], sampling)
        assert capsys.readouterr().out.strip() == ANSWER["content"]

    # A server with the export.
    service = load_service("hf", "cpu", ModelOptions(name="hf"))
    assert service.chat_ids([message]) == prompt
    with serving(service) as server:
        reply = ask(server.url)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"]["content"].strip() == ANSWER["content"]
    assert reply["usage"]["prompt_tokens"] == len(prompt)
