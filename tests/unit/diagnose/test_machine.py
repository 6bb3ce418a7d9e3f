"""Judgments about the machines of all ranks, given what each states: who is named, and what is to be done."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from typing import Any

import pytest
import torch

from evomesh.diagnose.facts import Limits, MachineFacts, read_facts, read_limits
from evomesh.diagnose.folders import judge_listing, judge_rates
from evomesh.diagnose.machine import (
    clock_offsets,
    judge_clocks,
    judge_devices,
    judge_limits,
    judge_products,
    judge_versions,
)
from evomesh.diagnose.network import MESSAGES, judge_axis, judge_ports
from evomesh.diagnose.results import CheckResult, RankPlace, Report
from evomesh.parallel.exchange import SingleProcessExchange

MIB = 1 << 20
ROOMY = Limits(1 << 20, None, None, 1 << 33)
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def rank(number: int, **changes: Any) -> MachineFacts:
    facts = MachineFacts(
        rank=number,
        host=f"n{number // 2}",
        versions=VERSIONS,
        device="cpu",
        gpu="none",
        cores=8,
        limits=ROOMY,
    )
    return replace(facts, **changes)


def gpu_rank(number: int, **changes: Any) -> MachineFacts:
    gpu = {"device": f"cuda:{number % 2} NVIDIA H100", "gpu": f"uuid{number}"}
    return rank(number, **gpu | changes)


def four(**changes: Any) -> list[MachineFacts]:
    """Four ranks on two hosts, the last of which differs."""
    return [rank(0), rank(1), rank(2), rank(3, **changes)]


PLACES = [facts.place for facts in four()]


def test_ranks_that_agree_are_well() -> None:
    ranks = four()
    for result in (
        judge_versions(ranks),
        judge_devices(ranks, "gloo"),
        judge_clocks(ranks, [0.0, 0.1, -0.2, 1.0]),
        *judge_limits(ranks),
    ):
        assert result.status == "ok" and not result.fix, result


@pytest.mark.parametrize("name", ["torch", "NCCL"])
def test_versions_that_differ_are_named_with_their_ranks(name: str) -> None:
    result = judge_versions(
        [rank(0, versions=VERSIONS | {name: "2.12"}), *four(versions=VERSIONS)[1:]]
    )
    assert result.status == "fail" and result.fix
    assert f"{name} differs: 2.12 (rank 0 on n0), " in result.found
    assert "rank 3 on n1" in result.found


def test_one_rank_without_a_gpu_is_named() -> None:
    ranks = [gpu_rank(0), gpu_rank(1), gpu_rank(2), rank(3)]
    result = judge_devices(ranks, "gloo")
    assert result.status == "fail"
    assert "cpu (rank 3 on n1)" in result.found and "NVIDIA H100" in result.found


def test_ranks_on_one_gpu_are_named() -> None:
    ranks = [gpu_rank(0), gpu_rank(1, gpu="uuid0"), gpu_rank(2), gpu_rank(3)]
    result = judge_devices(ranks, "gloo")
    assert result.status == "warn"
    assert "rank 0 on n0, rank 1 on n0 share one GPU" in result.found


def test_more_ranks_than_cores_are_warned_of() -> None:
    ranks = [rank(number, host="n0", cores=2) for number in range(4)]
    result = judge_devices(ranks, "gloo")
    assert result.status == "warn" and "4 ranks share 2 cores of n0" in result.found


@pytest.mark.parametrize(
    ("low", "check", "status", "words"),
    [
        ({"open_files": 200}, "open files", "fail", "ulimit -Hn"),
        ({"processes": 64}, "processes", "fail", "ulimit -u"),
        ({"locked_memory": 64 << 10}, "locked memory", "warn", "ulimit -l"),
        ({"shared_memory": 64 * MIB}, "/dev/shm", "fail", "--shm-size"),
        ({"shared_memory": 0}, "/dev/shm", "fail", "--shm-size"),
    ],
)
def test_a_low_limit_is_named_with_its_rank(
    low: dict[str, int], check: str, status: str, words: str
) -> None:
    ranks = [gpu_rank(number) for number in range(3)]
    ranks.append(gpu_rank(3, limits=replace(ROOMY, **low)))
    results = {result.check: result for result in judge_limits(ranks)}
    found = results.pop(check)
    assert found.status == status and words in found.fix
    assert "rank 3 on n1" in found.found and "rank 0" not in found.found
    assert all(result.status == "ok" for result in results.values())


def test_limits_are_those_of_the_process(monkeypatch) -> None:
    def low(kind: int) -> tuple[int, int]:
        return (
            (100, 100)
            if kind == resource.RLIMIT_NOFILE
            else (resource.RLIM_INFINITY,) * 2
        )

    monkeypatch.setattr(resource, "getrlimit", low)
    limits = read_limits()
    assert (limits.open_files, limits.processes) == (100, None)
    facts = read_facts(0, torch.device("cpu"), limits)
    assert MachineFacts.of_message(json.loads(json.dumps(facts.as_message()))) == facts
    results = {result.check: result for result in judge_limits([facts])}
    assert results["open files"].status == "fail"


@pytest.mark.parametrize(("offset", "words"), [(4.2, "ahead of"), (-61.0, "behind")])
def test_a_clock_that_is_off_is_named(offset: float, words: str) -> None:
    result = judge_clocks(four(), [0.0, 0.9, offset, 0.0])
    assert result.status == "fail" and "chronyd" in result.fix
    found = f"rank 2 on n1 is {abs(offset):.1f} s {words} rank 0 on n0"
    assert result.found == found


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([0.01, 0.01, 0.01, 0.05], "rank 3 on n1"),
        ([0.01, 0.01, 0.015, 0.01], ""),
        ([1e-5, 1e-5, 1e-5, 1e-3], ""),  # the noise of a small time
    ],
)
def test_a_slow_device_is_named(seconds: list[float], slow: str) -> None:
    result = judge_products(four(), seconds)
    assert result.status == ("warn" if slow else "ok")
    assert result.found.endswith(slow or "ms")


def test_one_process_is_never_off() -> None:
    assert clock_offsets(SingleProcessExchange()) == [0.0]


def test_a_slow_group_is_named() -> None:
    fast = [1e-4, 1e-3, 1e-2]
    result = judge_axis("tp", 2, [fast, fast, fast, [1e-4, 1e-3, 1.0]], PLACES)
    assert result.status == "warn"
    assert result.found.endswith("than the other groups: rank 3 on n1")
    assert "latency 100 us" in result.found
    assert judge_axis("tp", 2, [fast] * 4, PLACES).status == "ok"
    assert len(MESSAGES) == len(fast)


def test_an_address_without_ports_is_named() -> None:
    result = judge_ports(["", "", "no address", ""], PLACES, "n0:29500")
    assert result.status == "warn" and result.found.startswith("rank 2 on n1: no")
    assert "n0:29500" in judge_ports([""] * 4, PLACES, "n0:29500").found


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (["a", "a", "a", ""], "is absent, empty or not readable: rank 3 on n1"),
        (["a", "a", "b", "b"], "b (rank 2 on n1, rank 3 on n1)"),
    ],
)
def test_files_that_a_rank_does_not_have_are_named(
    answers: list[str], words: str
) -> None:
    result = judge_listing("tokenizer", "/data/tok", answers, PLACES)
    assert result.status == "fail" and words in result.found


def test_a_slow_or_broken_disk_is_named() -> None:
    fast = ["", 0.01, 0.01]
    slow = judge_rates(PLACES, [fast, fast, ["", 8.0, 0.01], fast])
    assert slow.status == "warn" and "writes 1.0 MiB/s (rank 2 on n1)" in slow.found
    broken = judge_rates(
        PLACES, [fast, ["No space left on device", None, None], fast, fast]
    )
    assert broken.status == "fail" and "rank 1 on n0 cannot write" in broken.found


def test_a_report_fails_with_any_failure_and_hides_secrets() -> None:
    shown: list[CheckResult] = []
    report = Report(shown.append)
    report.add(
        CheckResult("a", "ok", "well"), CheckResult("b", "warn", "hm", "repair it")
    )
    assert report.exit_code == 0
    secret = "https://oapi.dingtalk.com/robot/send?access_token=0123456789abcdef0123"
    report.add(CheckResult("c", "fail", f"cannot reach {secret}", "x\x1b[2J"))
    assert report.exit_code == 1 and len(shown) == 3
    assert "0123456789abcdef" not in report.as_json() + shown[-1].line()
    assert "\x1b" not in shown[-1].line()
    document = json.loads(report.as_json(ranks=4))
    assert (document["exit_code"], document["ranks"]) == (1, 4)
    assert [check["status"] for check in document["checks"]] == ["ok", "warn", "fail"]
    assert report.summary() == "3 checks: 1 failed, 1 warned"


def test_many_ranks_are_not_all_listed() -> None:
    places = [RankPlace(number, "n") for number in range(1000)]
    result = judge_listing("tokenizer", "/t", [""] * 1000, places)
    assert result.found.endswith("rank 3 on n and 996 more")
