"""NCCL's rules, played on the logs of all ranks (``nccl_log.py``): a violation names the ranks and shows their stacks.

What NCCL does and gloo does not:

    - A communicator is made when its first operation is asked for, and all its ranks
      must come to make it: until then each of them waits on the host.
    - A communicator has one stream on each rank: an operation starts when the one that
      was asked for before it has ended, on this rank, whether or not anybody waits for it.
    - The n-th operations of all ranks of a communicator are one collective: operation,
      shapes, dtypes, root and reduction must be equal.
    - A send ends when the other rank receives, not before.
    - A single send or receive goes over a communicator of the two ranks, a batch of
      them over that of the whole group, all its parts at once. So the other side of a
      batch must be a batch too.

The order in which the ranks ran does not matter: the verdict depends on what each of
them asked for and when it waited, so that it is the same in every run.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Stream = tuple[Any, ...]  # ("group", name) or ("pair", name, rank, rank)


class RuleError(AssertionError):
    """NCCL would hang or mix up data; the message has the stack of each rank that takes part."""


@dataclass(eq=False)
class Operation:
    """A collective, a send or a receive of one rank; ``peer`` is the other rank of the latter two."""

    rank: int
    kind: str
    what: str
    stack: str
    peer: int = -1
    done: bool = False

    def __str__(self) -> str:
        action = {"send": f"sends {self.what} to rank {self.peer}"}
        action["receive"] = f"receives {self.what} from rank {self.peer}"
        return f"rank {self.rank} {action.get(self.kind, f'calls {self.what}')} in\n{self.stack}"


@dataclass(eq=False)
class Request:
    """What a rank hands to a communicator at once: one operation, or a batch of sends and receives."""

    stream: Stream
    members: tuple[int, ...]
    parts: list[Operation]
    batch: int | None = None

    @property
    def done(self) -> bool:
        return all(part.done for part in self.parts)


@dataclass(eq=False)
class Wait:
    request: Request


@dataclass(eq=False)
class Program:
    """What one thread of a rank did, in order."""

    rank: int
    steps: list[Request | Wait] = field(default_factory=list)
    position: int = 0

    @property
    def step(self) -> Request | Wait | None:
        return self.steps[self.position] if self.position < len(self.steps) else None

    @property
    def place(self) -> str:
        """Say where this thread is, or was last."""
        step = self.step
        if step is None:
            if not self.steps:
                return f"rank {self.rank} has asked for nothing"
            step = self.steps[-1]
            prefix = "has ended; before that, "
        else:
            prefix = "waits: "
        request = step.request if isinstance(step, Wait) else step
        part = next((part for part in request.parts if not part.done), request.parts[0])
        return prefix + str(part)


def parse(rank: int, lines: Iterable[str]) -> list[Program]:
    """Return the programs of a rank's threads; a last line that is truncated is left out."""
    stacks: dict[int, str] = {}
    members: dict[str, tuple[int, ...]] = {}
    requests: dict[int, Request] = {}
    programs: dict[int, Program] = defaultdict(lambda: Program(rank))
    for line in lines:
        if not line.endswith("\n"):
            break
        record = json.loads(line)
        match record:
            case ["stack", number, text]:
                stacks[number] = text
            case ["group", name, ranks]:
                members[name] = tuple(ranks)
            case ["call", number, thread, name, what, stack]:
                part = Operation(rank, "call", what, stacks[stack])
                request = Request(("group", name), members[name], [part])
                requests[number] = request
                programs[thread].steps.append(request)
            case [
                "send" | "receive" as kind,
                number,
                thread,
                name,
                to,
                what,
                stack,
                batch,
            ]:
                peer = members[name][to]
                part = Operation(rank, kind, what, stacks[stack], peer)
                requests[number] = _add_one_way(
                    programs[thread].steps, part, name, members[name], batch
                )
            case ["wait", thread, number]:
                # Of an earlier job, whose log is gone, it does not matter here.
                if number in requests:
                    programs[thread].steps.append(Wait(requests[number]))
    # A rank that has asked for nothing is waited for like any other.
    return list(programs.values()) or [Program(rank)]


def _add_one_way(
    steps: list[Request | Wait],
    part: Operation,
    name: str,
    members: tuple[int, ...],
    batch: int | None,
) -> Request:
    """Add a send or receive to the batch that is being made, or as a separate request."""
    if batch is None:
        pair = (min(part.rank, part.peer), max(part.rank, part.peer))
        request = Request(("pair", name, *pair), pair, [part])
        steps.append(request)
        return request
    last = steps[-1] if steps else None
    if isinstance(last, Request) and last.batch == batch:
        last.parts.append(part)
        return last
    request = Request(("group", name), members, [part], batch)
    steps.append(request)
    return request


