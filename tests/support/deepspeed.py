"""Write checkpoints as DeepSpeed and mmengine do, by the rules of their formats; neither is used.

ZeRO 1 and 2: the parameters of a group are laid end to end, padded to a multiple of two
numbers for each rank, and cut into one part a rank. ZeRO 3: each parameter is padded to
a multiple of the ranks and cut; a rank's parts are laid end to end. The rules were read
in DeepSpeed's sources and checked with files that DeepSpeed 0.19.8 wrote.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class ZeroStageEnum(enum.IntEnum):
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


@dataclass
class fragment_address:  # the name in the files
    numel: int
    start: int


class HistoryBuffer:
    """Of mmengine's message hub: holds arrays of NumPy."""

    def __init__(self) -> None:
        self._log_history = torch.arange(3.0).numpy()


# Where the files say that these are defined.
HOMES = {
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
    fragment_address: "deepspeed.utils.tensor_fragment",
    HistoryBuffer: "mmengine.logging.history_buffer",
}


@contextmanager
def _defined_there() -> Iterator[None]:
    """Let ``torch.save`` find the classes above under the names of the packages."""
    before = {kind: kind.__module__ for kind in HOMES}
    modules = {}
    for kind, home in HOMES.items():
        parts = home.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            modules[name] = ModuleType(name)
            modules[name].__path__ = []
        setattr(modules[home], kind.__name__, kind)
        kind.__module__ = home
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        for kind, home in before.items():
            kind.__module__ = home


def save(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _defined_there():
        torch.save(content, path)
    return path


def meta_of(iterations: int, accumulation: int = 3) -> dict[str, Any]:
    """Return what mmengine stores beside the weights."""
    text = f"accumulative_counts = {accumulation}\noptim_wrapper = dict(accumulative_counts={accumulation})\n"
    meta = {"cfg": text, "seed": 5, "iter": iterations, "epoch": 0}
    hub = {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": {}}
    return {"meta": meta, "message_hub": hub, "param_schedulers": [{"last_step": 4}]}


def write_file(path: Path, state: State, **meta: Any) -> Path:
    """Write a file of mmengine: ``iter_N.pth``."""
    return save({"state_dict": OrderedDict(state), **(meta or meta_of(9))}, path)


@dataclass
class Zero:
    """A checkpoint of DeepSpeed to write.

    Attributes:
        groups: the trained parameters by optimizer group, as float32 master weights.
        alias: name -> name of the same parameter.
        flats: tensors that a rank's part is cut into (ZeRO 3).
        gap: padding after each parameter, as versions since 0.17 state it (ZeRO 1, 2).
    """

    groups: Sequence[State]
    stage: int = 2
    ranks: int = 2
    prefix: str = "bf16_"
    frozen: State = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    alias: Mapping[str, str] = field(default_factory=dict)
    flats: int = 1
    gap: int | None = None
    steps: int = 3
    skipped: int = 0

    def write(self, folder: Path) -> Path:
        for rank, parts in enumerate(self.parts()):
            zero: dict[str, Any] = {
                "zero_stage": ZeroStageEnum(self.stage),
                "loss_scaler": LossScaler(),
                "partition_count": self.ranks
                if self.stage == 3
                else [self.ranks] * len(self.groups),
                "param_slice_mappings": [OrderedDict(w=fragment_address(4, 0))],
            }
            if self.stage == 3:
                for part in parts:
                    part.ds_id = "1_2"  # an attribute, which torch.save keeps
                zero["fp32_flat_groups"] = parts
                zero["optimizer_state_dict"] = {"state": {}}
            else:
                zero["single_partition_of_fp32_groups"] = parts
                zero["base_optimizer_state"] = {"state": {}}
                if self.gap is not None:
                    gaps = [[self.gap] * len(group) for group in self.groups]
                    zero["param_alignment_paddings"] = gaps
            name = f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            save({"optimizer_state_dict": zero, "ds_config": {}}, folder / name)
        files = self.ranks if self.stage == 3 else 1
        for rank in range(files):
            start = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
            save(self.model_states(rank), folder / f"{start}mp_rank_00_model_states.pt")
        return folder

    def parts(self) -> list[list[Tensor]]:
        """Return the flat tensors of each rank."""
        if self.stage < 3:
            halves = [self.cut_group(group) for group in self.groups]
            return [list(parts) for parts in zip(*halves, strict=True)]
        ranks: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for group in self.groups:
            for value in group.values():
                padded = self.pad(value.flatten(), self.ranks)
                for rank, part in enumerate(padded.chunk(self.ranks)):
                    ranks[rank].append(part)
        return [
            [part.clone() for part in torch.cat(flat).tensor_split(self.flats)]
            for flat in ranks
        ]

    def cut_group(self, group: State) -> list[Tensor]:
        flat = []
        for value in group.values():
            flat += [value.flatten(), torch.full([self.gap or 0], 7.0)]
        whole = self.pad(torch.cat(flat), 2 * self.ranks)
        return [part.clone() for part in whole.chunk(self.ranks)]

    @staticmethod
    def pad(flat: Tensor, multiple: int) -> Tensor:
        return torch.cat([flat, torch.full([-len(flat) % multiple], 9.0)])

    def model_states(self, rank: int) -> dict[str, Any]:
        trained = {
            name: value for group in self.groups for name, value in group.items()
        }
        module = {}
        for name, value in {**trained, **self.frozen}.items():
            half = value.bfloat16()
            module[name] = half[:0].flatten() if self.stage == 3 else half
        fragments = dict(self.frozen)
        if self.stage == 3:
            for name, value in self.frozen.items():
                padded = self.pad(value.flatten(), self.ranks)
                fragments[name] = padded.chunk(self.ranks)[rank].clone()
        shapes = [
            OrderedDict((name, value.shape) for name, value in group.items())
            for group in self.groups
        ]
        frozen_shapes = {name: value.shape for name, value in self.frozen.items()}
        return {
            "module": OrderedDict(module) | self.buffers,
            "buffer_names": list(self.buffers),
            "param_shapes": shapes,
            "frozen_param_shapes": frozen_shapes or None,
            "frozen_param_fragments": fragments or None,
            "shared_params": dict(self.alias),
            "ds_version": "0.14.5",
            "global_steps": self.steps,
            "skipped_steps": self.skipped,
            **meta_of(3 * self.steps),
        }
