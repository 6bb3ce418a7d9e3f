"""Run the checklist of docs/handover.md.

It holds what inference engines and evaluation harnesses expect of a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.huggingface.compare_logits import (
    largest_logit_difference,
    native_logits,
)
from evomesh.checkpoint.huggingface.config import read_config
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.huggingface.load import foreign_tensors
from evomesh.checkpoint.huggingface.match import describe_folder, match_tensors
from evomesh.checkpoint.huggingface.stock_logits import (
    WITHOUT_CLASS,
    has_transformers,
    stock_logits,
)
from evomesh.checkpoint.huggingface.tokenizer import compare_tokenizers
from evomesh.data.chat import end_of_answer_ids
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.tokenizer import Tokenizer, check_tokenizer_fits, load_tokenizer
from evomesh.errors import UserError
from evomesh.quantities import counted
from evomesh.storage.local import LocalStorage

INDEX = "model.safetensors.index.json"
# transformers renamed torch_dtype and rope_theta, and other engines still look for the
# old names: a folder has both.
SPELLINGS = (
    "torch_dtype",
    "dtype",
    "rope_theta",
    "rope_parameters",
    "rms_norm_eps",
    "max_position_embeddings",
)


# Returns a line on what it found, and raises what is wrong.
Check = Callable[[HfFolder], str]


@dataclass(frozen=True)
class ChecklistItem:
    """One line of the checklist."""

    name: str
    passed: bool
    detail: str
    fix: str = ""


def checklist(path: str) -> list[ChecklistItem]:
    """Run all checks; a failed one does not stop the others.

    Raises:
        CheckpointError: no such folder.
    """
    folder = HfFolder(LocalStorage(), str(local_folder(path)))
    checks: dict[str, Check] = {
        "config.json": _config,
        "weights": check_weights,
        "finite": _finite,
        "tokenizer": check_tokenizer,
        "chat template": _template,
        "end of text": _eos,
        "transformers": _transformers,
    }
    return [_run_check(name, check, folder) for name, check in checks.items()]


def _run_check(name: str, check: Check, folder: HfFolder) -> ChecklistItem:
    try:
        return ChecklistItem(name, True, check(folder))
    except UserError as error:
        return ChecklistItem(name, False, error.found, error.fix)
    except Exception as error:  # whatever another library raises is a finding
        return ChecklistItem(name, False, f"{type(error).__name__}: {error}")


def _config(folder: HfFolder) -> str:
    record = folder.json("config.json")
    model = read_config(record, "config.json")
    absent = [key for key in ("architectures", *SPELLINGS) if record.get(key) is None]
    if absent:
        raise UserError(
            f"{', '.join(absent)} missing from config.json; some readers need it",
            code="EVO-HF-007",
        )
    if record["dtype"] != record["torch_dtype"]:
        raise UserError(
            f"dtype {record['dtype']} and torch_dtype {record['torch_dtype']} differ",
            code="EVO-HF-007",
        )
    return f"{record['architectures'][0]}, {counted(model.num_layers, 'layer')}, {record['dtype']}"


def check_weights(folder: HfFolder) -> str:
    """Check that the weights are those of config.json: none missing, too many or truncated."""
    described = describe_folder(folder)
    match_tensors(folder, described.naming, described.model, described.tied)
    files = set(folder.files.values())
    in_folder = folder.storage.list(folder.path)
    has_shards = INDEX in in_folder and "model.safetensors" not in files
    if has_shards:
        _check_total_size(folder)
    return f"{counted(len(folder.files), 'tensor', '')} in {counted(len(files), 'file', '')}"


def _check_total_size(folder: HfFolder) -> None:
    """Compare the bytes that the index gives with those of the shards."""
    metadata = folder.json(INDEX).get("metadata", {})
    indexed = metadata.get("total_size")
    stored = 0
    for name in folder.files:
        stored += folder.read(name).nbytes
    if indexed != stored:
        raise UserError(
            f"the index gives {indexed} bytes, the shards hold {stored}",
            code="EVO-HF-007",
        )


def _finite(folder: HfFolder) -> str:
    bad = []
    for name in folder.files:
        finite = torch.isfinite(folder.read(name))
        if not bool(finite.all()):
            bad.append(name)
    if bad:
        raise UserError(
            f"NaN or infinity in {', '.join(bad[:8])} ({len(bad)} tensors)",
            code="EVO-HF-007",
        )
    return "no NaN or infinity"


def check_tokenizer(folder: HfFolder) -> str:
    """Check that the tokenizer loads, fits the embedding and gives the ids of ``transformers``."""
    path = Path(folder.path)
    tokenizer = _tokenizer(folder)
    vocab_size = int(folder.json("config.json")["vocab_size"])
    check_tokenizer_fits(tokenizer, vocab_size)
    settings = path / "tokenizer_config.json"
    if not settings.is_file():
        raise UserError("no tokenizer_config.json", code="EVO-HF-007")
    if has_transformers():
        compare_tokenizers(tokenizer, path)
    return f"{tokenizer.path.name}, {tokenizer.vocab_size} ids, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}"


def _tokenizer(folder: HfFolder) -> Tokenizer:
    """Load the tokenizer of a model folder.

    Raises:
        UserError: there is none, or it cannot be used; with the option that exports one.
    """
    try:
        return load_tokenizer(folder.path, folder.path)
    except UserError as error:
        raise UserError(
            error.found,
            fix="export it again with a tokenizer: evomesh convert to-hf CKPT OUT --tokenizer PATH",
            code=error.code,
        ) from None


def _template(folder: HfFolder) -> str:
    tokenizer = _tokenizer(folder)
    if not tokenizer.chat_template:
        return "none: a base model"
    JinjaTemplate(tokenizer)
    if not has_transformers():
        return "present, and it compiles"
    return "present, and gives the ids of transformers"


def _eos(folder: HfFolder) -> str:
    """Check the ids that end an answer.

    Each is named in generation_config.json, and the model knows it.
    """
    # An id beyond the embedding is never sampled, and one that is not named is sampled
    # and passed over: either way answers run to the length limit.
    vocab_size = folder.json("config.json")["vocab_size"]
    record = folder.json("generation_config.json")
    given = record.get("eos_token_id")
    eos = given if isinstance(given, list) else [given]
    for token in eos:
        if not _is_embedded(token, vocab_size):
            raise UserError(
                f"generation_config.json: eos_token_id {token!r}: generation would never stop",
                code="EVO-HF-007",
            )
    bos = record.get("bos_token_id")
    if bos is not None and not _is_embedded(bos, vocab_size):
        raise UserError(
            f"generation_config.json: bos_token_id {bos!r}, but the embedding has {vocab_size} rows",
            code="EVO-HF-007",
        )
    try:
        tokenizer = load_tokenizer(folder.path, folder.path)
    except UserError:
        return f"eos {eos}"  # the check of the tokenizer says that there is none
    for token in end_of_answer_ids(tokenizer, None, vocab_size):
        if token not in eos:
            raise UserError(
                f"generation_config.json: eos_token_id {eos} lacks {token} ({tokenizer.token_name(token)}), with which "
                "the tokenizer or its chat template ends a text: answers would not stop there",
                code="EVO-HF-007",
            )
    return f"eos {eos}"


def _is_embedded(token: object, vocab_size: int) -> bool:
    return isinstance(token, int) and 0 <= token < vocab_size


def _transformers(folder: HfFolder) -> str:
    """Load the folder with transformers, and compare the logits with the native model's."""
    if not has_transformers():
        return "skipped: transformers is not installed"
    described = describe_folder(folder)
    model = described.model
    weights = dict(foreign_tensors(folder, described.naming, model, described.tied))
    dtype = {"tf32": "float32"}.get(model.dtype, model.dtype)
    theirs = stock_logits(Path(folder.path), [dtype])
    ours = native_logits(model, lambda name: weights[name].read(), dtype)
    difference = largest_logit_difference(
        ours, theirs, folder.path, sides=("the native model", "transformers")
    )
    how = "loads without remote code"
    kind = folder.json("config.json")["model_type"]
    if kind in WITHOUT_CLASS:
        how = f"has no class for {kind}; compared as a Llama"
    return f"{how}; largest logit difference to the native model: {difference:.3g}"
