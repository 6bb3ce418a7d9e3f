"""The default process group: join it, leave it, or fake it for traces."""

from __future__ import annotations

import logging
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from evomesh.errors import UserError
from evomesh.parallel.exchange import PeerLostError
from evomesh.parallel.interfaces import choose_gloo_interface
from evomesh.parallel.peer_watch import PeerFailedError, PeerWatch
from evomesh.parallel.rank_process import RankProcess
from evomesh.parallel.rendezvous import (
    JobAddress,
    call_roll,
    open_store,
    second_connection,
)

logger = logging.getLogger(__name__)

NO_GPU = "none"
GroupError = dist.DistError  # torch's, where processes cannot meet or lose each other

_NETWORK_VARIABLES = ("GLOO_", "NCCL_", "TORCH_", "TP_SOCKET")
_LOST_CONNECTION = re.compile(
    r"gloo|NCCL|c10d|Connection (?:closed|reset|refused)|Broken pipe|Socket|Timed out|recv|store->get"
)


def join_world(
    device: torch.device,
    address: JobAddress,
    stop_requested: Callable[[], bool] = lambda: False,
    timeout: timedelta | None = None,
) -> PeerWatch | None:
    """Meet the other ranks, watch them from then on, and create the default process group.

    Args:
        address: where all ranks meet.
        stop_requested: see ``PeerWatch``.
        timeout: of collectives; None: the backend's default.

    Returns:
        The watch, which has started; None for a world of one process, which needs no group either.

    Raises:
        UserError: the address cannot be used, ranks are missing, or another rank has failed.
    """
    if address.world_size == 1:
        return None
    _allow_many_ranks()
    store = open_store(address)
    store.set(f"gpu/{address.rank}", gpu_identity(device))
    store.set(f"process/{address.rank}", RankProcess.of_this_one().encode())
    hosts = call_roll(store, address)
    # All are here, so all have written theirs; equal lists lead to equal backends.
    ranks = range(address.world_size)
    gpus = store.multi_get([f"gpu/{rank}" for rank in ranks])
    processes = store.multi_get([f"process/{rank}" for rank in ranks])
    sharers = ranks_on_one_gpu([gpu.decode() for gpu in gpus])
    if sharers and address.rank == 0:
        logger.warning(
            "ranks %s share one GPU, which NCCL refuses: gloo takes its place, through the host and slowly; "
            "start one rank for each GPU",
            ", ".join(map(str, sharers)),
        )
    watch = PeerWatch(
        second_connection(address),
        address.rank,
        hosts,
        stop_requested=stop_requested,
        processes={r: RankProcess.decode(text) for r, text in enumerate(processes)},
    )
    watch.start()
    interface = choose_gloo_interface(address.host)
    if interface is not None:
        logger.info("gloo uses the interface %s, which leads to %s", interface, address)
    try:
        dist.init_process_group(
            backend(device, is_shared=bool(sharers)),
            timeout=timeout,
            store=PrefixStore("group", store),
            rank=address.rank,
            world_size=address.world_size,
        )
    except (RuntimeError, ValueError) as error:
        raise _refuse_group(error, watch) from error
    return watch


def _allow_many_ranks() -> None:
    """Keep the number of sockets of a rank independent of the world, and allow rank 0 the two per rank of its store."""
    # Otherwise gloo connects every two members of a group when the group is made,
    # whether or not they ever talk.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _refuse_group(error: Exception, watch: PeerWatch) -> UserError:
    """Return the message for a process group that could not be created."""
    verdict = watch.name_lost_rank()
    if verdict is not None:
        return PeerFailedError(verdict)
    set_here = [
        name for name in sorted(os.environ) if name.startswith(_NETWORK_VARIABLES)
    ]
    return UserError(
        f"the ranks cannot connect to each other: {str(error).partition(chr(10))[0]}",
        where="process group",
        expected="network interfaces on which all nodes reach each other",
        fix=f"check the variables that are set here: {', '.join(set_here)}"
        if set_here
        else "check the network",
        code="EVO-PARALLEL-006",
    )


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an exception of a collective means that a connection to another rank broke or timed out."""
    if isinstance(error, PeerLostError):
        return True
    return (
        isinstance(error, RuntimeError)
        and _LOST_CONNECTION.search(str(error)) is not None
    )


def in_world() -> bool:
    """Return whether this process is in the default process group."""
    return dist.is_available() and dist.is_initialized()


def leave_world() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gpu_identity(device: torch.device) -> str:
    """Return the UUID of a CUDA device, ``NO_GPU`` for the CPU.

    Indices do not tell GPUs apart: each rank may see only its own, as number 0.
    """
    if device.type != "cuda":
        return NO_GPU
    return str(torch.cuda.get_device_properties(device).uuid)


def ranks_on_one_gpu(identities: Sequence[str]) -> list[int]:
    """Return the ranks, given each rank's ``gpu_identity``, that share the first GPU that several have."""
    ranks_of: dict[str, list[int]] = {}
    for rank, identity in enumerate(identities):
        if identity != NO_GPU:
            ranks_of.setdefault(identity, []).append(rank)
    return next((ranks for ranks in ranks_of.values() if len(ranks) > 1), [])


def backend(device: torch.device, *, is_shared: bool = False) -> str:
    """Return the backends: NCCL for CUDA tensors and gloo for CPU tensors, or gloo for both.

    Args:
        is_shared: whether several ranks of the job compute on one GPU, which NCCL refuses.
    """
    if device.type != "cuda" or is_shared:
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def device_backend() -> str | None:
    """Return the backend of a group whose tensors are all on the device; None: that of the default group."""
    return "nccl" if "cuda:nccl" in dist.get_backend_config() else None


def current_backend(device: torch.device) -> str:
    """Return the backend of the default group, such as ``gloo``; for one process, the one that it would choose."""
    if not dist.is_initialized():
        return backend(device)
    return "nccl and gloo" if device_backend() else "gloo"


def first_ranks_number(number: float) -> float:
    """Return rank 0's ``number`` on every rank of the world."""
    if not dist.is_initialized():
        return number
    numbers = [number]
    dist.broadcast_object_list(numbers, src=0)
    return numbers[0]


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Create a default process group in which every collective returns at once and moves nothing."""
    # torch has no public name for this; its own memory and trace tools import it too.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError(
            "a process that is in a process group cannot trace another world"
        )
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
