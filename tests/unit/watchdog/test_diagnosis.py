"""Which rank is found stuck, and when nobody is: records of ranks made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evomesh.watchdog.diagnosis import (
    HangKind,
    HangLimits,
    RankReport,
    Suspect,
    find_suspect,
)
from evomesh.watchdog.explanation import explain, name_ranks
from evomesh.watchdog.ring import (
    COLLECTIVE_FAILED,
    HAS_LEFT,
    HAS_VERDICT,
    CollectiveEntry,
    Frame,
    Place,
    RingState,
)
from evomesh.watchdog.stacks import Call, Stacks, parse_stacks
from evomesh.watchdog.watcher import choose_speaker

LIMITS = HangLimits(silence_s=10.0, steps=3.0, long_phase_s=600.0)
SUM, GATHER = Place.ALL_REDUCE, Place.ALL_GATHER
TRAIN = Call("/x/evomesh/train/trainer.py", 10, "train")


def entries(step: int, *calls: Place, first: int = 1) -> list[CollectiveEntry]:
    """Collectives of 8 bytes of group dp:1."""
    return [
        CollectiveEntry(call, "dp:1", first + index, 8, step)
        for index, call in enumerate(calls)
    ]


def report(
    rank: int,
    *places: Place,
    stalled: float = 12.0,
    calls: list[CollectiveEntry] | None = None,
    ring: dict[str, Any] | None = None,
    **fields: Any,
) -> RankReport:
    """A rank that has finished 5 steps and is in ``places``, outermost first."""
    calls = calls or []
    number = len(calls)
    frames = tuple(
        Frame(place, 0.0, "dp:1" if place.is_collective else "", number)
        for place in places
    )
    state = RingState(
        rank=rank,
        pid=100 + rank,
        started=1,
        main_thread=1,
        events=50,
        progress_at=0.0,
        beat_at=0.0,
        step=5,
        micro_batch=1,
        steps_done=5,
        flags=0,
        frames=frames,
        entered={"dp:1": number},
        entries=tuple(calls),
    )
    state = replace(state, **(ring or {}))
    return RankReport(host="n1", ring=state, stalled_s=stalled, **fields)


WAITING = report(0, Place.FORWARD_BACKWARD, SUM)


@pytest.mark.parametrize(
    ("culprit", "kind"),
    [
        (report(1, Place.FORWARD_BACKWARD, cpu_share=1.0), HangKind.BUSY),
        (report(1, Place.SAVE, stopped_s=11.0, stalled=11.0), HangKind.STOPPED),
        (report(1, SUM, gone_s=4.0), HangKind.GONE),
        (report(1, Place.DATA), HangKind.DATA),
        (report(1, Place.REPORT), HangKind.FILE),
        (report(1, Place.SAVE, Place.FILE, stalled=61.0), HangKind.FILE),
        (report(1, Place.FORWARD_BACKWARD, process="D"), HangKind.FILE),
        (report(1, Place.FORWARD_BACKWARD), HangKind.IDLE),
        # Other programs take most of the processor.
        (report(1, Place.OPTIMIZER, cpu_share=0.2, stalled=61.0), HangKind.BUSY),
    ],
)
def test_the_rank_that_others_wait_for_is_found(
    culprit: RankReport, kind: HangKind
) -> None:
    suspect = find_suspect([WAITING, culprit], LIMITS)
    assert suspect is not None
    assert (suspect.report.rank, suspect.kind) == (1, kind)


COMPILING = Stacks(main=(Call("/x/torch/_inductor/codecache.py", 1, "load"), TRAIN))
AT_A_BREAKPOINT = Stacks(main=(Call("/lib/python3.11/bdb.py", 1, "dispatch"), TRAIN))


@pytest.mark.parametrize(
    "busy",
    [
        report(1, Place.FORWARD_BACKWARD, cpu_share=1.0, stalled=9.0),
        # Three steps of 5 s.
        report(1, Place.OPTIMIZER, cpu_share=1.0, stalled=14.0, median_step_s=5.0),
        report(1, Place.FORWARD_BACKWARD, cpu_share=1.0, ring={"steps_done": 0}),
        report(1, Place.VALIDATION, Place.FORWARD_BACKWARD, cpu_share=1.0),
        report(1, Place.SAVE, stalled=500.0),
        report(1, Place.START, cpu_share=1.0, stalled=500.0),
        report(1, Place.UPKEEP),
        # Its data worker tokenizes.
        report(1, Place.DATA, cpu_share=0.9),
        report(1, Place.FORWARD_BACKWARD, cpu_share=1.0, stacks=COMPILING),
        report(1, Place.FORWARD_BACKWARD, stalled=5000.0, stacks=AT_A_BREAKPOINT),
        # It gets a fifth of a processor beside other programs.
        report(1, Place.FORWARD_BACKWARD, cpu_share=0.2, stalled=50.0),
        report(1, Place.FORWARD_BACKWARD, stopped_s=9.0, stalled=9.0),
        # The piece of a file takes 40 s.
        report(1, Place.SAVE, Place.FILE, stalled=40.0),
    ],
)
def test_what_may_take_long_is_no_hang(busy: RankReport) -> None:
    assert find_suspect([WAITING, busy], LIMITS) is None


@pytest.mark.parametrize("flag", [HAS_LEFT, HAS_VERDICT])
def test_a_rank_that_ends_is_no_hang(flag: int) -> None:
    ended = report(1, gone_s=20.0, ring={"flags": flag})
    assert find_suspect([ended], LIMITS) is None


def test_nobody_is_named_twice_for_an_error_that_has_a_sentence() -> None:
    failed = report(0, ring={"flags": HAS_VERDICT})
    assert find_suspect([failed, report(1, SUM, gone_s=20.0)], LIMITS) is None


def in_order(rank: int, *now: Place, **options: Any) -> RankReport:
    """A rank whose previous step was sum, gather, sum, and that waits in the last of ``now``."""
    calls = [*entries(4, SUM, GATHER, SUM), *entries(5, *now, first=4)]
    return report(rank, now[-1], calls=calls, **options)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("odd", [0, 1])
def test_the_rank_that_skips_a_collective_is_found_by_its_previous_step(
    ranks: int, odd: int
) -> None:
    reports = []
    for rank in range(ranks):
        calls = (SUM, SUM) if rank == odd else (SUM, GATHER)
        reports.append(in_order(rank, *calls))
    suspect = find_suspect(reports, LIMITS)
    assert suspect is not None and suspect.report.rank == odd
    assert (
        "has called all_reduce of dp (number 5, 8 bytes) instead of all_gather of dp (8 bytes)"
        in suspect.detail
    )


def test_the_rank_that_others_wait_for_in_a_group_is_found_where_no_call_differs() -> (
    None
):
    ahead = report(0, SUM, calls=entries(5, SUM, SUM))
    late = report(1, Place.RESULTS, calls=entries(5, SUM))
    suspect = find_suspect([ahead, late], LIMITS)
    assert suspect is not None and suspect.report.rank == 1
    assert suspect.detail == "has not entered all_reduce of dp (number 2)"


def transfers(rank: int, waits_for: str, entered: dict[str, int]) -> RankReport:
    """A rank of a pipeline that waits for the first message of a channel."""
    frames = (Frame(Place.RECEIVE, 0.0, waits_for, 1),)
    return report(rank, ring={"frames": frames, "entered": entered})


def test_in_a_chain_of_waiting_stages_the_first_one_is_found() -> None:
    first = report(0, SUM, ring={"entered": {"dp:1": 1, "pp 0 to 1:x": 0}})
    second = transfers(1, "pp 0 to 1:x", {"pp 0 to 1:x": 1, "pp 1 to 2:x": 0})
    third = transfers(2, "pp 1 to 2:x", {"pp 1 to 2:x": 1})
    for reports in ([third, second, first], [first, second, third]):
        suspect = find_suspect(reports, LIMITS)
        assert suspect is not None and suspect.report.rank == 0
        assert suspect.detail == "has not entered receive of pp 0 to 1 (number 1)"


def test_stages_that_wait_for_each_other_have_one_culprit() -> None:
    first = transfers(0, "pp 1 to 0:x", {"pp 0 to 1:x": 0, "pp 1 to 0:x": 1})
    second = transfers(1, "pp 0 to 1:x", {"pp 0 to 1:x": 1, "pp 1 to 0:x": 0})
    assert find_suspect([first, second], LIMITS) is not None


def test_the_two_ends_of_a_channel_do_not_differ() -> None:
    sent = CollectiveEntry(Place.SEND, "pp 0 to 1:x", 1, 8, 5)
    received = replace(sent, operation=Place.RECEIVE)
    sender = report(0, ring={"entries": (sent,), "flags": COLLECTIVE_FAILED})
    receiver = report(1, ring={"entries": (received,)})
    equal = find_suspect([sender, receiver], LIMITS)
    assert equal is not None and equal.kind == HangKind.IDLE
    short = report(1, ring={"entries": (replace(received, nbytes=4),)})
    suspect = find_suspect([sender, short], LIMITS)
    assert suspect is not None and suspect.kind == HangKind.COLLECTIVE


def test_a_save_in_the_background_has_no_place_in_the_order_of_a_step() -> None:
    """Its messages come at any moment."""
    message = CollectiveEntry(
        Place.GATHER, "exchange:1", 1, 0, 4, is_in_background=True
    )
    reports = []
    for rank, order in enumerate(((SUM, SUM), (SUM, GATHER))):
        one = in_order(rank, *order)
        before = (message, *one.ring.entries) if rank else one.ring.entries
        reports.append(replace(one, ring=replace(one.ring, entries=before)))
    suspect = find_suspect(reports, LIMITS)
    assert suspect is not None and suspect.report.rank == 0
    assert "has called all_reduce of dp (number 5, 8 bytes)" in suspect.detail


def test_who_only_waits_is_not_blamed_while_another_one_may_take_its_time() -> None:
    """It may be in a collective of a compiled graph, which is not recorded."""
    waits = report(0, Place.FORWARD_BACKWARD, ring={"events": 40})
    starved = report(1, Place.OPTIMIZER, cpu_share=0.2)
    assert find_suspect([waits, starved], LIMITS) is None
    compiling = report(1, Place.OPTIMIZER, cpu_share=1.0, stacks=COMPILING)
    assert find_suspect([waits, compiling], LIMITS) is None
    suspect = find_suspect([waits, replace(starved, stalled_s=61.0)], LIMITS)
    assert suspect is not None and suspect.report.rank == 1


@pytest.mark.parametrize(
    "path",
    [
        "/x/torch/distributed/distributed_c10d.py",
        "/tmp/torchinductor_me/ab/cab.py",
        "/x/torch/_inductor/output_code.py",
    ],
)
def test_of_two_that_wait_the_one_outside_communication_is_named(path: str) -> None:
    inside = Stacks(main=(Call(path, 1, "wait"), TRAIN))
    outside = Stacks(main=(TRAIN,))
    waits = report(0, Place.FORWARD_BACKWARD, ring={"events": 40}, stacks=inside)
    culprit = report(1, Place.FORWARD_BACKWARD, stacks=outside)
    suspect = find_suspect([waits, culprit], LIMITS)
    assert suspect is not None and suspect.report.rank == 1


def test_ranks_that_have_waited_a_moment_are_not_out_of_order() -> None:
    """Between two samples one rank is always a collective ahead."""
    ahead = report(0, SUM, calls=entries(5, SUM, SUM), stalled=9.9)
    late = report(1, SUM, calls=entries(5, SUM), stalled=0.5)
    assert find_suspect([ahead, late], LIMITS) is None


def test_ranks_that_wait_for_an_unknown_one_prove_nothing() -> None:
    reports = [in_order(0, SUM, GATHER), in_order(1, SUM, SUM)]
    assert find_suspect(reports, LIMITS, is_complete=False) is None


def test_a_failed_collective_is_explained_at_once_by_an_order_that_differs() -> None:
    failed = in_order(0, SUM, GATHER, stalled=1.0, ring={"flags": COLLECTIVE_FAILED})
    suspect = find_suspect([failed, in_order(1, SUM, SUM, stalled=1.0)], LIMITS)
    assert suspect is not None and suspect.report.rank == 1
    # A network that broke has no odd order.
    equal = in_order(1, SUM, GATHER, stalled=1.0)
    assert find_suspect([failed, equal], LIMITS) is None


def test_the_sentence_says_who_is_stuck_where_and_who_waits() -> None:
    stuck = report(1, Place.STEP, Place.FORWARD_BACKWARD, cpu_share=1.0, lock_age_s=9.0)
    stuck = replace(stuck, stacks=Stacks(main=(TRAIN,)))
    reports = [WAITING, stuck]
    suspect = find_suspect(reports, LIMITS)
    assert suspect is not None
    sentence = explain(suspect, reports, now=1e9)
    assert sentence.startswith(
        "rank 1 on n1 (pid 101) computes without progress (an endless loop?) and holds Python's lock at "
        "evomesh/train/trainer.py:10 in train, in forward and backward of step 5, micro-batch 1, since "
    )
    assert sentence.endswith(
        "(12 s); waiting for it: rank 0 in all_reduce of dp (number 0)"
    )
    assert "\n" not in sentence


def test_a_compiled_graph_that_runs_is_not_being_compiled() -> None:
    outer = Call("/x/torch/_dynamo/eval_frame.py", 1, "compile_wrapper")
    runs = Call("/x/torch/_functorch/_aot_autograd/runtime_wrappers.py", 1, "wrap")
    inner = Call("/tmp/torchinductor_me/ab/cab.py", 1, "call")
    compiles = Call("/x/torch/_dynamo/convert_frame.py", 1, "compile_inner")
    assert not Stacks(main=(inner, runs, outer, TRAIN)).is_compiling
    assert Stacks(main=(compiles, outer, TRAIN)).is_compiling


def test_many_ranks_are_counted() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks(list(range(8))) == "ranks 0, 1, 2, 3, 4 and 3 more"


def test_stacks_are_read_by_thread() -> None:
    text = """Thread 0x0000000000000002 (most recent call first):
  File "/x/evomesh/data/packing/loader.py", line 7 in read
  File "/x/lib/python3.11/threading.py", line 1 in run

