"""Start this node's ranks and watch them: torchrun, with the exit codes and signals of evomesh.

torchrun itself ends with 1 and a traceback whatever ended the job, dies of SIGUSR1
without its ranks, and kills after 30 seconds a rank that is still saving.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from evomesh.cli.run import run
from evomesh.errors import EXIT_RESTART, UserError
from evomesh.train.signals import exit_code

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # to every rank, which saves
SAVING_LIMIT_S = "600"  # how long a rank may take to stop


def main() -> None:
    """Run ``python -m evomesh.cli.supervise OPTIONS SCRIPT ...``, options and script as torchrun takes them."""
    # Until torch's agent starts the ranks and takes the signals.
    run(supervise, trains=True, is_rank=False)


def supervise() -> None:
    """Start the ranks, wait for all of them, and end with the code of the one that ended the job.

    Raises:
        UserError: a rank was killed, or the nodes cannot meet.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_ranks

    from evomesh.parallel.process_group import GroupError
    from evomesh.parallel.rendezvous import wait_for_name

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING_LIMIT_S)
    arguments = parse_args(sys.argv[1:])  # type: ignore[no-untyped-call]
    arguments.signals_to_handle = FORWARDED
    if not arguments.standalone:
        wait_for_name(arguments.master_addr)
    try:
        run_ranks(arguments)  # type: ignore[no-untyped-call]
    except SignalException as stopped:
        sys.exit(exit_code(signal.Signals(stopped.sigval)))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        end_like(rank, failure)
    except (GroupError, RendezvousError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the nodes of this job cannot meet: {reason}",
            where="MASTER_ADDR (or ADDR), MASTER_PORT (or PORT), NNODES, NODE_RANK",
            expected="the same address and number of nodes on every node, a free port on the first",
            exit_code=EXIT_RESTART,
            code="EVO-PARALLEL-006",
        ) from error


def end_like(rank: int, failure: ProcessFailure) -> None:
    """End with the exit code of the rank that failed first; it has printed its error unless a signal killed it."""
    if failure.exitcode > 0:
        sys.exit(failure.exitcode)
    killer = signal.Signals(-failure.exitcode).name
    raise UserError(
        f"rank {rank} was killed by {killer}",
        expected="every rank alive until the run is complete",
        fix="rerun the same command; SIGKILL often means that memory ran out: see dmesg",
        exit_code=EXIT_RESTART,
        code="EVO-PARALLEL-005",
    )


if __name__ == "__main__":
    main()
