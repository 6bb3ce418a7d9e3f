"""XTuner configs for tests: a shipped one with edits as a user types them, and a tiny model and data for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "xtuner"
VOCAB = 61
TINY_MODEL = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=5000.0,
    max_position_embeddings=256,
    torch_dtype="float32",
)


def model_folder(folder: Path, **changes: object) -> Path:
    """Write the config.json of a tiny model, without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY_MODEL | changes))
    return folder


def write_config(
    path: Path, *edits: tuple[str, str], name: str = "internlm2_7b_w_tokenized_dataset"
) -> Path:
    """Write a shipped config with edits: each (old text, new text), as the lines of a diff; old text must be there."""
    text = (CONFIGS / f"{name}.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


def token_files(folder: Path, files: dict[str, int], length: int = 24) -> Path:
    """Write token files NAME -> number of documents, each of ``length`` tokens, as XTuner's tools write them."""
    for number, (name, documents) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.random.RandomState(number).randint(1, VOCAB, (documents, length))
        lines = [json.dumps({"tokens": row.tolist()}).encode() + b"\n" for row in ids]
        offsets = np.cumsum([0, *map(len, lines)])[:-1]
        path.write_bytes(b"".join(lines))
        with open(f"{path}.meta", "wb") as meta:
            np.save(meta, np.array([(offset, length) for offset in offsets]))
    return folder
