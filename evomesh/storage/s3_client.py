"""From the URL of a store to its address, and from the environment to a client for it."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomesh.config.storage_urls import split_s3
from evomesh.errors import UserError

logger = logging.getLogger(__name__)

# InternEvo's names come first.
KEY_NAMES = ("S3_ACCESS_KEY_ID", "ACCESS_KEY", "AWS_ACCESS_KEY_ID")
SECRET_NAMES = ("S3_SECRET_ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY")
REGION_NAMES = ("AWS_DEFAULT_REGION", "AWS_REGION")
CONNECTIONS = 16


@dataclass(frozen=True)
class S3Address:
    """A place in a store; ``endpoint`` None means AWS's own."""

    bucket: str
    key: str
    endpoint: str | None


def parse(scheme: str, rest: str, env: Mapping[str, str] = os.environ) -> S3Address:
    """Parse what follows ``boto3:`` or ``s3:`` in a URL.

    Raises:
        UserError: no bucket or, in InternEvo's form, no endpoint.
    """
    endpoint, bucket, key = split_s3(scheme, rest)
    if scheme == "boto3":
        return S3Address(bucket, key, _endpoint_url(endpoint))
    from_environment = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    return S3Address(bucket, key, endpoint or from_environment)


def _endpoint_url(endpoint: str) -> str:
    """Return https for names; http for a bare IP address, which no certificate is made for."""
    name = endpoint.rsplit(":", 1)[0] if endpoint.count(":") == 1 else endpoint
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return f"https://{endpoint}"
    logger.warning(
        "the endpoint %s is an IP address: bytes and keys travel unencrypted (http)",
        endpoint,
    )
    return f"http://{endpoint}"


def make_client(endpoint: str | None, env: Mapping[str, str] = os.environ) -> Any:
    """Return a boto3 client without retries.

    Credentials and timeouts are those of the environment.

    Raises:
        UserError: boto3 is not installed, or does not accept what the environment says.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise UserError(
            "an s3 path needs boto3",
            fix="pip install 'evomesh[s3]'",
            code="EVO-CLI-007",
        ) from None
    config = Config(
        # There is one layer of retries, that of S3Storage: it knows which calls may be
        # repeated and logs each pause.
        retries={"max_attempts": 0},
        connect_timeout=_seconds(env, "EVOMESH_S3_CONNECT_TIMEOUT", 10.0),
        read_timeout=_seconds(env, "EVOMESH_S3_READ_TIMEOUT", 60.0),
        s3={"addressing_style": "path" if endpoint else "auto"},
        max_pool_connections=CONNECTIONS,
        # boto3 adds a checksum after the body of every request by default, which stores
        # other than AWS's refuse.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = _first(env, REGION_NAMES)
    is_unverified = env.get("EVOMESH_S3_VERIFY", "1") in ("0", "false")
    try:
        return boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=_first(env, KEY_NAMES),
            aws_secret_access_key=_first(env, SECRET_NAMES),
            region_name=region or "us-east-1",
            config=config,
            verify=False if is_unverified else None,
        )
    except (BotoCoreError, ValueError, OSError) as error:
        raise _refuse_settings(error, env) from None


def _refuse_settings(error: Exception, env: Mapping[str, str]) -> UserError:
    """Return the message for settings that boto3 does not accept.

    It names the variables that they may come from.
    """
    of_aws = sorted(name for name in env if name.startswith("AWS_"))
    keys = [name for name in (*KEY_NAMES, *SECRET_NAMES) if name in env]
    without_doubles = dict.fromkeys([*of_aws, *keys])
    set_here = ", ".join(without_doubles) or "none"
    return UserError(
        f"the settings for S3 cannot be used: {error}",
        where="environment",
        expected="a profile that exists, both keys or neither, a URL of the store",
        fix=f"correct or unset the variable, or the line in ~/.aws/config; set here: {set_here}",
        code="EVO-STORE-002",
    )


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    """Return a time limit from the environment."""
    text = env.get(name)
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UserError(
            f"{name}={text!r} is not a time limit",
            where="environment",
            expected="a number of seconds above 0",
            fix=f"unset {name} for {default:g} s",
            code="EVO-STORE-002",
        )
    return seconds


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """Return the value of the first variable that is set and not empty."""
    return next((env[name] for name in names if env.get(name)), None)
