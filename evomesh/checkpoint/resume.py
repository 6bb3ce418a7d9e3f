"""What a run starts from: the documents' rules of precedence, decided once and said in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evomesh.checkpoint import detect
from evomesh.checkpoint.hub_cache import hub_model, local_folder
from evomesh.checkpoint.loaders import checkpoint_loaders, fill, load_internevo_state
from evomesh.checkpoint.native import find
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.manager import CheckpointManager
from evomesh.checkpoint.native.plan import describe
from evomesh.checkpoint.native.retention import check
from evomesh.config.schema import CheckpointConfig, LoadConfig
from evomesh.errors import UserError
from evomesh.storage.urls import open_storage, split_url

OPTIMIZER = "optim."  # prefix of the optimizer's tensors
MASTER = "optim.master."
CONTENTS = ("model", "optimizer", "scheduler", "sampler")
OURS = (
    "internevo",
    "internlm",
    "normal",
    "evomesh",
)  # types that mean "ours or InternEvo's, look for yourself"


@dataclass(frozen=True)
class StartPoint:
    """What to start from.

    Attributes:
        found: a checkpoint of ours, None for another source or for none.
        path: the foreign folder to read with the loader ``ckpt_type``, "" for none.
        ckpt_type: name of that loader.
        content: the parts to load, a subset of ``CONTENTS``; all of them together continue the run that wrote it.
        reason: one line for the log.
    """

    reason: str
    found: Checkpoint | None = None
    path: str = ""
    ckpt_type: str = ""
    content: frozenset[str] = frozenset()

    @property
    def resumes(self) -> bool:
        """Continues a run: counters, data position, schedules and random streams too."""
        return self.content == frozenset(CONTENTS)

    def wants(self, part: str) -> bool:
        return part in self.content


def decide(config: CheckpointConfig, manager: CheckpointManager | None) -> StartPoint:
    """Chooses by the documents' rules.

    auto_resume (the default): the newest verified checkpoint in the save folder, even if saving is off; else from
    scratch. A given load_ckpt_info is then not used. Without auto_resume: load_ckpt_info, which must exist, or nothing.

    Args:
        manager: of the save folder; None when the config names none.

    Raises:
        CheckpointError: nothing usable where the config says there is, or a weights-only checkpoint to resume from.
    """
    if not config.auto_resume:
        if config.load_ckpt_info is None:
            return StartPoint("starting from scratch: auto_resume=False and no load_ckpt_info")
        if manager is None:
            manager = CheckpointManager(config.load_ckpt_info.path)
        return _given(config.load_ckpt_info, manager)
    ignored = f"; load_ckpt_info ({config.load_ckpt_info.path}) IGNORED" if config.load_ckpt_info else ""
    why = f" since auto_resume=True{ignored}: set auto_resume=False to use it" if ignored else ""
    if manager is None:
        return StartPoint(f"starting from scratch: no save_ckpt_folder to resume from{why}")
    found = manager.newest()
    if found is None:
        return StartPoint(f"starting from scratch: no checkpoint in {manager.root}{why}")
    everything = frozenset(CONTENTS)
    require_optimizer(found, everything)
    return StartPoint(
        f"resuming step {found.step} from {found.folder} (auto_resume){why}", found, content=everything
    )


def parse_content(content: tuple[str, ...] | list[str] | str) -> frozenset[str]:
    """``("model", "sampler")`` or ``("all",)`` as a set of ``CONTENTS``.

    Raises:
        CheckpointError: unknown word, or none.
    """
    words = [content] if isinstance(content, str) else list(content)
    parts = {word.lower() for word in words}
    unknown = sorted(parts - {*CONTENTS, "all"})
    if unknown or not parts:
        raise CheckpointError(
            f"load_ckpt_info.content has {unknown[0]!r}" if unknown else "load_ckpt_info.content is empty",
            expected=f"any of {', '.join(CONTENTS)}, or all",
        )
    return frozenset(CONTENTS) if "all" in parts else frozenset(parts)


def _given(info: LoadConfig, manager: CheckpointManager) -> StartPoint:
    content = parse_content(info.content)
    named = ", ".join(part for part in CONTENTS if part in content)
    kind = info.ckpt_type.lower()
    loader = checkpoint_loaders.get(kind)
    actual = detect.kind_at(info.path)
    if kind in OURS and actual is None and (hub := hub_model(info.path)):
        return _given(info.model_copy(update={"path": hub, "ckpt_type": "hf"}), manager)
    if kind in OURS and actual in (None, "evomesh"):
        if actual is None:
            _absent(info, manager)
        found = manager.resolve(info.path)
        require_optimizer(found, content)
        return StartPoint(f"loading {named} from {found.folder} (load_ckpt_info)", found, content=content)
    if kind in OURS and actual == "internevo":
        kind, loader = "internevo", checkpoint_loaders.get("internevo")
    elif kind in OURS or (actual in ("evomesh", "internevo") and kind in ("hf", "hf_llama", "llama")):
        right = {"evomesh": "internevo", "dcp": "", "torch": ""}.get(actual or "", actual)
        raise CheckpointError(
            f"{info.path} is {detect.KINDS[actual or 'torch']}, but ckpt_type={info.ckpt_type!r} was given",
            fix=f"set load_ckpt_info ckpt_type={right!r}"
            if right
            else "convert it first: evomesh convert --help",
        )
    if loader is None:
        raise CheckpointError(
            f"no loader for ckpt_type={info.ckpt_type!r}",
            expected=f"one of {', '.join(sorted({*OURS, *checkpoint_loaders.names()}))}",
            fix="register one of your own: evomesh.checkpoint.loaders.checkpoint_loaders.register",
        )
    if content != {"model"} and kind != "internevo":
        raise CheckpointError(
            f"of {info.path} ({kind}) only the model can be read, but content asks for {named}",
            fix='content=("model",)',
        )
    return StartPoint(
        f"loading {named} from {info.path} ({kind}, load_ckpt_info)", None, info.path, kind, content
    )


def _absent(info: LoadConfig, manager: CheckpointManager) -> None:
    """Says what was looked for: a path that is no folder may have been meant as the id of a hub model."""
    storage, folder = open_storage(info.path)
    if split_url(info.path)[0] == "local" and not storage.list(folder) and folder.count("/") == 1:
        local_folder(info.path)
    manager.resolve(info.path)  # raises, and says what lies there


def require_optimizer(found: Checkpoint, content: frozenset[str]) -> None:
    """
    Raises:
        CheckpointError: optimizer state is wanted and the checkpoint has weights only.
    """
    if "optimizer" in content and not any(name.startswith(OPTIMIZER) for name in found.records()):
        raise CheckpointError(
            f"step {found.step} holds weights only (saved with save_optimizer=False): it cannot resume a run",
            where=found.folder,
            expected="a checkpoint with optimizer state",
            fix='start anew from its weights: auto_resume=False, load_ckpt_info=dict(path=..., content=("model",))',
        )


def restart_line(manager: CheckpointManager) -> str:
    """What starting again will go on from; for the end of a crashed run, so it asks no other rank."""
    try:
        found = find.newest(manager.candidates(), lambda choice: check(choice, data=False), lambda line: None)
    except (UserError, OSError) as error:
        return f"a restart finds no checkpoint to go on from: {error}"
    if found is None:
        return "a restart begins from scratch: nothing is committed yet"
    return f"a restart goes on from step {found.step}: {found.folder}"


def restore(
    start: StartPoint,
    manager: CheckpointManager,
    tensors: Mapping[str, Tensor],
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads what ``start`` wants of the tensors, in place, and returns the stored state ({} without a source).

    The caller applies the parts of the state that ``start.wants``. Masters come from the checkpoint only with both
    model and optimizer; else they are to be made again from the weights.

    Args:
        tensors: all live tensors by global name, parameters and optimizer state.
        model: the run's model section, for loaders of foreign folders.
    """
    if start.found is not None:
        chosen = {name: t for name, t in tensors.items() if _chosen(name, start.content)}
        if chosen:
            return manager.load(start.found, chosen, strict=len(chosen) == len(tensors))
        return start.found.state
    return _foreign(start, manager, tensors, dict(model or {})) if start.path else {}


