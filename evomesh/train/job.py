"""One error per job: the rank that fails first tells the others, and equal errors are printed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from evomesh.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_RESTART, UserError
from evomesh.outside_errors import as_user_error
from evomesh.parallel.peer_watch import PeerFailedError, PeerWatch
from evomesh.parallel.process_group import is_lost_connection
from evomesh.parallel.rendezvous import JobAddress, report_early_failure
from evomesh.train.launchers import detect
from evomesh.train.signals import StopRequest


@contextmanager
def reporting_early_errors(launcher: str, port: int) -> Iterator[None]:
    """Tell the other ranks of an error or a signal that ends this one before they have met."""
    address = detect(os.environ, launcher, port).address
    several = address.world_size > 1
    request = StopRequest.installed()
    if request is not None and several:
        request.before_end = partial(_report_signal, address)
    try:
        yield
    except Exception as error:
        if request is not None:
            request.only_record()
        message = as_user_error(error)
        # An error that came from another rank need not be sent back.
        if message is not None and message.is_known_to_peers:
            raise message from error
        if several:
            text = str(message or describe_bug(error))
            exit_code = message.exit_code if message is not None else EXIT_BUG
            elsewhere = report_early_failure(address, text, exit_code)
            if message is not None:
                message.printed_elsewhere = elsewhere
        if message is None:
            raise
        raise message from error


def _report_signal(address: JobAddress, exit_code: int, sentence: str) -> None:
    report_early_failure(address, sentence, exit_code)


def explain_to_peers(error: BaseException, watch: PeerWatch) -> BaseException:
    """Return what this rank ends with, after the other ranks have heard of it.

    A collective that failed because another rank is gone becomes the sentence that
    names that rank.
    """
    request = StopRequest.installed()
    if request is not None:
        request.only_record()
    if isinstance(error, KeyboardInterrupt):
        watch.announce("interrupted by Ctrl-C", EXIT_INTERRUPTED)
        return error
    reported: BaseException
    if isinstance(error, PeerFailedError):
        reported = error
    elif is_lost_connection(error):
        reported = _name_lost_rank(error, watch)
    else:
        reported = _announce(error, watch)
    if isinstance(reported, UserError):
        reported.is_known_to_peers = True
    watch.linger()
    return reported


def _name_lost_rank(error: BaseException, watch: PeerWatch) -> UserError:
    verdict = watch.name_lost_rank()
    if verdict is not None:
        return PeerFailedError(verdict)
    first_line = str(error).partition("\n")[0]
    return UserError(
        f"a connection to another rank broke, and all ranks still answer: {first_line}",
        fix="rerun the same command; check the network if it happens again",
        exit_code=EXIT_RESTART,
        code="EVO-PARALLEL-005",
    )


def _announce(error: BaseException, watch: PeerWatch) -> BaseException:
    """Tell the other ranks of this rank's own error; it is printed once where they all have the same."""
    message = as_user_error(error)
    if message is None:
        watch.announce(describe_bug(error), EXIT_BUG)
        return error
    verdict = watch.announce(str(message), message.exit_code)
    message.printed_elsewhere = verdict.rank != watch.rank and verdict.message == str(
        message
    )
    return message


def describe_bug(error: BaseException) -> str:
    """Return one line for an error whose traceback this rank prints."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
