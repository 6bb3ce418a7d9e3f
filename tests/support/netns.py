"""Two hosts on this machine: network namespaces with a virtual link between them. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Why there can be no such hosts here; "" where there can."""
    if not shutil.which("ip"):
        return "needs iproute2"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, check=False
    )
    if made.returncode != 0:
        return "network namespaces need root"
    _ip("netns", "delete", probe)
    return ""


@dataclass(frozen=True)
class Link:
    """Names of the two namespaces; each has the link's end ``cable`` with an address of ``ADDRESSES``."""

    hosts: tuple[str, str]

    def inside(self, host: int, *command: str) -> list[str]:
        """Return a command that runs another one on a host."""
        return ["ip", "netns", "exec", self.hosts[host], *command]

    def cut(self) -> None:
        """Take the link down, as if a cable were pulled: packets vanish, and no connection is closed."""
        _ip("-n", self.hosts[0], "link", "set", "cable", "down")

    def repair(self) -> None:
        _ip("-n", self.hosts[0], "link", "set", "cable", "up")


@contextmanager
def two_hosts() -> Iterator[Link]:
    """Make the hosts and the link, and delete them in the end."""
    link = Link((f"a{os.getpid()}", f"b{os.getpid()}"))
    try:
        for host in link.hosts:
            _ip("netns", "add", host)
        first, second = link.hosts
        ends = [
            "cable",
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            second,
        ]
        _ip("link", "add", *ends)
        for host, address in zip(link.hosts, ADDRESSES, strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "cable", "up")
        yield link
    finally:
        for host in link.hosts:
            subprocess.run(
                ["ip", "netns", "delete", host], capture_output=True, check=False
            )


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
