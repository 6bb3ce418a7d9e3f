"""Turn what a user types into a storage and a path in it."""

from __future__ import annotations

from evomesh.config.storage_urls import check_url, split_prefix
from evomesh.config.user import expand_home
from evomesh.storage.base import Storage
from evomesh.storage.local import LocalStorage
from evomesh.storage.s3 import open_s3


def split_url(url: str) -> tuple[str, str]:
    """Return ``("local", path)`` for a plain or ``local:`` path, else the prefix and what follows its colon.

    A path on a disk may begin with ``~``.

    Raises:
        UserError: there is no home folder.
    """
    scheme, path = split_prefix(url)
    if scheme == "local" and path.startswith("~"):
        path = str(expand_home(path))
    return scheme, path


def open_storage(url: str) -> tuple[Storage, str]:
    """Return the storage that ``url`` is in, and its path there.

    Raises:
        UserError: unknown or unsupported prefix, or an empty path.
    """
    check_url(url)
    scheme, path = split_url(url)
    if scheme == "local":
        return LocalStorage(), path if path == "/" else path.rstrip("/")
    return open_s3(scheme, path)
