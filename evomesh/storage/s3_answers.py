"""Decide from an answer of an S3 store whether to ask again, and what a refusal means."""

from __future__ import annotations

import errno
from typing import Any, NoReturn

from evomesh.errors import EXIT_USER_ERROR
from evomesh.storage.base import StorageError
from evomesh.storage.s3_lock import ConditionUnknownError

MISSING = ("404", "NoSuchKey", "NotFound")
EXISTS = ("412", "PreconditionFailed")
# Codes below 500 that ask for another try. A conflict is two conditional writes that
# meet: one of them is to come back.
REPEATABLE = (
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "TooManyRequests",
    "429",
    "409",
    "ConditionalRequestConflict",
    "OperationAborted",
)
# Of one object, where others can be read.
UNREADABLE = ("AccessDenied", "403", "InvalidObjectState")
ADVICE = {
    "NoSuchBucket": "make the bucket, or correct its name in the path",
    "InvalidAccessKeyId": "set S3_ACCESS_KEY_ID (or AWS_ACCESS_KEY_ID) to a key this store knows",
    "SignatureDoesNotMatch": "set S3_SECRET_ACCESS_KEY_ID (or AWS_SECRET_ACCESS_KEY) to the key's own secret",
    "AccessDenied": "give this key the right to list, read, write and delete in the bucket",
    "403": "check the credentials, and that they may use the bucket",
    "RequestTimeTooSkewed": "set this machine's clock",
}


def repeatable_answer(response: dict[str, Any], operation: str, place: str) -> str:
    """Return the reason of an answer that asks for another try.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError, StorageError: what any other
            answer means.
    """
    code, status = _code_and_status(response)
    shown_code = code or "error"
    reason = f"{operation}: {shown_code} (HTTP {status})"
    # 501, not implemented, is the one answer of a server at fault that stays the same.
    is_fault = status >= 500 and status != 501
    may_change = is_fault or code in REPEATABLE
    is_answer = code in (*MISSING, *EXISTS)
    if is_answer or not may_change:
        _raise_refusal(reason, operation, place, code, status)
    return reason


def _code_and_status(response: dict[str, Any]) -> tuple[str, int]:
    error = response.get("Error", {})
    metadata = response.get("ResponseMetadata", {})
    code = str(error.get("Code", ""))
    return code, int(metadata.get("HTTPStatusCode", 0))


def _raise_refusal(
    reason: str, operation: str, place: str, code: str, status: int
) -> NoReturn:
    # The store's answers as the errors of local files, so that callers know one kind.
    if code in MISSING:
        raise FileNotFoundError(errno.ENOENT, "no such object", place) from None
    if code in EXISTS:
        raise FileExistsError(errno.EEXIST, "the object exists", place) from None
    refusal = f"the store refuses: {reason}"
    is_read = operation in ("get_object", "head_object")
    if is_read and code in UNREADABLE:
        raise PermissionError(errno.EACCES, refusal, place) from None
    if code == "NotImplemented" or status == 501:
        raise ConditionUnknownError(
            refusal, where=place, code="EVO-STORE-004"
        ) from None
    advice = ADVICE.get(code, "")
    raise StorageError(refusal, where=place, fix=advice, code="EVO-STORE-003") from None


def repeatable_failure(error: Exception, operation: str, place: str) -> str:
    """Return the reason of a request without an answer, unless credentials are missing."""
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        raise StorageError(
            "no credentials for the object store",
            where=place,
            fix="set S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY_ID",
            exit_code=EXIT_USER_ERROR,
            code="EVO-STORE-002",
        ) from None
    return f"{operation}: {error}"
