"""Read what may be damaged.

Every way in which bytes cannot be had becomes one error, which a fallback understands. A
store that is down is not damage. Its ``StorageError`` passes through, so that an outage
never makes a run continue from an older checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.errors import UserError

logger = logging.getLogger(__name__)

READS = 3  # of bytes that do not match their hash, before they count as damaged
Result = TypeVar("Result")


@contextmanager
def reading(what: str, folder: str, note: str = "") -> Iterator[None]:
    """Turn the errors of reading ``what`` into a ``CheckpointError`` that names it.

    Args:
        note: what else helps somebody who looks for a missing file.

    Raises:
        CheckpointError: absent, unreadable, too short, or not what this program can understand.
        StorageError: the store is down or refuses this user.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"{what} is missing{note}", where=folder, code="EVO-CKPT-004"
        ) from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{what} cannot be read: {reason}", where=folder, code="EVO-CKPT-014"
        ) from None
    except MemoryError:
        raise CheckpointError(
            f"{what} needs more memory than there is", where=folder, code="EVO-SYS-004"
        ) from None
    except Exception as error:
        # Whoever can write a record with a right hash can also write one that breaks
        # the code which reads it. Such a checkpoint must not keep a run from the one
        # before it.
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{what} cannot be used: {reason[:200]}", where=folder, code="EVO-CKPT-002"
        ) from None


def read_until_intact(what: str, read_and_check: Callable[[], Result]) -> Result:
    """Call ``read_and_check`` until it succeeds, ``READS`` times at most.

    A bit that flips once on its way from a disk or a store is no damage: the second
    reading is right. Damage on the disk is the same every time.

    Raises:
        CheckpointError: that of the last reading.
    """
    for attempt in range(1, READS + 1):
        try:
            result = read_and_check()
        except CheckpointError:
            if attempt == READS:
                raise
            continue
        if attempt > 1:
            logger.warning(
                "%s arrived damaged and was read again: reading %d is right",
                what,
                attempt,
            )
        return result
    raise AssertionError("the last reading returns or raises")
