"""Switches of a config, and the keys that act only while their switch is on.

Two rules follow from the one table:

    written, and off    InternEvo's configs write blocks out and switch them off. Such a block asks for nothing,
                        whatever else it holds: no key of it is a problem.
    not written         A key that is set while its switch has an off default does nothing, which is a warning.

A block need not be in the table to be switched off: ``enable=False`` switches off any
block, and a size of 1 any block of ``parallel`` that evomesh has no key for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


def _is_false(value: Any) -> bool:
    return value is False


def _is_at_most_one(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value <= 1)


def _is_not_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value <= 0


@dataclass(frozen=True)
class Switch:
    """A key that turns others on or off.

    Attributes:
        key: the switch, dotted.
        governed: keys that do nothing while it is off; one that ends in ".*" is everything below a key.
        is_off: whether a value of the switch turns them off.
        off_by_default: a key that is set without the switch is reported; False: other rules do so, or the switch is
            a key of InternEvo alone.
    """

    key: str
    governed: tuple[str, ...]
    is_off: Callable[[Any], bool] = _is_false
    off_by_default: bool = True

    def governs(self, key: str) -> bool:
        """Return whether a key, dotted, is one that the switch turns off."""
        for governed in self.governed:
            section = governed.removesuffix(".*")
            is_in_section = section != governed and key.startswith(f"{section}.")
            if key in (governed, section) or is_in_section:
                return True
        return False


# Keys that only InternEvo's mixtures of experts use.
EXPERT_KEYS = (
    "moe.*",
    "model.moe_type",
    "model.top_k",
    "model.num_shared_experts",
    "model.moe_use_residual",
    "model.moe_layer_kwargs.*",
    "loss.moe_loss_coeff",
    "parallel.expert.*",
    "parallel.expert_weight.*",
    "parallel.expert_zero1.*",
)
SWITCHES: tuple[Switch, ...] = (
    Switch(
        "model.use_sliding_window", ("model.sliding_window", "model.max_window_layers")
    ),
    Switch("model.num_experts", EXPERT_KEYS, _is_at_most_one, off_by_default=False),
    Switch("model.qk_norm", ("model.qk_norm_over",)),
    Switch("model.use_dynamic_ntk_rope", ("model.rope_scaling_factor",)),
    Switch(
        "data.is_multimodal",
        (
            "data.vocab_file",
            "data.image_folder",
            "data.image_size",
            "data.patch_size",
        ),
        off_by_default=False,
    ),
    Switch("data.use_shm", ("data.shm_path",)),
    Switch(
        "data.valid_every",
        ("data.valid_folder", "data.valid_micro_num", "data.valid_min_length"),
        _is_not_positive,
    ),
    Switch("data.sample_every", ("data.samples.*",), _is_not_positive),
    Switch("data.eval_every", ("data.evaluation.*",), _is_not_positive),
    Switch(
        "parallel.pipeline.size",
        (
            "parallel.pipeline.mode",
            "parallel.pipeline.schedule",
            "parallel.pipeline.balance",
            "parallel.pipeline.zero_bubble",
            "parallel.pipeline.use_zeropp",
            "parallel.pipeline.decouple_grad",
            "data.unit_schedule_size",
        ),
        _is_at_most_one,
    ),
    Switch(
        "parallel.weight.overlap",
        (
            "parallel.weight.launch_allgather_before",
            "parallel.weight.forward_overlap_per",
        ),
    ),
    Switch(
        "hybrid_zero_optimizer.use_split_tensor_optim",
        ("hybrid_zero_optimizer.all_gather_size",),
    ),
    Switch(
        "ckpt.enable_save_ckpt",
        (
            "ckpt.checkpoint_every",
            "ckpt.checkpoint_every_epochs",
            "ckpt.oss_snapshot_freq",
            "ckpt.snapshot_ckpt_folder",
            "ckpt.async_upload",
            "ckpt.async_upload_tmp_folder",
            "ckpt.keep_last",
            "ckpt.keep_every",
            "ckpt.save_optimizer",
            "ckpt.enable_internevo2hf_ckpt",
            "ckpt.export_hf.*",
        ),
    ),
    # A block without the switch turns it on.
    Switch(
        "ckpt.enable_internevo2hf_ckpt", ("ckpt.export_hf.*",), off_by_default=False
    ),
    Switch("ckpt.async_upload", ("ckpt.async_upload_tmp_folder",)),
    Switch("enable_tb", ("tensorboard_folder", "resume_tb_folder", "tensorboard.*")),
    Switch(
        "monitor.alert.enable_feishu_alert",
        ("monitor.alert.feishu_alert_address", "monitor.alert.alert_file_path"),
        off_by_default=False,  # these two have warnings of their rules
    ),
    Switch(
        "generation.do_sample",
        (
            "generation.temperature",
            "generation.top_k",
            "generation.top_p",
            "generation.min_p",
        ),
    ),
    Switch("generation.num_beams", ("generation.length_penalty",), _is_at_most_one),
    Switch(
        "lr_scheduler.warmup_ratio",
        ("lr_scheduler.warmup_start",),
        _is_not_positive,
        off_by_default=False,  # warmup_steps too: lr_rules.py has the warning
    ),
    Switch("int8_training", ("int8_mode",), off_by_default=False),
    Switch("selective_checkpoint", ("selective_checkpoint_offload",)),
)
# Blocks of ``parallel`` in which a size of 1 does not turn the other keys off.
OUR_BLOCKS = ("zero1", "tensor", "pipeline", "weight")


@dataclass(frozen=True)
class OffKeys:
    """The keys of a config whose block is written out but switched off.

    Attributes:
        blocks: blocks that switch themselves off, dotted.
        switches: switches that are written and off.
    """

    blocks: frozenset[str] = frozenset()
    switches: tuple[Switch, ...] = ()

    def __contains__(self, key: str) -> bool:
        """Return whether a key, dotted and as written, asks for nothing."""
        if any(switch.governs(key) for switch in self.switches):
            return True
        above = key
        while above:
            if above in self.blocks:
                return True
            above = above.rpartition(".")[0]
        return False


def find_off_keys(values: Mapping[str, Any]) -> OffKeys:
    """Return the keys that ask for nothing, from a config as it is written: top-level name -> value."""
    off = []
    for switch in SWITCHES:
        is_written, value = _lookup(values, switch.key)
        if is_written and switch.is_off(value):
            off.append(switch)
    return OffKeys(frozenset(_off_blocks(values)), tuple(off))


def _off_blocks(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the blocks at any depth that switch themselves off."""
    for name, value in values.items():
        key = f"{above}.{name}" if above else str(name)
        is_foreign_size = above == "parallel" and name not in OUR_BLOCKS
        if is_foreign_size and _is_size_one(value):
            yield key
        elif not isinstance(value, Mapping):
            continue
        elif False in (value.get("enable"), value.get("enabled")):
            yield key
        else:
            yield from _off_blocks(value, key)


def _is_size_one(value: Any) -> bool:
    """Return whether a block of ``parallel``, or its int form, is not parallel at all."""
    size = value.get("size") if isinstance(value, Mapping) else value
    return size == 1 and size is not True


def _lookup(values: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """Return whether a dotted key is written, and its value; the int form of a parallel size counts."""
    node: Any = values
    for part in key.split("."):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif part == "size" and isinstance(node, int):
            return True, node  # parallel.pipeline=2
        else:
            return False, None
    return True, node
