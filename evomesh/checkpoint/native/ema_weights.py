"""A checkpoint read with the moving average of the weights (``optimizer.ema``) in place of the weights."""

from __future__ import annotations

import json
from dataclasses import replace

from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError

EMA = "optim.ema."  # prefix of the averages
OPTIMIZER = "optim."


def with_ema_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint as if its averages were its weights; a frozen weight has no average and stays.

    Raises:
        CheckpointError: it has no averages.
    """
    averages: dict[str, bytes] = {}
    has_optimizer = False
    weights: dict[str, bytes] = {}
    index = checkpoint.with_index().index_data
    assert index is not None
    for line in index.splitlines():
        row = json.loads(line)
        name = row["name"]
        has_optimizer = has_optimizer or name.startswith(OPTIMIZER)
        if name.startswith(EMA):
            row["name"] = name.removeprefix(EMA)
            averages[row["name"]] = json.dumps(row).encode()
        elif not name.startswith(OPTIMIZER):
            weights[name] = line
    if not averages:
        reason = "" if has_optimizer else ": it has weights only"
        raise CheckpointError(
            f"step {checkpoint.step} has no average of the weights{reason}",
            where=checkpoint.folder,
            expected="a checkpoint of a run with optimizer.ema",
            fix="leave out --ema, or average checkpoints: evomesh ckpt average",
            code="EVO-CKPT-016",
        )
    lines = weights | averages
    record = replace(checkpoint.record, tensors=len(lines))
    data = b"\n".join(lines.values())
    return replace(checkpoint, record=record, index_data=data)
