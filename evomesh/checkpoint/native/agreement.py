"""Run something on every rank so that all ranks succeed or all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.errors import EXIT_USER_ERROR, UserError
from evomesh.parallel.exchange import Exchange
from evomesh.storage.base import StorageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class ErrorMessage:
    """A UserError as a message to another rank; ``dataclasses.asdict`` turns it into JSON.

    Attributes:
        of_store: a ``StorageError``: a store out of reach is not damage, so a resume
            must not fall back to an older checkpoint because of it.
    """

    found: str
    where: str = ""
    expected: str = ""
    fix: str = ""
    of_store: bool = False
    exit_code: int = EXIT_USER_ERROR
    code: str = ""

    @staticmethod
    def of(error: UserError) -> ErrorMessage:
        of_store = isinstance(error, StorageError)
        return ErrorMessage(
            error.found,
            error.where,
            error.expected,
            error.fix,
            of_store,
            error.exit_code,
            error.code,
        )

    def to_error(self) -> UserError:
        kind = StorageError if self.of_store else CheckpointError
        return kind(
            self.found,
            where=self.where,
            expected=self.expected,
            fix=self.fix,
            code=self.code,
            exit_code=self.exit_code,
        )


def error_to_json(error: ErrorMessage | None) -> dict[str, Any] | None:
    """Return an error, or that there is none, as part of a message."""
    return None if error is None else asdict(error)


def error_from_json(value: dict[str, Any] | None) -> ErrorMessage | None:
    """Return the error that ``error_to_json`` put into a message."""
    return None if value is None else ErrorMessage(**value)


def run_on_all_ranks(exchange: Exchange, action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank.

    If it fails anywhere, the error of the first such rank is raised everywhere.

    Raises:
        CheckpointError: a rank raised a UserError.
        StorageError: a rank raised one.
    """
    # A rank that raised on its own would leave the others in their next collective until
    # it times out, half an hour later, with a message that names no cause.
    message: ErrorMessage | None = None
    result: Result
    try:
        result = action()
    except UserError as error:
        message = ErrorMessage.of(error)
    gathered = exchange.gather(error_to_json(message))
    first = None
    if gathered is not None:
        failed = [value for value in gathered if value is not None]
        first = failed[0] if failed else None
    first_message = error_from_json(exchange.broadcast(first))
    if first_message is not None:
        raise first_message.to_error()
    return result
