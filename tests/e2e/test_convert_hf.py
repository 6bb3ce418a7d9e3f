"""The converters' command lines, and what others make of the folders: transformers, ctranslate2, a training run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomesh.checkpoint.huggingface.checklist import checklist
from evomesh.config.schema import GenerationConfig
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel
from tests.e2e.conftest import Run
from tests.support.covers import covers
from tests.support.runs import write_run
from tests.unit.checkpoint.huggingface.hf_models import (
    found_in,
    model_config,
    save_model,
)

ROOT = Path(__file__).parents[2]
# The top two logits of every greedy step differ by more than 1e-3.
PROMPTS = [[3, 7, 11, 20], [5, 4, 60]]
TEXT = ["the cat sat on the mat", "a dog saw the cat", "春眠不觉晓 naïve café"] * 4


def make_tokenizer(folder: Path) -> int:
    """Train a byte-level tokenizer with a chat template and return the number of its ids."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "auto_map": {"AutoTokenizer": "evil.py"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    return int(tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, run: Run
) -> tuple[LanguageModel, Path]:
    """An InternLM model with biases and its folder, made by the command."""
    place = tmp_path_factory.mktemp("export")
    size = make_tokenizer(place / "tok")
    config = model_config(
        "INTERNLM",
        "float32",
        vocab_size=size,
        rope_base=10000.0,
        max_position_embeddings=256,
    )
    model, _ = save_model(
        place / "c", config, str(place / "tok"), GenerationConfig(eos_id=(2,), bos_id=1)
    )
    said = run(
        "evomesh", "convert", "to-hf", "c", "hf", "--max-shard-size", "100KB", cwd=place
    )
    assert "largest logit difference between the native model and transformers" in said
    return model, place / "hf"


def test_greedy_text_is_that_of_transformers(
    exported: tuple[LanguageModel, Path],
) -> None:
    ours, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    assert theirs.dtype == torch.float32
    answers = generate_tokens(
        ours, PROMPTS, SamplingParams(do_sample=False, max_new_tokens=64)
    )
    for prompt, [mine] in zip(PROMPTS, answers, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=None,
        )
        assert out[0, len(prompt) :].tolist() == mine
        assert len(set(mine)) > 5  # not one token over and over


def test_generation_stops_at_every_eos(exported: tuple[LanguageModel, Path]) -> None:
    ours, folder = exported
    record = json.loads((folder / "generation_config.json").read_text())
    # 3: the chat template ends turns with it.
    assert record["eos_token_id"] == [2, 3] and record["bos_token_id"] == 1
    theirs = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    greedy = SamplingParams(do_sample=False, max_new_tokens=20)
    free = generate_tokens(ours, PROMPTS[:1], greedy)[0][0]
    theirs.generation_config.eos_token_id = [2, free[9]]
    out = theirs.generate(
        torch.tensor(PROMPTS[:1]), do_sample=False, max_new_tokens=20
    )[0, len(PROMPTS[0]) :].tolist()
    assert (
        out
        == generate_tokens(ours, PROMPTS[:1], replace(greedy, eos_ids=(2, free[9])))[0][
            0
        ]
    )
    assert len(out) <= 10


