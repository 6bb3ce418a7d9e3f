"""Let the ranks of a job find each other: a key-value store at one address, and a roll call in it.

Everything that can go wrong here is somebody's setting, so each failure names the
variable and the value. The waits are Python loops, in which signals are answered.
"""

from __future__ import annotations

import datetime
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from evomesh.errors import EXIT_RESTART, UserError
from evomesh.outside_errors import fix_for
from evomesh.parallel.peer_watch import (
    PeerFailedError,
    Verdict,
    acknowledge,
    failed,
    wait_for_readers,
)

logger = logging.getLogger(__name__)

NAME_LIMIT_S = 30.0  # a name may appear while the first pod or node starts
CONNECT_LIMIT_S = ROLL_CALL_LIMIT_S = 600.0
REPORT_S = 30.0  # between two lines that say what is waited for
EARLY_LIMIT_S = 5.0  # how long a rank that fails at its start tries to tell the others
PAUSE_S = 0.1
STORE_TIMEOUT = datetime.timedelta(seconds=300)


@dataclass(frozen=True)
class JobAddress:
    """The address at which the ranks of a job meet, and which of them this process is."""

    rank: int
    world_size: int
    host: str
    port: int

    @property
    def is_served_here(self) -> bool:
        """Return whether this process runs the store: rank 0 does, unless torchrun's agent runs it."""
        return (
            self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        )

    @property
    def prefix(self) -> str:
        """Start of all keys: torchrun restarts a job on the store of its first attempt."""
        return f"evomesh/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def open_store(address: JobAddress, *, limit_s: float = CONNECT_LIMIT_S) -> Store:
    """Return this process's connection to the job's store; on rank 0 the store is started first.

    Raises:
        UserError: the port is taken or not allowed, the name does not resolve, or nobody listens.
    """
    # First the causes that can be distinguished: torch's own wait ends after minutes with
    # one message for all of them. The server connects to itself by its name too.
    wait_for_name(address.host, min(limit_s, NAME_LIMIT_S))
    if address.is_served_here:
        return _connect(address, serve=True)
    _wait_for_listener(address, limit_s)
    return _connect(address, serve=False)


def second_connection(address: JobAddress) -> Store:
    """Return one more connection, for a thread: a call that waits on one connection blocks all others on it."""
    return _connect(address, serve=False)


