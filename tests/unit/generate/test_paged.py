"""Decoding with keys and values in pages, against passes over all tokens and against the cache in rows."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.rope import RopeScaling
from evomesh.errors import UserError
from evomesh.generate import engine as engine_module
from evomesh.generate import paged_attention, paged_decoding, step_graph
from evomesh.generate.decode import generate_tokens
from evomesh.generate.engine import GeneratedToken, GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.generate.paged_attention import PagedRows, attend_to_pages, fault_of_kernel
from evomesh.generate.paged_cache import PAGE_SIZE, PagedCache
from evomesh.generate.paged_decoding import (
    PagedDecoding,
    PagedSettings,
    RowDecoding,
    check_paged,
    choose_decoding,
)
from evomesh.generate.staged import StagedModel
from evomesh.generate.step_graph import GraphCapture, Step, run_eagerly
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.decoder import Decoder
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.grid import Axis
from tests.support import paged_kernel
from tests.support.decoders import VOCAB, tiny, uncached_greedy
from tests.support.host_reads import no_host_waits
from tests.support.pretend_device import pretend_device

CPU = torch.device("cpu")
GREEDY = SamplingParams(do_sample=False, max_new_tokens=12)
SMALL_PAGE = 4

MODELS: list[dict[str, Any]] = [
    {},
    {"num_kv_attention_heads": 4},
    {"num_kv_attention_heads": 1, "query_pre_attn_scalar": 20.0},
    {"model_type": "MISTRAL", "sliding_window": 6},
    {
        "model_type": "QWEN2",
        "no_bias": False,
        "o_bias": False,
        "sliding_window": 9,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    {"model_type": "SMOLLM3", "nope_layers": (1,), "sliding_window": 4},
    {"use_dynamic_ntk_rope": True, "max_position_embeddings": 8},
]


@pytest.fixture(autouse=True)
def docstring_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", paged_kernel.varlen_attn
    )


def settings(**changes: Any) -> PagedSettings:
    usual = PagedSettings(attend_to_pages, strict_capture, page_size=SMALL_PAGE)
    return replace(usual, **changes)


def strict_capture(step: Step) -> Step:
    """Stand in for a graph: whatever a replay would not see changes nothing, and a look at the host raises.

    A replay reads the tensors that the capture read, at the addresses they had then.
    """
    owner: Any = step.__self__  # type: ignore[attr-defined]
    pools = owner._cache._pools
    addresses = {
        layer: [pool.data_ptr() for pool in both] for layer, both in pools.items()
    }
    inputs = owner.inputs.data_ptr()

    def replay() -> Tensor:
        assert owner.inputs.data_ptr() == inputs
        for layer, both in pools.items():
            assert [pool.data_ptr() for pool in both] == addresses[layer]
        with pretend_device() as device:
            logits = step()
        assert device.copies == []
        return logits

    return replay


@pytest.fixture
def in_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let engines decode in pages, with settings that may be changed."""

    def install(**changes: Any) -> None:
        def chosen(
            model: LanguageModel, slots: int, length: int, *_: object
        ) -> PagedDecoding:
            return PagedDecoding(model, slots, length, CPU, settings(**changes))

        monkeypatch.setattr(engine_module, "choose_decoding", chosen)

    # The first step of a number of rows is a replay already.
    monkeypatch.setattr(paged_decoding, "CAPTURED_AFTER", 1)
    install()
    yield install


