"""The network interface on which gloo connects ranks of several hosts."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # the request for an interface's IPv4 address, see netdevice(7)
_NAME_LENGTH = 15
_ANY_PORT = 9


def choose_gloo_interface(host: str) -> str | None:
    """Set and return the interface that leads to ``host``, where gloo would choose the loopback interface.

    Gloo gives the other ranks the address of this host's name. Many systems map that
    name to 127.0.0.1 or 127.0.1.1 in /etc/hosts, and then ranks of two hosts look for
    each other each on their own. Nothing is set if the user has set the interface, if
    the name leads outside, or if ``host`` is reached over loopback itself.
    """
    if os.environ.get(GLOO_INTERFACE) or not _is_loopback(_address_of_this_name()):
        return None
    source = _source_address(host)
    if source is None or _is_loopback(source):
        return None
    name = _interface_of(source)
    if name is not None:
        os.environ[GLOO_INTERFACE] = name
    return name


def _address_of_this_name() -> str:
    """Return the IPv4 address that this host's name has here; a loopback address if it has none, as gloo does."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _source_address(host: str) -> str | None:
    """Return the IPv4 address from which this host reaches another; None where it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))  # sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str | None:
    """Return the name of the interface that has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:_NAME_LENGTH])
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            # The answer: 16 bytes of name, then a socket address whose IP is 4 bytes in.
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