def _connect(address: JobAddress, *, serve: bool) -> Store:
    try:
        store = TCPStore(
            address.host,
            address.port,
            is_master=serve,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _refusal(address, str(error), serve) from None
    return PrefixStore(address.prefix, store)


def _refusal(address: JobAddress, reason: str, serve: bool) -> UserError:
    """Return the message for a store that cannot be started or reached."""
    if "EADDRINUSE" in reason or "address already in use" in reason.lower():
        return UserError(
            f"port {address.port} is in use on this host",
            where="MASTER_PORT",
            expected="a free port on the host of rank 0",
            fix="export MASTER_PORT=ANOTHER (--port for slurm); an earlier job may still hold it: "
            f"ss -ltnp 'sport = :{address.port}'",
            code="EVO-PARALLEL-002",
        )
    if "EACCES" in reason or "permission denied" in reason.lower():
        return UserError(
            f"port {address.port} may not be opened by this user",
            where="MASTER_PORT",
            expected="a port from 1024 to 65535",
            code="EVO-PARALLEL-002",
        )
    # The store's server (libuv) says the last of these when it gets no descriptor.
    if re.search("EMFILE|too many open files|init uv loop", reason, re.IGNORECASE):
        return UserError(
            f"too many open files to open a connection at {address}",
            where="environment",
            fix=fix_for(errno.EMFILE),
            code="EVO-SYS-001",
        )
    doing = "listen at" if serve else "connect to"
    return UserError(
        f"cannot {doing} {address}: {reason.partition(chr(10))[0]}",
        where="MASTER_ADDR, MASTER_PORT",
        code="EVO-PARALLEL-003",
    )


def wait_for_name(host: str, limit_s: float = NAME_LIMIT_S) -> None:
    """Wait until a name has an address here, as that of a node or pod that starts.

    Raises:
        UserError: it still has none after ``limit_s`` seconds.
    """

    def resolves() -> bool:
        try:
            socket.getaddrinfo(host, None)
        # A name with an empty or too long label is no name for Python either.
        except (OSError, UnicodeError) as error:
            # Without a descriptor even a number does not resolve, and waiting does not
            # help: the connection, tried next, fails with a message about descriptors.
            return isinstance(error, OSError) and error.errno == errno.EMFILE
        return True

    if _wait(resolves, f"the name {host} (MASTER_ADDR) to resolve", limit_s):
        return
    raise UserError(
        f"{host!r} has no address on this host ({socket.gethostname()})",
        where="MASTER_ADDR",
        expected="a name or address of the node that rank 0 runs on",
        fix="check the name with: getent hosts NAME, or give an address: export MASTER_ADDR=ADDRESS",
        code="EVO-PARALLEL-003",
    )


def _wait_for_listener(address: JobAddress, limit_s: float) -> None:
    last_reason = ""

    def answers() -> bool:
        nonlocal last_reason
        try:
            socket.create_connection((address.host, address.port), timeout=5).close()
        except OSError as error:
            last_reason = error.strerror or str(error)
            return False
        return True

    if _wait(answers, f"rank 0 at {address}", limit_s):
        return
    raise UserError(
        f"rank 0 does not answer at {address}: {last_reason} (waited {limit_s:.0f} s)",
        where="MASTER_ADDR, MASTER_PORT",
        expected="the host of rank 0 and a port that other nodes may connect to",
        fix="see whether rank 0 has started and which error it printed; check the address and the firewall",
        exit_code=EXIT_RESTART,
        code="EVO-PARALLEL-004",
    )


def report_early_failure(address: JobAddress, message: str, exit_code: int) -> bool:
    """Tell the other ranks of an error before they have met, so that none of them waits for this one.

    Returns:
        Whether another rank has reported the same message, and prints it.
    """
    try:
        store = open_store(address, limit_s=EARLY_LIMIT_S)
        verdict = failed(
            address.rank, socket.gethostname(), message, exit_code
        ).publish(store)
        if verdict.rank != address.rank:
            acknowledge(store)
        if address.is_served_here:
            wait_for_readers(store, address.world_size, EARLY_LIMIT_S)
    except (UserError, RuntimeError):  # nobody to tell
        return False
    return verdict.rank != address.rank and verdict.message == message


def call_roll(
    store: Store, address: JobAddress, limit_s: float = ROLL_CALL_LIMIT_S
) -> dict[int, str]:
    """Wait until every rank is here and return their hosts.

    Raises:
        UserError: the ranks that have not come within the limit.
    """
    # The host comes before the count, so that whoever sees all ranks present can read all
    # hosts.
    ranks = range(address.world_size)
    store.set(f"host/{address.rank}", socket.gethostname())
    store.add("present", 1)

    def all_present() -> bool:
        try:
            verdict = Verdict.read(store)
            present = store.add("present", 0)
        except RuntimeError:
            raise UserError(
                f"rank 0, which keeps the job's store at {address}, ended before all ranks were there",
                fix="see what rank 0 printed; then rerun the same command",
                exit_code=EXIT_RESTART,
                code="EVO-PARALLEL-004",
            ) from None
        if verdict is not None:
            acknowledge(store)
            raise PeerFailedError(verdict)
        return bool(present >= address.world_size)

    def missing() -> str:
        absent = [rank for rank in ranks if not store.check([f"host/{rank}"])]
        return (
            f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent[:8]))}"
            + ", ..." * (len(absent) > 8)
        )

    if not _wait(
        all_present,
        lambda: f"{missing()} of {address.world_size}",
        limit_s,
    ):
        raise UserError(
            f"{missing()} of {address.world_size} did not start (waited {limit_s:.0f} s)",
            where=str(address),
            fix="see what those ranks printed, and whether all nodes were given the same address",
            exit_code=EXIT_RESTART,
            code="EVO-PARALLEL-004",
        )
    hosts = store.multi_get([f"host/{rank}" for rank in ranks])
    return {
        rank: host.decode(errors="replace")
        for rank, host in zip(ranks, hosts, strict=True)
    }


def _wait(
    is_done: Callable[[], bool], what: str | Callable[[], str], limit_s: float
) -> bool:
    """Ask until it is done; log what is waited for, at first after 5 seconds. False when the limit has passed."""
    started = time.monotonic()
    next_report = started + 5.0
    while not is_done():
        now = time.monotonic()
        if now - started > limit_s:
            return False
        if now >= next_report:
            logger.warning("waiting for %s", what if isinstance(what, str) else what())
            next_report = now + REPORT_S
        time.sleep(PAUSE_S)
    return True


def is_port(number: int) -> bool:
    """Return whether a port can have this number."""
    return 0 < number < 2**16