def check_pages(cache: PagedCache) -> None:
    """Every page is free or belongs to one sequence, and no sequence has more than its tokens fill."""
    used = [page for table in cache.tables for page in table]
    assert sorted(used + cache._free) == list(range(1, cache.pages + 1))
    for length, table in zip(cache.lengths, cache.tables, strict=True):
        assert len(table) == -(-length // cache.page_size)


@pytest.mark.parametrize("changes", MODELS)
def test_logits_equal_uncached_logits_whatever_the_sequences_do(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of a page less one token, a page, and one more; a third sequence joins two, the first leaves."""
    monkeypatch.setattr(paged_decoding, "CAPTURED_AFTER", 2)
    model = tiny(**changes)
    draw = torch.Generator().manual_seed(0)
    total = 24
    rows = [torch.randint(VOCAB, (total,), generator=draw).tolist() for _ in range(4)]
    lengths = [SMALL_PAGE - 1, SMALL_PAGE, SMALL_PAGE + 1, 2 * SMALL_PAGE + 2]

    def expected(row: int, length: int) -> Tensor:
        # Keys keep the angles of the length at which they were computed.
        states = [
            model(torch.tensor(rows[row][:end]), single_sequence(end))[-1:]
            for end in (length,)
        ]
        return model.logits(states[0])[0]

    if changes.get("use_dynamic_ntk_rope"):
        reference = RowDecoding(model, 4, total, CPU)
    else:
        reference = None

    decoding = PagedDecoding(model, 4, total, CPU, settings())
    decoders = [one for one in (decoding, reference) if one is not None]
    slots: list[int] = []

    def read(new: list[int]) -> None:
        packed = [token for row in new for token in rows[row][: lengths[row]]]
        for decoder in decoders:
            docs, attend = decoder.cache.prefill([lengths[row] for row in new], CPU)
            model(torch.tensor(packed), docs, attend)
        slots.extend(new)

    def go_on(steps: int) -> None:
        for _ in range(steps):
            tokens = [rows[row][lengths[row]] for row in slots]
            got = decoding.next_logits(tokens)
            check_pages(decoding.cache)
            for row in slots:
                lengths[row] += 1
            if reference is None:
                wanted = torch.stack([expected(row, lengths[row]) for row in slots])
            else:
                wanted = reference.next_logits(tokens)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)

    def drop(slot: int) -> None:
        for decoder in decoders:
            decoder.cache.release(slot)
        slots[slot] = slots[-1]
        slots.pop()

    with torch.inference_mode():
        read([0, 1])
        go_on(3)
        read([2])
        go_on(2)
        drop(0)
        go_on(3)
        read([3])
        go_on(3)
        drop(1)
        drop(1)
        go_on(3)


def drain(engine: GenerationEngine) -> dict[int, list[GeneratedToken]]:
    made = defaultdict(list)
    while engine.active:
        for token in engine.step():
            made[token.request].append(token)
        assert isinstance(engine.cache, PagedCache)
        check_pages(engine.cache)
    return made


def ids(tokens: list[GeneratedToken]) -> list[int]:
    return [token.id for token in tokens]


PROMPTS = [[3, 7, 11], [20], [5, 4, 3, 2, 1, 9, 30], [8, 8], [1, 2, 3, 4], [6] * 9]


# None: as many as all slots need; 10: what one request may need, and no more.
@pytest.mark.parametrize("pages", [None, 15, 10])
def test_requests_that_come_and_go_get_their_own_greedy_tokens(
    in_pages: Callable[..., None], pages: int | None
) -> None:
    in_pages(pages=pages)
    model = tiny()
    engine = GenerationEngine(model, slots=3, context_length=40)
    lengths = [12, 3, 20, 9, 25, 7]
    numbers = []
    made: dict[int, list[GeneratedToken]] = defaultdict(list)
    for prompt, length in zip(PROMPTS, lengths, strict=True):
        request = replace(GREEDY, max_new_tokens=length)
        numbers.append(engine.add(prompt, request, (0, 0)))
        for token in engine.step():
            made[token.request].append(token)
    for request, tokens in drain(engine).items():
        made[request] += tokens
    for number, prompt, length in zip(numbers, PROMPTS, lengths, strict=True):
        assert ids(made[number]) == uncached_greedy(model, prompt, length)
    assert engine.cache.lengths == []


def test_requests_wait_for_pages_and_the_newest_gives_way(
    in_pages: Callable[..., None],
) -> None:
    """Four pages: two requests of one page each, which both grow into a third and a fourth."""
    in_pages(pages=5)
    model = tiny()
    engine = GenerationEngine(model, slots=3, context_length=20)
    wanted = replace(GREEDY, max_new_tokens=14)
    first = engine.add([3, 7, 11], wanted, (0, 0))
    second = engine.add([20, 4, 9], wanted, (0, 0))
    third = engine.add([1, 2, 3], wanted, (0, 0))
    made: dict[int, list[GeneratedToken]] = defaultdict(list)
    waiting = []
    finished = []
    while engine.active:
        for token in engine.step():
            made[token.request].append(token)
            if token.finish:
                finished.append(token.request)
        waiting.append(engine.waiting)
    for number, prompt in (
        (first, [3, 7, 11]),
        (second, [20, 4, 9]),
        (third, [1, 2, 3]),
    ):
        assert ids(made[number]) == uncached_greedy(model, prompt, 14)
    # The second one had begun, and waited for the end of the first.
    assert finished == [first, second, third]
    assert max(waiting) == 2 and waiting[0] < 2


def test_draws_are_those_of_rows(in_pages: Callable[..., None]) -> None:
    model = tiny()
    drawn = SamplingParams(temperature=1.5, top_p=0.9, max_new_tokens=10, logprobs=2)
    paged = GenerationEngine(model, slots=4, context_length=40)
    rows = GenerationEngine(model, slots=4, context_length=40)
    rows.decoding = RowDecoding(model, 4, 40, CPU)
    for engine in (paged, rows):
        for number, prompt in enumerate(PROMPTS):
            engine.add(prompt, drawn, (7, number))
    while rows.active:
        for ours, theirs in zip(paged.step(), rows.step(), strict=True):
            assert (ours.request, ours.id) == (theirs.request, theirs.id)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-12)
    assert not paged.active


def test_requests_that_outgrow_the_short_factors_are_read_again(
    in_pages: Callable[..., None],
) -> None:
    # Tables of longrope are made of Python numbers: no graph.
    in_pages(capture=run_eagerly)
    scaling = RopeScaling(
        type="longrope",
        short_factor=(1.0, 1.2, 1.4, 1.6),
        long_factor=(1.0, 3.0, 6.0, 9.0),
        original_max_position_embeddings=9,
    )
    model = tiny(rope_scaling=scaling, max_position_embeddings=64)
    assert not paged_decoding.can_capture(model)
    assert paged_decoding.can_capture(tiny())
    engine = GenerationEngine(model, slots=2, context_length=40)
    prompts = [[3, 7, 11], list(range(9)), [5, 4, 3, 2, 1, 9, 30]]
    numbers = [engine.add(prompt, GREEDY, (0, 0)) for prompt in prompts]
    made = drain(engine)
    for number, prompt in zip(numbers, prompts, strict=True):
        assert ids(made[number]) == uncached_greedy(model, prompt, 12)


def test_a_bad_request_leaves_nothing_to_the_next(
    in_pages: Callable[..., None],
) -> None:
    model = tiny()
    with torch.no_grad():
        model.embedding.weight[9] = float("nan")
    engine = GenerationEngine(model, slots=1, context_length=20)
    engine.add([9], replace(GREEDY, max_new_tokens=6), (0, 0))
    after = engine.add([3], replace(GREEDY, max_new_tokens=6), (0, 0))
    assert ids(drain(engine)[after]) == uncached_greedy(model, [3], 6)
    # Page 0, of empty rows, is left out.
    for pools in engine.cache._pools.values():
        assert not any(pool[1:].any() for pool in pools)


def test_the_number_of_rows_is_a_power_of_two_and_each_is_captured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_decoding, "CAPTURED_AFTER", 3)
    captured = []

    def capture(step: Step) -> None:
        captured.append(step.__self__.inputs.shape[0])  # type: ignore[attr-defined]

    model = tiny()
    decoding = PagedDecoding(model, 6, 40, CPU, settings(capture=capture))
    with torch.inference_mode():
        for count in (1, 2, 2, 1):
            docs, attend = decoding.cache.prefill([2] * count, CPU)
            model(torch.ones(2 * count, dtype=torch.long), docs, attend)
            for _ in range(4):
                logits = decoding.next_logits([1] * len(decoding.cache.lengths))
                assert logits.shape == (len(decoding.cache.lengths), VOCAB)
    assert captured == [1, 4, 6]
    assert decoding.cache.size_in_bytes() == 2 * 2 * (1 + 6 * 10) * 4 * 2 * 8 * 8


@pytest.mark.parametrize(("slots", "lengths"), [(1, [2, 2]), (2, [2, 9]), (3, [4, 5])])
def test_no_room(slots: int, lengths: list[int]) -> None:
    cache = PagedCache(slots, 8, page_size=4, pages=2)
    with pytest.raises(ValueError, match="no room"):
        cache.prefill(lengths, CPU)
    with pytest.raises(ValueError, match="hold no sequence"):
        PagedCache(2, 9, page_size=4, pages=2)


# --------------------------------------------------------------------------- the graph


class FakeGraph:
    """Launches the step that is captured; ``error`` is added to its logits."""

    error = 0.0

    def __init__(self) -> None:
        self.logits = torch.zeros(())
        self.launch: Step = lambda: self.logits

    def replay(self) -> None:
        self.logits.copy_(self.launch() + self.error)


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    """Capture on the CPU: what a graph was made of runs again when it is replayed."""

    class Graph(FakeGraph):
        pass

    captured: list[Graph] = []

    @contextmanager
    def capture(
        graph: Graph, pool: object, stream: object, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        Graph.pools.append(pool)  # type: ignore[attr-defined]
        captured.append(graph)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    failed: list[Graph] = []
    monkeypatch.setattr(step_graph, "_failed_graphs", lambda: failed)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    Graph.captured = captured  # type: ignore[attr-defined]
    Graph.pools = []  # type: ignore[attr-defined]
    return Graph


def test_a_graph_that_computes_the_same_is_replayed(
    fake_graphs: type[FakeGraph], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = torch.tensor([1.0, torch.nan])
    runs = []

    def step() -> Tensor:
        runs.append(1)
        logits = inputs * 2
        if len(runs) == 3:  # captured
            [graph] = fake_graphs.captured  # type: ignore[attr-defined]
            graph.logits = logits
            graph.launch = lambda: inputs * 2
        return logits

    replay = GraphCapture()(step)
    assert replay is not None
    assert len(runs) == 3 and not caplog.records
    inputs[0] = 5.0
    assert float(replay()[0]) == 10.0
    assert len(runs) == 3


def test_a_graph_that_computes_something_else_is_not_used(
    fake_graphs: type[FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def step() -> Tensor:
        return torch.tensor([3.0, -4.0])

    # A replay that leaves the tensor of the capture as it was is right here; an error is not.
    monkeypatch.setattr(fake_graphs, "error", 0.1)
    logits = step()

    def captured_step() -> Tensor:
        if fake_graphs.captured:  # type: ignore[attr-defined]
            fake_graphs.captured[0].logits = logits  # type: ignore[attr-defined]
            return logits
        return step()

    assert GraphCapture()(captured_step) is None
    [record] = caplog.records
    assert "it computes other logits" in record.getMessage()


class FailingCapture:
    """Ends like torch's: with another error, and before it has gone back to the stream from before it."""

    def __init__(self, graph: object, **_: object) -> None:
        pass

    def __enter__(self) -> None:
        torch.cuda.set_stream("of the capture")  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("capture_end: the capture is invalid")


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_no_other_is_captured(
    fake_graphs: type[FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    current = torch.cuda.current_stream()
    streams: list[object] = [current]
    left: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "graph", FailingCapture)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda _, pool: left.append(pool), raising=False
        )
    runs = []

    def step() -> Tensor:
        runs.append(1)
        if streams[-1] == "of the capture":
            raise RuntimeError("not permitted when stream is capturing\nCUDA ...")
        return torch.ones(2)

    assert GraphCapture()(step) is None
    assert len(runs) == 3
    assert streams[-1] is current
    assert len(left) == 2 and left[0] is left[1]
    [record] = caplog.records
    assert "(not permitted when stream is capturing)" in record.getMessage()
    # Another number of rows, or another engine.
    assert GraphCapture()(step) is None
    assert len(runs) == 3 and len(caplog.records) == 1


def test_the_graphs_of_an_engine_share_their_memory(
    fake_graphs: type[FakeGraph],
) -> None:
    capture = GraphCapture()
    for make in (capture, capture, GraphCapture()):
        make(lambda: torch.ones(2))
    first, second, other = fake_graphs.pools  # type: ignore[attr-defined]
    assert first is second and other is not first


@pytest.mark.parametrize("capture", [run_eagerly, lambda _: lambda: torch.ones(1, 9)])
def test_a_discarded_engine_frees_its_pages_at_once(
    in_pages: Callable[..., None], capture: Any
) -> None:
    in_pages(capture=capture)
    engine = GenerationEngine(tiny(), slots=2, context_length=20)
    engine.add([3, 7], GREEDY, (0, 0))
    gc.disable()
    try:
        for _ in range(3):
            engine.step()
        cache = weakref.ref(engine.cache)
        assert cache() is not None
        del engine
        assert cache() is None
    finally:
        gc.enable()


# -------------------------------------------------------------------------- the kernel


def wrong_page(*args: Any) -> Tensor:
    q, keys, values, rows, *rest = args
    return attend_to_pages(
        q, keys, values, replace(rows, tables=rows.tables.flip(1)), *rest
    )


def stale_length(*args: Any) -> Tensor:
    q, keys, values, rows, *rest = args
    return attend_to_pages(
        q, keys, values, replace(rows, lengths=rows.lengths - 1), *rest
    )


def no_window(*args: Any) -> Tensor:
    return attend_to_pages(*args[:4], None, args[5])


def no_scale(*args: Any) -> Tensor:
    return attend_to_pages(*args[:5], None)


def no_number(*args: Any) -> Tensor:
    return attend_to_pages(*args) * torch.nan


def refusal(*args: Any) -> Tensor:
    raise RuntimeError("Paged KV cache block size must be divisible by 256\nat ...")


WINDOWED = {
    "model_type": "MISTRAL",
    "sliding_window": 300,
    "query_pre_attn_scalar": 20.0,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("changes", [{}, WINDOWED, {"num_kv_attention_heads": 4}])
def test_a_right_kernel_has_no_fault(dtype: str, changes: dict[str, Any]) -> None:
    model = tiny(dtype=dtype, **changes)
    assert fault_of_kernel(attend_to_pages, model, CPU) == ""


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (wrong_page, "differs from dense attention"),
        (stale_length, "differs from dense attention"),
        (no_window, "differs from dense attention"),
        (no_scale, "differs from dense attention"),
        (no_number, "differs from dense attention by nan"),
        (refusal, "it fails: Paged KV cache block size must be divisible by 256"),
    ],
)
def test_the_faults_of_a_kernel_are_found(
    kernel: Callable[..., Tensor], words: str
) -> None:
    model = tiny(dtype="bfloat16", **WINDOWED)
    fault = fault_of_kernel(kernel, model, CPU)
    assert fault.startswith(words) or f" {words}" in fault, fault


def test_too_little_memory_is_no_fault_of_the_kernel() -> None:
    def hungry(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fault_of_kernel(hungry, tiny(), CPU)


@pytest.mark.parametrize("broken", [False, True])
def test_a_kernel_that_leaves_the_gpu_unusable_ends_the_process(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize(device: torch.device) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access")

    def fail(*_: object) -> float:
        raise RuntimeError("")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(paged_attention, "_difference", fail)
    device = torch.device("cuda")
    if not broken:
        found = fault_of_kernel(attend_to_pages, tiny(), device)
        assert found == "it fails: RuntimeError"
        return
    with pytest.raises(UserError, match="cannot use cuda any more") as error:
        fault_of_kernel(attend_to_pages, tiny(), device)
    assert "--paged off" in str(error.value.fix)


def test_pages_have_the_size_that_the_kernel_takes() -> None:
    assert PAGE_SIZE % 256 == 0


# -------------------------------------------------------------------------- the choice


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where nothing speaks against pages."""
    monkeypatch.setattr(paged_decoding, "reason_against_pages", lambda *_: "")


def test_a_right_kernel_is_used_unless_switched_off(usable: None) -> None:
    model = tiny(dtype="bfloat16")
    for paged in ("auto", "on"):
        assert isinstance(choose_decoding(model, 2, 20, paged), PagedDecoding)
    assert isinstance(choose_decoding(model, 2, 20, "off"), RowDecoding)
    few = choose_decoding(model, 8, 600, "auto", pages=3)
    assert isinstance(few, PagedDecoding) and few.cache.free_pages == 3
    with pytest.raises(UserError, match="2 pages of 256 tokens hold no sequence"):
        choose_decoding(model, 8, 600, "auto", pages=2)
    # Rows have none.
    choose_decoding(model, 8, 600, "off", pages=2)


def test_a_wrong_kernel_is_warned_of_and_not_used(
    usable: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(paged_decoding, "attend_to_pages", stale_length)
    model = tiny(dtype="bfloat16")
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_decoding(model, 2, 20, "auto"), RowDecoding)
    [record] = caplog.records
    assert "differs from dense attention" in record.getMessage()
    with pytest.raises(UserError, match="cannot be relied on") as error:
        choose_decoding(model, 2, 20, "on")
    assert error.value.code == "EVO-GEN-005"
    # A server asks before it answers anyone.
    with pytest.raises(UserError, match="cannot be relied on"):
        check_paged(model, "on")
    check_paged(model, "auto")
    assert len(caplog.records) == 1


def test_models_without_a_kernel_say_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = paged_attention.reason_against_pages
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    capped = {"attn_logit_softcapping": 5.0}
    assert reason(tiny(dtype="bfloat16"), cuda) == ""
    assert reason(tiny(), CPU) == "it is on cpu"
    assert "not 16-bit" in reason(tiny(dtype="float32"), cuda)
    assert "capped" in reason(tiny(dtype="bfloat16", **capped), cuda)
    assert "12 columns" in reason(tiny(dtype="bfloat16", head_dim=12), cuda)
    assert "its own" in reason(torch.nn.Linear(2, 2), cuda)
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda query, window_size: query
    )
    assert "no block table" in reason(tiny(dtype="bfloat16"), cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "older" in reason(tiny(dtype="bfloat16"), cuda)

    assert isinstance(choose_decoding(tiny(), 2, 20, "auto"), RowDecoding)
    assert not caplog.records
    with pytest.raises(UserError, match="it is on cpu"):
        choose_decoding(tiny(), 2, 20, "on")


@pytest.mark.parametrize("changes", MODELS)
def test_a_step_asks_nothing_of_the_host(changes: dict[str, Any]) -> None:
    """Of a device without values: what a graph could not record raises, copies of Python numbers included."""
    meta = torch.device("meta")
    model = tiny(**changes, dtype="bfloat16").to(meta)
    decoding = PagedDecoding(model, 4, 20, meta, settings(capture=run_eagerly))
    with torch.inference_mode():
        decoding.cache.prefill([5], meta)
        decoding.next_logits([1])
        with no_host_waits():
            logits = decoding._steps[1].compute()
    assert logits.shape == (1, VOCAB)


def test_empty_rows_change_nothing() -> None:
    """The kernel sees empty rows as sequences of one token, in the page that belongs to nobody."""
    seen: list[PagedRows] = []

    def kernel(*args: Any) -> Tensor:
        seen.append(args[3])
        return attend_to_pages(*args)

    model = tiny()
    decoding = PagedDecoding(
        model, 4, 20, CPU, settings(kernel=kernel, capture=run_eagerly)
    )
    with torch.inference_mode():
        docs, attend = decoding.cache.prefill([5, 2, 3], CPU)
        model(torch.arange(10), docs, attend)
        decoding.next_logits([1, 2, 3])
    rows = seen[0]
    assert rows.lengths.tolist() == [6, 3, 4, 1]
    assert rows.tables[3].tolist() == [0] * 5
    assert rows.longest == 20


def test_a_beam_search_has_no_pages() -> None:
    beams = SamplingParams(num_beams=2, max_new_tokens=3)
    with pytest.raises(UserError, match="beam search does not keep"):
        generate_tokens(tiny(), [[3, 7]], beams, paged="on")
    assert generate_tokens(tiny(), [[3, 7]], beams, paged="auto")


def test_pages_are_off_unless_asked_for(usable: None) -> None:
    model = tiny(dtype="bfloat16")
    for paged, kind in ({}, RowDecoding), ({"paged": "auto"}, PagedDecoding):
        engine = GenerationEngine(model, slots=2, context_length=20, **paged)  # type: ignore[arg-type]
        assert isinstance(engine.decoding, kind)


def test_a_model_on_several_ranks_has_rows(usable: None) -> None:
    """Each rank would choose for itself, and the shapes of their messages would differ."""
    model = tiny(dtype="bfloat16")
    config: Any = model.config
    staged = StagedModel(model, Axis("pp", 2), config)
    split = tiny(dtype="bfloat16")
    for layer in paged_attention.attention_layers(split):
        layer.placement = replace(layer.placement, axis=Axis("tp", 2))
    for distributed in (staged, split):
        assert isinstance(choose_decoding(distributed, 2, 20, "auto"), RowDecoding)
        with pytest.raises(UserError, match="distributed over several processes"):
            choose_decoding(distributed, 2, 20, "on")
        with pytest.raises(UserError, match="distributed over several processes"):
            check_paged(distributed, "on")


@pytest.mark.parametrize(("length", "kind"), [(300, PagedDecoding), (301, RowDecoding)])
def test_windows_shorter_than_the_context_have_rows_unless_asked_for(
    usable: None, length: int, kind: type
) -> None:
    model = tiny(dtype="bfloat16", **WINDOWED)
    assert type(choose_decoding(model, 2, length, "auto")) is kind
    assert isinstance(choose_decoding(model, 2, length, "on"), PagedDecoding)


def test_a_model_of_a_user_is_not_captured() -> None:
    """What it does in Python would happen once."""

    class Counting(Decoder):
        pass

    model = tiny()
    assert paged_decoding.can_capture(model)
    model.__class__ = Counting
    assert not paged_decoding.can_capture(model)