class Replay:
    """Plays the logs of all ranks as far as NCCL's rules allow.

    Args:
        logs: the lines of each rank's log.

    Raises:
        RuleError: two ranks ask for different things where they should agree.
    """

    def __init__(self, logs: Mapping[int, Sequence[str]]) -> None:
        self._programs = [
            program for rank, lines in logs.items() for program in parse(rank, lines)
        ]
        self._joined: dict[Stream, set[int]] = defaultdict(set)
        self._queues: dict[Stream, dict[int, deque[Request]]] = defaultdict(
            lambda: defaultdict(deque)
        )
        self._issued: set[Request] = set()
        while self._advance() or self._match():
            pass

    def require_end(self, ended: set[int]) -> None:
        """Refuse what can never end, knowing that the ranks in ``ended`` ask for nothing more.

        Raises:
            RuleError: the ranks wait for each other, or for one that has ended.
        """
        stuck = [program for program in self._programs if program.step is not None]
        may_help = {
            program.rank for program in self._programs if program.step is None
        } - ended
        abandoned = [
            request
            for queues in self._queues.values()
            for queue in queues.values()
            for request in queue
        ]
        if may_help or not (stuck or abandoned):
            return
        places = [program.place for program in self._programs]
        if not stuck:
            places += [f"never ends: {part}" for part in abandoned[0].parts]
        raise RuleError(
            "no rank can continue under NCCL's rules:\n" + "\n".join(places)
        )

    def _advance(self) -> bool:
        """Run every thread up to what it has to wait for; return whether any got further."""
        has_moved = False
        for program in self._programs:
            while (step := program.step) is not None and self._may_pass(program, step):
                program.position += 1
                has_moved = True
        return has_moved

    def _may_pass(self, program: Program, step: Request | Wait) -> bool:
        if isinstance(step, Wait):
            return step.request.done
        if step not in self._issued:
            self._issued.add(step)
            self._queues[step.stream][program.rank].append(step)
            self._joined[step.stream].add(program.rank)
        # The first operation of a communicator makes it, which needs all its ranks.
        return self._joined[step.stream] >= set(step.members)

    def _match(self) -> bool:
        """Complete what all its ranks have come to; return whether anything ended."""
        has_ended = False
        for stream in list(self._queues):
            while self._match_heads(stream):
                has_ended = True
        return has_ended

    def _match_heads(self, stream: Stream) -> bool:
        queues = self._queues[stream]
        heads = [queue[0] for queue in queues.values() if queue]
        if not heads:
            return False
        calls = [head.parts[0] for head in heads if head.parts[0].kind == "call"]
        _require_equal(calls)
        one_ways = [head for head in heads if head.parts[0].kind != "call"]
        has_moved = _match_one_ways(stream, one_ways)
        if len(calls) == len(heads[0].members):
            for call in calls:
                call.done = True
            has_moved = True
        for queue in queues.values():
            if queue and queue[0].done:
                queue.popleft()
        return has_moved


def _require_equal(calls: Sequence[Operation]) -> None:
    for call in calls[1:]:
        if call.what != calls[0].what:
            raise RuleError(f"not the same collective:\n{calls[0]}\n{call}")


def _match_one_ways(stream: Stream, heads: Sequence[Request]) -> bool:
    """Pair sends with receives among the requests at the heads of one stream."""
    has_moved = False
    for one, other in _pairs(heads):
        ours = [p for p in one.parts if p.peer == other.parts[0].rank]
        theirs = [p for p in other.parts if p.peer == one.parts[0].rank]
        for kind, dual in (("send", "receive"), ("receive", "send")):
            mine = [p for p in ours if p.kind == kind and not p.done]
            their = [p for p in theirs if p.kind == dual and not p.done]
            for a, b in zip(mine, their, strict=False):
                if a.what != b.what:
                    raise RuleError(f"a send and its receive differ:\n{a}\n{b}")
                a.done = b.done = has_moved = True
        if stream[0] == "pair" and not has_moved:
            raise RuleError(
                "both ends of a pair do the same, and each waits for the other:\n"
                f"{one.parts[0]}\n{other.parts[0]}"
            )
    return has_moved


def _pairs(requests: Sequence[Request]) -> Iterator[tuple[Request, Request]]:
    for index, one in enumerate(requests):
        for other in requests[index + 1 :]:
            yield one, other


def check_rules(logs: Mapping[int, Sequence[str]], ended: set[int]) -> None:
    """Raise RuleError where NCCL would not have done what gloo did.

    Args:
        logs: the lines of each rank's log, perhaps while it is still running.
        ended: the ranks whose logs are complete.
    """
    Replay(logs).require_end(ended)
