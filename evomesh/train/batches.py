"""Moves a batch to the device it is trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

from evomesh.data.batch import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``, its bounds on the host besides; copying from pinned memory makes the host not wait."""
    if device.type == "cpu":
        return batch
    names = ("input_ids", "labels", "position_ids", "type_ids", "cu_seqlens")
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
    return replace(batch, **moved, host_bounds=batch.cu_seqlens)
