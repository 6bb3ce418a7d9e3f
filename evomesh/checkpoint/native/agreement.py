"""Run something on every rank so that all ranks succeed or all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.errors import EXIT_USER_ERROR, UserError
from evomesh.parallel.exchange import Exchange
from evomesh.storage.base import StorageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class ErrorMessage:
    """A UserError as a message to another rank; ``dataclasses.asdict`` turns it into JSON.

    Attributes:
        of_store: a ``StorageError``: a store out of reach is not damage, so a resume must not fall back to an older
            checkpoint because of it.
    """

    found: str
    where: str = ""
    expected: str = ""
    fix: str = ""
    of_store: bool = False
    exit_code: int = EXIT_USER_ERROR

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
        )

    def to_error(self) -> UserError:
        kind = StorageError if self.of_store else CheckpointError
        return kind(
            self.found,
            where=self.where,
            expected=self.expected,
            fix=self.fix,
            exit_code=self.exit_code,
        )


def run_on_all_ranks(exchange: Exchange, action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank; if it fails anywhere, raise the error of the first such rank everywhere.

    Raises:
        CheckpointError: a rank raised a UserError.
        StorageError: a rank raised one.
    """
    message: ErrorMessage | None = None
    result: Result
    try:
        result = action()
    except UserError as error:
        message = ErrorMessage.of(error)
    gathered = exchange.gather(None if message is None else asdict(message))
    first = None
    if gathered is not None:
        first = next((value for value in gathered if value is not None), None)
    first = exchange.broadcast(first)
    if first is not None:
        raise ErrorMessage(**first).to_error()
    return result
