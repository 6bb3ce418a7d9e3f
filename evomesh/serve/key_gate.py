"""The check of the server's key, with a limit on wrong ones so that keys cannot be guessed.

Each client has a bucket of tries, and all clients together have one; a wrong key takes
a try from both, and tries come back with time. Whoever has none left gets status 429
until one is back, whatever the key: otherwise the answer would still say whether a
guess is right. Three rules keep honest clients out of trouble:

- a right key takes nothing, and a client that has given it depends on its own bucket alone;
- the same wrong key again takes nothing, so a program with an old key does not use up the tries of its address;
- a refused request takes nothing, so the wait never becomes longer.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Scope

from evomesh.serve.requests import ApiError

CLIENT_TRIES = 10
CLIENT_SECONDS = 6.0  # until one more try is back
TOTAL_TRIES = 100
TOTAL_SECONDS = 1.0
MAX_CLIENTS = 4096  # the ones seen last are remembered; the limit of all clients holds for forgotten ones too
# Bits of an address that name a network; a client has all the addresses of one.
IPV6_NETWORK = 64


class TryBucket:
    """Tries that are left; each comes back some seconds after it was taken.

    Args:
        tries: the most there are.
        seconds: until one more is back.
    """

    def __init__(self, tries: int, seconds: float, now: float) -> None:
        self.tries = tries
        self.seconds = seconds
        self._left = float(tries)
        self._counted_at = now

    def wait(self, now: float) -> float:
        """Return the seconds until there is a try; 0 if there is one."""
        self._left = min(
            float(self.tries), self._left + (now - self._counted_at) / self.seconds
        )
        self._counted_at = now
        return max(0.0, 1 - self._left) * self.seconds

    def take(self) -> None:
        self._left -= 1

    def put_back(self) -> None:
        self._left += 1


class KeyClient:
    """The tries of one client and the keys that it gave."""

    def __init__(self, now: float) -> None:
        self.bucket = TryBucket(CLIENT_TRIES, CLIENT_SECONDS, now)
        self.gave_right_key = False
        self.last_wrong = b""  # digest of the wrong key that it gave last


class KeyGate:
    """Checks keys, with a limit on wrong ones. Belongs to one event loop.

    Args:
        key: the server's key.
        clock: returns seconds.
    """

    def __init__(self, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key.encode()
        self._clock = clock
        self._total = TryBucket(TOTAL_TRIES, TOTAL_SECONDS, clock())
        self._clients: OrderedDict[str, KeyClient] = OrderedDict()

    def check(self, scope: Scope) -> None:
        """Check the key in a request's ``Authorization`` header.

        Raises:
            ApiError: 401 no key or a wrong one; 429 after too many wrong ones.
        """
        header = Headers(scope=scope).get("authorization", "")
        scheme, _, text = header.partition(" ")
        # As bytes: compare_digest rejects text that is not ASCII.
        given = text.strip().encode()
        if not given or scheme.lower() != "bearer":
            raise _unauthorized("no key; send it as: Authorization: Bearer KEY")
        client = self.take_try(scope)
        if secrets.compare_digest(given, self._key):
            self.accept(client)
            return
        # A digest, so that nobody's secret stays in memory and a long one takes no room.
        digest = hashlib.sha256(given).digest()
        if digest == client.last_wrong:
            self._put_back(client)
        client.last_wrong = digest
        raise _unauthorized("wrong key")

    def take_try(self, scope: Scope) -> KeyClient:
        """Take a try from the client of a request, before its key is compared; ``accept`` returns it.

        Raises:
            ApiError: 429: there is none.
        """
        now = self._clock()
        client = self._client(client_name(scope), now)
        wait = client.bucket.wait(now)
        total_wait = self._total.wait(now)
        if not client.gave_right_key:
            wait = max(wait, total_wait)
        if wait > 0:
            seconds = math.ceil(wait)
            message = f"too many wrong keys; try again in {seconds} s"
            raise ApiError(
                429,
                message,
                code="too_many_wrong_keys",
                headers={"Retry-After": str(seconds)},
            )
        client.bucket.take()
        self._total.take()
        return client

    def accept(self, client: KeyClient) -> None:
        """Note that the client's key was right."""
        client.gave_right_key = True
        self._put_back(client)

    def _put_back(self, client: KeyClient) -> None:
        client.bucket.put_back()
        self._total.put_back()

    def _client(self, name: str, now: float) -> KeyClient:
        client = self._clients.setdefault(name, KeyClient(now))
        self._clients.move_to_end(name)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        return client


def client_name(scope: Scope) -> str:
    """Return the address of a request's client, or its network where one client has many addresses."""
    host = str((scope.get("client") or ("",))[0])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), IPV6_NETWORK), strict=False))
    return host


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )
