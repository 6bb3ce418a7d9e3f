"""Ceph's S3 gateway on this machine: one monitor, one storage daemon in memory and radosgw, on loopback only.

Needs Debian's packages radosgw, ceph-mon and ceph-osd; ``.ci/run`` installs them where it may.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "monmaptool", "ceph")
KEY, SECRET = "test-key", "test-secret"
CONFIG = """
[global]
fsid = {fsid}
mon initial members = a
mon host = v1:127.0.0.1:{mon_port}
public network = 127.0.0.0/8
ms bind ipv6 = false
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
osd objectstore = memstore
memstore device bytes = 2147483648
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
[mon.a]
mon data = {folder}/mon
mon addr = 127.0.0.1:{mon_port}
mon data avail crit = 1
[osd.0]
osd data = {folder}/osd
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw thread pool size = 16
"""


@dataclass(frozen=True)
class Gateway:
    """``address`` is HOST:PORT; the credentials are ``KEY`` and ``SECRET``."""

    address: str


def available() -> bool:
    return all(shutil.which(program) for program in PROGRAMS)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def gateway() -> Iterator[Gateway]:
    """Starts everything, and ends by process id what it started."""
    folder = Path(tempfile.mkdtemp(prefix="rgw"))
    try:
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir()
        port = _free_port()
        _start(folder, port)
        yield Gateway(f"127.0.0.1:{port}")
    finally:
        for pid in (folder / "run").glob("*.pid"):
            try:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            except (ValueError, ProcessLookupError):
                continue
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_monitor(conf: str) -> None:
    """Return once the monitor answers: in its first moments it refuses every command (EPERM)."""
    deadline = time.monotonic() + 60
    command = ["ceph", "-c", conf, "mon", "stat"]
    while subprocess.run(command, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, "the monitor does not answer"
        time.sleep(0.2)


def _start(folder: Path, port: int) -> None:
    fsid, osd, conf = str(uuid.uuid4()), str(uuid.uuid4()), f"{folder}/ceph.conf"
    mon_port = _free_port()
    Path(conf).write_text(
        CONFIG.format(fsid=fsid, folder=folder, port=port, mon_port=mon_port)
    )

    def call(*command: str) -> None:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"CEPH_CONF": conf},
        )
        assert done.returncode == 0, (
            f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        )

    call(
        "monmaptool",
        "--create",
        "--fsid",
        fsid,
        "--addv",
        "a",
        f"[v1:127.0.0.1:{mon_port}]",
        f"{folder}/monmap",
    )
    call("ceph-mon", "-i", "a", "--mkfs", "--monmap", f"{folder}/monmap", "-c", conf)
    call("ceph-mon", "-i", "a", "-c", conf)
    _wait_for_monitor(conf)
    call("ceph", "-c", conf, "osd", "new", osd, "0")
    call("ceph-osd", "-i", "0", "-c", conf, "--mkfs", "--osd-uuid", osd, "--fsid", fsid)
    call("ceph-osd", "-i", "0", "-c", conf, "--fsid", fsid)
    call(
        "ceph",
        "-c",
        conf,
        "osd",
        "crush",
        "add",
        "osd.0",
        "1.0",
        "root=default",
        "host=h0",
    )
    call("radosgw", "-n", "client.rgw", "-c", conf)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    admin = ("radosgw-admin", "-n", "client.rgw", "-c", conf)
    call(
        *admin,
        "user",
        "create",
        "--uid=t",
        "--display-name=t",
        f"--access-key={KEY}",
        f"--secret-key={SECRET}",
    )