def _foreign(
    start: StartPoint, manager: CheckpointManager, tensors: Mapping[str, Tensor], model: dict[str, Any]
) -> dict[str, Any]:
    loader = checkpoint_loaders.get(start.ckpt_type)
    assert loader is not None
    local = describe({name: t for name, t in tensors.items() if _chosen(name, start.content)}, manager.grid)
    names = manager.exchange.broadcast(manager.exchange.gather(list(local)))
    everywhere = set().union(*names)
    if start.wants("model"):
        own = {name: wanted for name, wanted in local.items() if not name.startswith(OPTIMIZER)}
        fill(own, loader(start.path, model), start.path, everywhere)
    if start.content == {"model"}:
        return {}
    optimizer, state = load_internevo_state(
        start.path, model, start.wants("optimizer"), start.wants("scheduler") or start.wants("sampler")
    )
    if start.wants("optimizer"):
        # Of the masters, those of a run without the model part are made again from its own weights.
        wanted = {name: t for name, t in optimizer.items() if _chosen(name, start.content)}
        own = {name: place for name, place in local.items() if name.startswith(OPTIMIZER)}
        fill(own, wanted.items(), start.path, everywhere)
    return state


def _chosen(name: str, content: frozenset[str]) -> bool:
    if name.startswith(MASTER):
        return content >= {"model", "optimizer"}
    return ("optimizer" if name.startswith(OPTIMIZER) else "model") in content
