"""Tell the kind of checkpoint in a folder by its file names alone: no file is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.find import SNAPSHOTS, all_candidates
from evomesh.storage.base import Storage, join
from evomesh.storage.urls import open_storage

KINDS = {
    "evomesh": "an evomesh checkpoint",
    "internevo": "an InternEvo checkpoint",
    "hf": "a Hugging Face model folder",
    "llama": "Llama's consolidated weights",
    "dcp": "a torch distributed checkpoint (its pickled metadata is never opened)",
    "xtuner": "a checkpoint of XTuner or DeepSpeed",
    "torch": "pickled PyTorch files",
}
# How to bring a checkpoint of another kind into a form that evomesh reads.
CONVERSIONS = {
    "internevo": "convert it first: evomesh convert from-internevo FOLDER OUT",
    "xtuner": "evomesh xtuner convert pth_to_hf CONFIG PATH OUT makes a Hugging Face folder of it",
}
PATTERNS: Sequence[tuple[str, re.Pattern[str]]] = (
    ("internevo", re.compile(r"^model_(tp|wp|pp|moe)[a-z0-9_]*\.pt$")),
    ("xtuner", re.compile(r"^[a-z0-9_]*mp_rank_\d+_(model|optim)_states\.pt$")),
    ("dcp", re.compile(r"^(\.metadata|__\d+_\d+\.distcp)$")),
    ("hf", re.compile(r"^(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?$")),
    ("llama", re.compile(r"^consolidated\.\d+\.(pth|pt|safetensors)$")),
    # A folder that holds such checkpoints, or mmengine's files. A trainer that writes
    # Hugging Face folders may keep DeepSpeed's beside them.
    ("xtuner", re.compile(r"^((iter|epoch)_\d+\.pth/?|latest|last_checkpoint)$")),
    ("torch", re.compile(r"\.(pt|pth|bin|ckpt|pkl)$")),
)


def kind_of(storage: Storage, folder: str) -> str | None:
    """Return a key of ``KINDS``, None if the folder is absent or holds nothing known."""
    names = storage.list(folder)
    if fmt.COMMIT in names or all_candidates(storage, folder):
        return "evomesh"
    for kind, pattern in PATTERNS:
        if any(pattern.search(name) for name in names):
            return kind
    return None


INTERNEVO = dict(PATTERNS)["internevo"]


def internevo_steps(storage: Storage, root: str) -> list[int]:
    """Return the steps of InternEvo's checkpoints in a save folder (``root/50/model_tp0_pp0.pt``), newest first.

    The folders ``snapshot/0`` and ``snapshot/1``, whose steps only their content tells,
    are not among them.
    """
    numbers = [name.rstrip("/") for name in storage.list(root) if name.endswith("/")]
    return sorted(
        (
            int(number)
            for number in numbers
            if number.isascii()
            and number.isdigit()
            and _is_internevo(storage, join(root, number))
        ),
        reverse=True,
    )


def internevo_snapshots(storage: Storage, root: str) -> list[str]:
    """Return the folders of InternEvo's snapshots in a save folder."""
    folders = [join(root, SNAPSHOTS, number) for number in ("0", "1")]
    return [folder for folder in folders if _is_internevo(storage, folder)]


def holds_xtuner(storage: Storage, root: str) -> bool:
    """Return whether a work folder holds checkpoints of XTuner (``iter_500.pth``)."""
    patterns = [pattern for kind, pattern in PATTERNS if kind == "xtuner"]
    return any(
        pattern.search(name) for name in storage.list(root) for pattern in patterns
    )


def _is_internevo(storage: Storage, folder: str) -> bool:
    return any(INTERNEVO.search(name) for name in storage.list(folder))


def kind_at(url: str) -> str | None:
    """Return ``kind_of`` a path in any form: ``ROOT/49`` and ``ROOT/snapshot/1`` are of the kind of their root.

    A file ``NAME.pth`` is one of XTuner.
    """
    storage, folder = open_storage(url)
    kind = kind_of(storage, folder)
    if kind is not None:
        return kind
    parent, _, name = folder.rpartition("/")
    if name.isdigit():
        kind = kind_of(storage, parent or ".")
    elif name.endswith(".pth") and storage.exists(folder):
        kind = "xtuner"
    return kind
