"""Map XTuner's ``--deepspeed`` strategies to the equivalent settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.user_files import read_json

NAMES = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
SHARDED = "weights are sharded over the data-parallel ranks (parallel.zero1.fsdp=True)"
WARNINGS = {
    1: [],
    2: [
        f"{SHARDED}, not only gradients: less memory, one more gather per micro-batch, the same numbers"
    ],
    3: [f"{SHARDED} by PyTorch, without the DeepSpeed package: the same numbers"],
}

NO_OFFLOAD = (
    "nothing is moved to host memory: the numbers are the same, the memory on the device is that of the strategy "
    "without offload; if it is too much: deepspeed_zero3 on more processes, or model.checkpoint=1.0"
)


def deepspeed_settings(
    flag: str, config: Config | None = None, world_size: int = 1
) -> tuple[list[str], list[str]]:
    """Return (overrides, warnings) for ``deepspeed_zero1|2|3``, or for a DeepSpeed JSON file with a stage.

    Stage 1 shards the optimizer state over all data-parallel ranks, 2 the gradients
    too, 3 the weights too. With tensor mode isp, the weights are sharded over the
    weight axis instead.

    Args:
        config: the run's config, for its layout and sizes; None: no tensor mode isp.
        world_size: processes of the run.
    Raises:
        UserError: an unknown name; a file without a stage.
    """
    stage, offloads = _stage_and_offload(flag)
    if stage > 1 and config is not None and config.parallel.tensor.mode == "isp":
        settings, warnings = _shard_isp(flag, config, world_size)
    else:
        settings = [f"parallel.zero1=dict(size=-1, fsdp={stage > 1})"]
        warnings = [f"--deepspeed {flag}: {words}" for words in WARNINGS[stage]]
    if offloads:
        warnings.append(f"--deepspeed {flag}: {NO_OFFLOAD}")
    return settings, warnings


def _shard_isp(
    flag: str, config: Config, world_size: int
) -> tuple[list[str], list[str]]:
    """Return the settings that shard the weights of tensor mode isp over as many ranks as divide their widths."""
    # Every matrix is sharded by rows, so that the number of ranks must divide them all.
    model = config.model
    parallel = config.parallel
    ranks = world_size // parallel.pipeline.size
    divisor = math.gcd(ranks, model.hidden_size, model.qkv_width, model.mlp_width)
    size = max(divisor, parallel.weight.size)
    setting = f"parallel.weight.size={size}"
    warning = (
        f"--deepspeed {flag}: weights and gradients are sharded over {size} ranks "
        "(parallel.weight.size), as tensor mode isp does it"
    )
    return [setting], [warning]


def _stage_and_offload(flag: str) -> tuple[int, bool]:
    """Return the ZeRO stage that a flag asks for, and whether it moves state to host memory.

    "deepspeed_zero2_offload" and its short form "zero2_offload" are (2, True); a JSON
    file says both in its "zero_optimization".
    """
    name = flag if flag.startswith("deepspeed_") else f"deepspeed_{flag}"
    strategy = name.removesuffix("_offload")
    if strategy in NAMES:
        return int(strategy[-1]), strategy != name
    if not flag.endswith(".json"):
        raise UserError(
            f"unknown strategy {flag!r}",
            where="--deepspeed",
            expected=f"{' | '.join(NAMES)}, or a .json file",
            code="EVO-CLI-002",
        )
    expected = '{"zero_optimization": {"stage": 1, 2 or 3}}'
    settings = read_json(Path(flag), f"--deepspeed {flag}", expected)
    try:
        zero: Any = settings["zero_optimization"]
        stage = int(zero["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read a ZeRO stage: {type(error).__name__} {error}",
            where=f"--deepspeed {flag}",
            expected=expected,
            code="EVO-CLI-002",
        ) from None
    if stage not in WARNINGS:
        raise UserError(
            f"stage {stage}",
            where=f"--deepspeed {flag}",
            expected="1, 2 or 3",
            code="EVO-CLI-002",
        )
    # A block without a device, and a device "none", offload nothing.
    blocks = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
    devices = {block.get("device", "none") for block in blocks}
    return stage, devices != {"none"}
