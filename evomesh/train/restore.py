"""A trained model back from its checkpoint, for everything but going on with the training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evomesh.checkpoint.find import Found
from evomesh.checkpoint.manager import CheckpointManager
from evomesh.config.loader import config_from_dict
from evomesh.config.schema import Config
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model


@dataclass(frozen=True)
class Restored:
    """A model in evaluation mode, with the config and the checkpoint it came from."""

    model: LanguageModel
    config: Config
    found: Found


def restore_model(path: str, device: torch.device | str = "cpu", verify: bool = True) -> Restored:
    """Builds the model of the checkpoint at ``path`` and fills it; optimizer state is left where it is.

    Args:
        path: any path form of the documents, such as ``llm_ckpts``, ``llm_ckpts/49`` or ``local:llm_ckpts``.
    Raises:
        UserError: no checkpoint there that verifies, or one that does not fit its own config.
    """
    manager = CheckpointManager(path)
    found = manager.resolve(path, verify=verify)
    config = config_from_dict(found.config)
    # Nothing is compiled: every call has another number of tokens.
    model = build_model(config.model.model_copy(update={"compile": False}), device=device)
    manager.load(found, dict(model.named_parameters()), strict=False)
    model.eval()
    return Restored(model, config, found)
