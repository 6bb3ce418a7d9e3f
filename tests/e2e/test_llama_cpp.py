"""llama.cpp, an engine that is not PyTorch, completes a text as the trained model does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.data.tokenizer import load_tokenizer
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from tests.support.gguf import write_gguf
from tests.unit.checkpoint.huggingface.hf_models import export, model_config, save_model
from tests.unit.checkpoint.huggingface.test_tokenizer import train

ROOT = Path(__file__).parents[2]
MODULES = (
    Path(os.environ.get("LLAMA_CPP_FOLDER", ROOT / ".venv/llama_cpp")) / "node_modules"
)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("INTERNLM", {}),  # with attention biases
    ("INTERNLM2_PUBLIC", {"qk_interleaved": True, "norm_head": True}),
]


@pytest.mark.skipif(
    shutil.which("node") is None
    or not (MODULES / "node-llama-cpp/dist/index.js").is_file(),
    reason="tools/llama_cpp.sh was not run",
)
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_greedy_text_is_ours(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(train(tmp_path, prefix=False))
    config = model_config(
        family,
        "float32",
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=256,
        **changes,
    )
    model, found = save_model(tmp_path / "c", config, str(tokenizer.path))
    folder = export(
        found, tmp_path / "hf", ExportOptions(max_shard_bytes=100000), lambda line: None
    )
    write_gguf(folder, tmp_path / "x.gguf")
    # The top two logits of every step differ by more than 1e-3: llama.cpp rounds its exponentials.
    texts = ["the cat sat on", "def f(x):"]
    script = str(ROOT / "tests/support/llama_cpp.mjs")
    command = [
        "node",
        script,
        str(MODULES),
        str(tmp_path / "x.gguf"),
        json.dumps(texts),
        "64",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ids = [tokenizer.encode(text) for text in texts]
    ours = [
        answers[0]
        for answers in generate_tokens(
            model, ids, SamplingParams(do_sample=False, max_new_tokens=64)
        )
    ]
    answers = json.loads(done.stdout)
    assert [answer["made"] for answer in answers] == ours
    assert [(answer["ids"], answer["text"]) for answer in answers] == list(
        zip(ids, texts, strict=True)
    )
    assert all(len(set(made)) > 5 for made in ours)  # not one token over and over
