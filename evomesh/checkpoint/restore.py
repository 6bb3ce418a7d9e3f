"""A trained model back from its checkpoint, for everything but going on with the training."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch

from evomesh.checkpoint.detect import KINDS, kind_at
from evomesh.checkpoint.hub_cache import hub_model
from evomesh.checkpoint.huggingface.folder import HfFolder, open_folder
from evomesh.checkpoint.huggingface.to_native import read_folder
from evomesh.checkpoint.loaders import fill
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.manager import CheckpointManager
from evomesh.checkpoint.native.plan import describe
from evomesh.config.record import config_from_dict
from evomesh.config.schema import Config, ModelConfig, RunConfig
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model
from evomesh.parallel.grid import Grid

logger = logging.getLogger(__name__)

SAMPLED = 256  # elements of a parameter that its model's fingerprint sees


@dataclass(frozen=True)
class RestoredModel:
    """A model in evaluation mode, and the config it was built from.

    Attributes:
        source: where it comes from, in words for the user.
        fingerprint: tells two states of a model apart.
    """

    model: LanguageModel
    config: Config
    source: str
    fingerprint: str


def restore_model(path: str, device: torch.device | str = "cpu", verify: bool = True) -> RestoredModel:
    """Builds the model at ``path`` and fills it; optimizer state is left where it is.

    Args:
        path: a checkpoint, in any path form of the documents (``llm_ckpts``, ``llm_ckpts/49``, ``local:llm_ckpts``);
            or a Hugging Face folder of a known architecture, local, in a store, or the id of one in the hub's cache.
        verify: hash a checkpoint's bytes first. Hugging Face folders hold no hashes.
    Raises:
        UserError: no model there, a checkpoint that does not verify, or one that does not fit its own config.
    """
    kind = kind_at(path)
    hub = hub_model(path) if kind is None else ""
    if kind == "hf" or hub:
        return _from_folder(open_folder(hub or path), device)
    if kind not in (None, "evomesh"):
        raise CheckpointError(
            f"is {KINDS[kind]}",
            where=path,
            expected="an evomesh checkpoint or a Hugging Face model folder",
            fix="convert it first: evomesh convert --help",
        )
    manager = CheckpointManager(path)
    found = manager.resolve(path, verify=verify)
    config = config_from_dict(found.config)
    model = _build(config.model, device)
    manager.load(found, dict(model.named_parameters()), strict=False)
    return RestoredModel(
        model.eval(), config, f"step {found.step} of {path}", f"{found.step}-{found.attempt[:12]}"
    )


def _from_folder(folder: HfFolder, device: torch.device | str) -> RestoredModel:
    config, weights = read_folder(folder, None, logger.info)
    config = config.model_copy(update={"run": RunConfig(job_name=PurePosixPath(folder.path).name)})
    model = _build(config.model, device)
    fill(describe(dict(model.named_parameters()), Grid()), iter(weights.items()), folder.path)
    return RestoredModel(model.eval(), config, folder.path, f"hf-{_digest(model)}")


def _digest(model: LanguageModel) -> str:
    """Of the first elements of every parameter: any step of a training changes some of them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        start = parameter.detach().flatten()[:SAMPLED].contiguous().view(torch.uint8)
        digest.update(name.encode() + bytes(start.cpu().numpy()))
    return digest.hexdigest()[:12]


def _build(config: ModelConfig, device: torch.device | str) -> LanguageModel:
    # Nothing is compiled: every call has another number of tokens.
    return build_model(config.model_copy(update={"compile": False}), device=device)