Current thread 0x0000000000000001 (most recent call first):
  File "/x/evomesh/train/trainer.py", line 10 in train
"""
    stacks = parse_stacks(text, main_thread=1)
    assert stacks.main == (TRAIN,)
    assert str(stacks.data_worker) == "data/packing/loader.py:7 in read"
    assert Stacks(main=(TRAIN,)).data_worker is None


def test_a_save_in_the_background_waits_where_its_thread_is() -> None:
    gather = Frame(Place.GATHER, 0.0, "exchange:1", 3)
    write = Frame(Place.FILE, 0.0, detail="ckpts/weights")
    ends = {"stalled": 61.0, "background_s": 61.0}
    waiting = report(0, Place.SAVE, ring={"background": gather, "events": 1}, **ends)
    stuck = report(1, Place.SAVE, ring={"background": write}, **ends)
    suspect = find_suspect([waiting, stuck], LIMITS)
    assert suspect is not None
    assert (suspect.report.rank, suspect.kind) == (1, HangKind.FILE)
    sentence = explain(suspect, [waiting, stuck], now=1e9)
    assert "waits for a file system that does not answer" in sentence
    assert "(in the background: ckpts/weights)" in sentence
    assert sentence.endswith("rank 0 in gather of exchange (number 3)")


def test_another_rank_than_the_culprit_speaks_if_one_can() -> None:
    culprit, other = report(0, Place.FORWARD_BACKWARD), report(1, SUM)
    suspect = Suspect(culprit, HangKind.BUSY)
    frozen = replace(other, stopped_s=5.0)
    assert choose_speaker(suspect, [culprit, other]) == 1
    assert choose_speaker(suspect, [culprit, frozen]) == 0
    assert choose_speaker(suspect, [replace(culprit, stopped_s=5.0), frozen]) == -1