def test_tokenizer_of_the_folder(exported: tuple[LanguageModel, Path]) -> None:
    _, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert (
        tokenizer.decode(tokenizer.encode(TEXT[2], add_special_tokens=False)) == TEXT[2]
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert chat == "hi<|im_end|>"
    assert not list(folder.glob("*.py"))


READ_BY_CTRANSLATE2: dict[str, dict[str, Any]] = {
    "INTERNLM": {},
    "INTERNLM2_PUBLIC": {},
    "INTERNLM3": {"no_bias": False},
    "LLAMA2": {"tie_word_embeddings": True},
    "QWEN3": {"qk_norm": True, "head_dim": 12},
    "MISTRAL": {"head_dim": 12},
    "BAICHUAN2": {"num_kv_attention_heads": 4, "norm_head": True},
}


@pytest.mark.parametrize("family", READ_BY_CTRANSLATE2)
def test_logits_of_ctranslate2(family: str, tmp_path: Path, run: Run) -> None:
    """An engine that is not PyTorch."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    size = make_tokenizer(tmp_path / "tok")
    ours, _ = save_model(
        tmp_path / "c",
        model_config(
            family,
            "float32",
            vocab_size=size,
            qk_interleaved=True,
            **READ_BY_CTRANSLATE2[family],
        ),
    )
    run("evomesh", "convert", "to-hf", "c", "hf", "--tokenizer", "tok", cwd=tmp_path)
    ctranslate2.converters.TransformersConverter(str(tmp_path / "hf")).convert(
        str(tmp_path / "ct2")
    )
    engine = ctranslate2.Generator(
        str(tmp_path / "ct2"), device="cpu", inter_threads=1, intra_threads=1
    )
    theirs = torch.tensor(np.array(engine.forward_batch([PROMPTS[0]])))[0]
    with torch.inference_mode():
        mine = ours.logits(
            ours(torch.tensor(PROMPTS[0]), single_sequence(len(PROMPTS[0])))
        )
    assert float((mine - theirs[:, :size]).abs().max() / mine.abs().max()) < 1e-5


def test_checklist(
    exported: tuple[LanguageModel, Path], tmp_path: Path, run: Run
) -> None:
    _, folder = exported
    said = run("evomesh", "convert", "check", str(folder), cwd=tmp_path)
    assert said.count("passed  ") == 7 and "FAILED" not in said


@pytest.mark.parametrize(
    ("eos", "part"),
    [
        (2, "lacks 3 (<|im_end|>)"),
        ([2, 3, 999], "eos_token_id 999"),
        (None, "eos_token_id None"),
    ],
)
def test_the_checklist_names_ids_that_end_no_answer(
    exported: tuple[LanguageModel, Path], tmp_path: Path, eos: Any, part: str
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exported[1], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    failed = {
        item.name: item.detail for item in checklist(str(folder)) if not item.passed
    }
    assert failed.keys() == {"end of text"}
    assert part in failed["end of text"]


@covers("promise:ckpt-types-hf")
def test_training_starts_from_a_folder(tmp_path: Path, run: Run) -> None:
    write_run(tmp_path, "data['total_steps'] = lr_scheduler['total_steps'] = 3\n")
    run("evomesh", "train", "config.py", cwd=tmp_path)
    run("evomesh", "convert", "to-hf", "ckpts", "hf", cwd=tmp_path)
    start = (
        'ckpt.load_ckpt_info={"path": "hf", "content": ["model"], "ckpt_type": "%s"}'
    )
    losses = {}
    for kind in ("hf", "hf_llama", "llama", "internevo"):
        chosen = (
            start % kind
            if kind != "internevo"
            else start.replace('"hf"', '"ckpts"') % kind
        )
        sets = ["ckpt.auto_resume=False", "ckpt.save_ckpt_folder=local:new", chosen]
        arguments = [word for text in sets for word in ("--set", text)]
        said = run(
            "evomesh",
            "train",
            "config.py",
            *arguments,
            "--run-dir",
            f"run-{kind}",
            cwd=tmp_path,
        )
        assert (
            f"loading model from {'ckpts/step' if kind == 'internevo' else 'hf'}"
            in said
        )
        metrics = (
            next((tmp_path / f"run-{kind}").rglob("metrics.jsonl"))
            .read_text()
            .splitlines()
        )
        losses[kind] = json.loads(metrics[0])["loss"]
    assert len(set(losses.values())) == 1


def import_from_tools() -> str:
    """Import transformers in a process that finds tools/ first, as a script in that folder does; return where from."""
    code = "import sys; sys.path.insert(0, 'tools'); import transformers as t; print(t.__file__)"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@covers("promise:convert2hf", "promise:pth-to-hf")
def test_tools(tmp_path: Path, run: Run) -> None:
    size = make_tokenizer(tmp_path / "tok")
    save_model(
        tmp_path / "c", model_config("INTERNLM2_PUBLIC", "float32", vocab_size=size)
    )
    tool = str(ROOT / "tools/transformers/convert2hf.py")
    run(
        tool,
        "--src_folder",
        "c",
        "--tgt_folder",
        "a",
        "--tokenizer",
        "tok/tokenizer.json",
        cwd=tmp_path,
    )
    run(
        tool,
        "--src=c",
        "--tgt=b",
        "--dtype=bfloat16",
        "--rotary_type=dynamic",
        "--scaling_factor=2.0",
        cwd=tmp_path,
    )
    record = json.loads((tmp_path / "b/config.json").read_text())
    assert (record["dtype"], record["rope_scaling"]["factor"]) == ("bfloat16", 2.0)
    assert AutoTokenizer.from_pretrained(str(tmp_path / "a")).vocab_size == size
    config = write_run(tmp_path)
    other = str(ROOT / "tools/model_converters/pth_to_hf.py")
    run(
        other, str(config), "c", "d", "--fp32", "--max-shard-size", "50KB", cwd=tmp_path
    )
    assert (tmp_path / "d/xtuner_config.py").read_text() == config.read_text()
    assert len(list((tmp_path / "d").glob("*.safetensors"))) > 1
    found = import_from_tools()
    assert "site-packages" in found


def test_a_users_mistakes(tmp_path: Path, run: Run) -> None:
    make_tokenizer(tmp_path / "tok")
    save_model(tmp_path / "c", model_config())
    said = run(
        "evomesh",
        "convert",
        "to-hf",
        "c",
        "hf",
        "--tokenizer",
        "tok",
        cwd=tmp_path,
        code=2,
    )
    assert "the embedding 61 rows" in said and "Traceback" not in said
    said = run(
        "evomesh",
        "convert",
        "to-hf",
        "c",
        "hf",
        "--arch",
        "mamba",
        cwd=tmp_path,
        code=2,
    )
    assert "expected: one of llama, internlm2" in said
    said = run(
        "evomesh", "convert", "from-hf", "nowhere/model", "out", cwd=tmp_path, code=2
    )
    assert "neither an existing folder nor a model" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "tok"]
    assert found_in(tmp_path / "c").step == 7
