"""A word at the start of a run on a CPU whose cores other programs use."""

from __future__ import annotations

import os

import torch

from evomesh.quantities import counted

# What a program leaves behind that has just used all cores, such as the tokenizing
# before a demo, is at most 1.
BUSY_LOAD = 1.5  # programs that want to run, for each core


def others_at_work(device: torch.device) -> list[str]:
    """Return a warning if more programs want to run than this machine has cores; none for a run on another device.

    Threads of a step wait for each other at every operator, so that a step beside other
    programs takes many times as long, not just its share.
    """
    cores = os.cpu_count() or 1
    load = _load_of_last_minute()
    if device.type != "cpu" or load <= BUSY_LOAD * cores:
        return []
    return [
        f"this machine is busy: in the last minute {load:.1f} programs wanted to run on its "
        f"{counted(cores, 'core')}, so steps may take many times as long as on an idle one"
    ]


def _load_of_last_minute() -> float:
    """Return how many programs wanted to run, on average; 0 where the system does not count them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
