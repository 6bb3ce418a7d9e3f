"""A trained model, read back from its checkpoint for anything but resuming the training."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch

from evomesh.checkpoint.detect import CONVERSIONS, KINDS, kind_at
from evomesh.checkpoint.hub_cache import hub_model
from evomesh.checkpoint.huggingface.folder import HfFolder, open_folder
from evomesh.checkpoint.huggingface.to_native import read_folder
from evomesh.checkpoint.loaders import fill
from evomesh.checkpoint.native.ema_weights import with_ema_weights
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.plan import describe
from evomesh.config.record import config_from_dict
from evomesh.config.schema import Config, ModelConfig, RunConfig
from evomesh.config.user import expand_home
from evomesh.data.chat import choose_template, end_of_answer_ids
from evomesh.data.chat_message import ChatTemplate
from evomesh.data.tokenizer import (
    Tokenizer,
    check_tokenizer_fits,
    load_recorded_tokenizer,
    load_tokenizer,
)
from evomesh.errors import UserError
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model
from evomesh.parallel.grid import Grid

logger = logging.getLogger(__name__)

# Of each parameter, hashed into the fingerprint of a Hugging Face folder.
FINGERPRINT_ELEMENTS = 256


@dataclass(frozen=True)
class RestoredModel:
    """A model in evaluation mode, and the config it was built from.

    Attributes:
        source: where it comes from, in words for the user.
        fingerprint: differs between two states of a model.
    """

    model: LanguageModel
    config: Config
    source: str
    fingerprint: str


@dataclass(frozen=True)
class LoadedModel(RestoredModel):
    """A restored model with all that turns text into token ids and back: what generate, serve and eval need.

    Attributes:
        tokenizer: has no id that the model does not know.
        template: renders conversations; None for a model that completes text only.
        eos_ids: each of them ends an answer (``evomesh.data.chat.end_of_answer_ids``).
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.config.model.vocab_size


def load_model(
    path: str,
    device: torch.device | str = "cpu",
    *,
    tokenizer: str | None = None,
    template: str = "none",
    ema: bool = False,
) -> LoadedModel:
    """Restore the model at ``path`` and load the tokenizer and the chat template that go with it.

    Args:
        path: as for ``restore_model``.
        tokenizer: file or folder; None: the config's ``data.tokenizer_path``.
        template: a built-in style, "tokenizer" (the tokenizer's own), "none", or "auto": the tokenizer's own if it
            has one, else that of the training data (``data.chat_template``).
        ema: as for ``restore_model``.
    Raises:
        UserError: no model there, no tokenizer, or one that does not fit the model or the template.
    """
    restored = restore_model(path, device, ema=ema)
    config = restored.config
    loaded = _load_tokenizer(tokenizer, config, path)
    fix = "give another one with --tokenizer PATH"
    check_tokenizer_fits(loaded, config.model.vocab_size, fix)
    chosen = choose_template(template, loaded, config.data.chat_template)
    return LoadedModel(
        restored.model,
        config,
        restored.source,
        restored.fingerprint,
        tokenizer=loaded,
        template=chosen,
        eos_ids=end_of_answer_ids(
            loaded, config.generation, config.model.vocab_size, chosen
        ),
    )


def _load_tokenizer(given: str | None, config: Config, path: str) -> Tokenizer:
    if given:
        return load_tokenizer(given)
    recorded = config.data.tokenizer_path
    if recorded is None:
        folder = hub_model(path) or path
        if expand_home(f"{folder}/config.json").is_file():
            # Of a Hugging Face folder: the reason why its tokenizer cannot be used.
            return load_tokenizer(folder, folder)
        raise UserError(
            "the checkpoint's config names no tokenizer",
            where=path,
            fix="pass one with --tokenizer PATH",
            code="EVO-TOKEN-001",
        )
    return load_recorded_tokenizer(recorded, path)


def restore_model(
    path: str,
    device: torch.device | str = "cpu",
    ema: bool = False,
) -> RestoredModel:
    """Build the model at ``path`` and read its weights; optimizer state is not read.

    Args:
        path: a checkpoint, in any of InternEvo's path forms (``llm_ckpts``, ``llm_ckpts/49``, ``local:llm_ckpts``);
            or a Hugging Face folder of a known architecture, local or in a store, or the id of one in the hub's cache.
        ema: take the moving average of the weights (``optimizer.ema``).
    Raises:
        UserError: no model there, a checkpoint that does not verify, or one that does not fit its own config.
    """
    kind = kind_at(path)
    if ema and kind not in (None, "evomesh"):
        raise CheckpointError(
            f"is {KINDS[kind]}, which has no average of the weights",
            where=path,
            fix="leave out --ema",
            code="EVO-CKPT-016",
        )
    hub = hub_model(path) if kind is None else ""
    if kind == "hf" or hub:
        return _restore_hf(open_folder(hub or path), device)
    if kind not in (None, "evomesh"):
        raise CheckpointError(
            f"is {KINDS[kind]}",
            where=path,
            expected="an evomesh checkpoint or a Hugging Face model folder",
            fix=CONVERSIONS.get(kind, "convert it first: evomesh convert --help"),
            code="EVO-CKPT-009",
        )
    reader = CheckpointReader()
    found = reader.resolve(path, "data")
    config = config_from_dict(found.config)
    model = _build_uncompiled(config.model, device)
    source = f"step {found.step} of {path}"
    fingerprint = f"{found.step}-{found.attempt[:12]}"
    if ema:
        found = with_ema_weights(found)
        source = f"the averaged weights of {source}"
        fingerprint = f"{fingerprint}-ema"
    # An average is in float32, whatever the weights are in.
    reader.load(found, dict(model.named_parameters()), strict=False, cast=ema)
    return RestoredModel(model.eval(), config, source, fingerprint)


def _restore_hf(folder: HfFolder, device: torch.device | str) -> RestoredModel:
    config, weights = read_folder(folder, None, logger.info)
    config = config.model_copy(
        update={"run": RunConfig(job_name=PurePosixPath(folder.path).name)}
    )
    model = _build_uncompiled(config.model, device)
    fill(
        describe(dict(model.named_parameters()), Grid()),
        iter(weights.items()),
        folder.path,
    )
    return RestoredModel(
        model.eval(), config, folder.path, f"hf-{_hash_of_weights(model)}"
    )


def _hash_of_weights(model: LanguageModel) -> str:
    """Return a hash of the first elements of every parameter: any training step changes some of them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        start = (
            parameter.detach()
            .flatten()[:FINGERPRINT_ELEMENTS]
            .contiguous()
            .view(torch.uint8)
        )
        digest.update(name.encode() + bytes(start.cpu().numpy()))
    return digest.hexdigest()[:12]


def _build_uncompiled(config: ModelConfig, device: torch.device | str) -> LanguageModel:
    # Compiling does not pay off: nearly every call has a different number of tokens.
    return build_model(config.model_copy(update={"compile": False}), device=device)
