"""Memory of a GPU that no tensor has: estimates, each with what it is made of. For a CPU there are none."""

from __future__ import annotations

from evomesh.parallel.grid import Grid
from evomesh.plan.trace import TracedDevice

MIB = 2**20
# The context of CUDA with the kernels of torch, cuBLAS and its workspace, cuDNN.
CUDA_CONTEXT = 900 * MIB
# NCCL's buffers of one communicator: channels, each with buffers of its protocols.
NCCL_COMMUNICATOR = 100 * MIB
# Of what is allocated: blocks are rounded up, and holes between them cannot be used.
ALLOCATOR_SLACK = 0.02

CONTEXT, NCCL, SLACK = "CUDA context", "NCCL", "allocator slack"


def communicators(grid: Grid) -> int:
    """Return how many communicators a rank has: axes of the same ranks share one."""
    axes = (grid.pp, grid.dp, grid.tp, grid.wp, grid.zero, grid.replica)
    return len({id(axis.group) for axis in axes if axis.size > 1})


def outside_tensors(
    communicators: int, peak: int, device: TracedDevice = TracedDevice.CUDA
) -> dict[str, int]:
    """Return the estimated bytes outside of tensors, by name.

    Args:
        peak: bytes of tensors.
    """
    if device is TracedDevice.CPU:
        return {}
    return {
        CONTEXT: CUDA_CONTEXT,
        NCCL: communicators * NCCL_COMMUNICATOR,
        SLACK: int(peak * ALLOCATOR_SLACK),
    }
