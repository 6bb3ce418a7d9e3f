"""Turn what a user types into a storage and a path in it."""

from __future__ import annotations

import re

from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.storage.base import Storage
from evomesh.storage.local import LocalStorage
from evomesh.storage.s3 import open_s3

PREFIX = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
FORMS = "a plain path, local:PATH, boto3:s3://BUCKET.ENDPOINT/KEY, s3:ENDPOINT/BUCKET/KEY or s3://BUCKET/KEY"


def split_url(url: str) -> tuple[str, str]:
    """Return ``("local", path)`` for a plain or ``local:`` path, else the prefix and what follows its colon.

    A path on a disk may begin with ``~``.

    Raises:
        UserError: there is no home folder.
    """
    scheme = "local"
    path = url
    match = PREFIX.match(url)
    if match is not None:
        scheme = match[1].lower()
        path = url[match.end() :]
    if scheme == "local" and path.startswith("~"):
        path = str(expand_home(path))
    return scheme, path


def open_storage(url: str) -> tuple[Storage, str]:
    """Return the storage that ``url`` is in, and its path there.

    Raises:
        UserError: unknown or unsupported prefix, or an empty path.
    """
    scheme, path = split_url(url)
    if scheme == "local":
        if not path:
            raise UserError(
                f"the checkpoint path {url!r} is empty",
                expected=FORMS,
                code="EVO-STORE-001",
            )
        return LocalStorage(), path if path == "/" else path.rstrip("/")
    if scheme in ("boto3", "s3"):
        return open_s3(scheme, path)
    if scheme in ("volc", "oss2"):
        raise UserError(
            f"{url!r}: the {scheme}: store is not supported",
            expected=FORMS,
            code="EVO-STORE-001",
        )
    raise UserError(
        f"unknown prefix {scheme + ':'!r} in {url!r}",
        expected=FORMS,
        fix=f"local:{url} for a file name",
        code="EVO-STORE-001",
    )
