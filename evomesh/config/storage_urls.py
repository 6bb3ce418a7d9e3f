"""URLs of the folders of checkpoints: their forms, and what is wrong with one of another form."""

from __future__ import annotations

import re

from evomesh.errors import UserError

PREFIX = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
FORMS = "a plain path, local:PATH, boto3:s3://BUCKET.ENDPOINT/KEY, s3:ENDPOINT/BUCKET/KEY or s3://BUCKET/KEY"


def split_prefix(url: str) -> tuple[str, str]:
    """Return ``("local", path)`` for a plain or ``local:`` path, else the prefix and what follows its colon."""
    match = PREFIX.match(url)
    if match is None:
        return "local", url
    return match[1].lower(), url[match.end() :]


def check_url(url: str) -> None:
    """Refuse a URL that no storage exists for, without a look at what is there.

    Raises:
        UserError: unknown or unsupported prefix, an empty path, or no bucket.
    """
    scheme, path = split_prefix(url)
    if scheme == "local":
        if path:
            return
        raise UserError(
            f"the checkpoint path {url!r} is empty",
            expected=FORMS,
            code="EVO-STORE-001",
        )
    if scheme in ("boto3", "s3"):
        split_s3(scheme, path)
        return
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


def split_s3(scheme: str, rest: str) -> tuple[str, str, str]:
    """Return endpoint, bucket and key of what follows ``boto3:`` or ``s3:`` in a URL; "" is an absent endpoint.

    Raises:
        UserError: no bucket or, in InternEvo's form, no endpoint.
    """
    if scheme == "s3" and rest.startswith(("http://", "https://")):
        protocol, _, path = rest.partition("://")
        host, _, path = path.partition("/")
        bucket, _, key = path.partition("/")
        if not host or not bucket:
            raise _malformed(f"s3:{rest}: no bucket", "s3:https://HOST/BUCKET/KEY")
        return f"{protocol}://{host}", bucket, key.strip("/")
    # Both forms accept a second "s3:" before the slashes:
    # boto3:s3://BUCKET.ENDPOINT/KEY and s3://BUCKET/KEY.
    place = rest.removeprefix("s3:").lstrip("/")
    host, _, key = place.partition("/")
    key = key.strip("/")
    if scheme == "s3":
        if not host:
            raise _malformed(f"s3:{rest}: no bucket", "s3://BUCKET/KEY")
        return "", host, key
    bucket, _, endpoint = host.partition(".")
    if not bucket or not endpoint:
        raise _malformed(
            f"boto3:{rest}: no bucket or no endpoint", "boto3:s3://BUCKET.ENDPOINT/KEY"
        )
    return endpoint, bucket, key


def _malformed(found: str, expected: str) -> UserError:
    return UserError(found, expected=expected, code="EVO-STORE-001")
