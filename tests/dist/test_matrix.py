"""Every layout trains like one process: losses, every gradient, and the parameters after three steps, in float64."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from evomesh.layers.block_softmax import PLAIN, LossTerms
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.modes import MODES as MODE_OF
from evomesh.train.stages import build_stages
from tests.dist.layouts import (
    FAMILIES,
    RATE,
    SEED,
    Layout,
    Trained,
    forward_backward,
    join,
    packs,
    train,
)
from tests.support.covers import covers
from tests.support.pool import Pool, grid_of
from tests.support.tolerances import FIRST_LOSS, LAYOUT, assert_close, assert_equal_bits

pytestmark = covers("promise:tensor-modes", "promise:weight-overlap")

# The families that take part in every combination; the others are these with other switches, see FAMILY.
EVERYWHERE = ("internlm", "internlm2", "llama", "post_norm")
MODES = [
    Layout(tensor=tensor, mode=mode, ranks=ranks, family=family)
    for mode in ("mtp", "msp", "fsp", "isp")
    for tensor, ranks in ((2, 2), (2, 4), (4, 4))
    for family in EVERYWHERE
]
VARIANTS = [
    Layout(),
    Layout(ranks=2, family="internlm"),
    *(
        Layout(tensor=4, mode=mode, model={"embed_split_hidden": True})
        for mode in ("mtp", "fsp")
    ),
    *(
        Layout(tensor=2, mode=mode, model={"parallel_output": False})
        for mode in ("mtp", "msp")
    ),
    *(Layout(tensor=4, mode=mode, smoothing=0.1) for mode in ("mtp", "fsp")),
    *(
        Layout(tensor=2, mode=mode, model={"checkpoint": 0.5})
        for mode in ("mtp", "msp", "fsp", "isp")
    ),
    Layout(tensor=2, mode="msp", model={"use_swiglu": False}),
    Layout(tensor=2, mode="fsp", model={"residual_in_fp32": True}),
]


PIPELINES = [
    *(
        Layout(pipeline=pp, ranks=ranks, family=family)
        for pp, ranks in ((2, 2), (2, 4), (4, 4))
        for family in EVERYWHERE
    ),
    Layout(pipeline=4, packs=2),
    Layout(pipeline=4, packs=1),
    Layout(pipeline=2, ranks=2, model={"num_layers": 5}),
    Layout(
        pipeline=4, model={"num_layers": 7}, parallel={"pipeline": {"balance": True}}
    ),
    Layout(pipeline=2, ranks=2, chunks=2),
    Layout(pipeline=2, chunks=2, packs=8),
    Layout(pipeline=2, chunks=2, family="internlm", model={"num_layers": 7}),
    Layout(pipeline=4, chunks=2, model={"num_layers": 8}),
    Layout(pipeline=2, ranks=2, chunks=2, schedule="zbv"),
    Layout(
        pipeline=4,
        chunks=2,
        schedule="zbv",
        model={"num_layers": 8},
        family="internlm2",
    ),
    *(
        Layout(tensor=2, mode=mode, pipeline=2, family=family)
        for mode in ("mtp", "msp", "fsp", "isp")
        for family in ("internlm", "internlm2")
    ),
    *(
        Layout(tensor=2, mode=mode, pipeline=2, chunks=2)
        for mode in ("mtp", "msp", "fsp", "isp")
    ),
    *(
        Layout(tensor=2, mode=mode, pipeline=2, chunks=2, schedule="zbv")
        for mode in ("mtp", "msp")
    ),
    Layout(tensor=2, mode="mtp", pipeline=2, model={"checkpoint": 1.0}),
]
WEIGHTS = [
    Layout(mode="isp", weight=2, ranks=2),
    Layout(mode="isp", weight=4, family="internlm"),
    Layout(mode="isp", weight=2, zero1=2, family="internlm2"),
    Layout(tensor=2, mode="isp", weight=2, family="internlm"),
    Layout(tensor=2, mode="isp", weight=4),
    Layout(tensor=4, mode="isp", weight=2, family="internlm2"),
    Layout(tensor=4, mode="isp", weight=4, family="post_norm"),
    Layout(tensor=2, mode="isp", weight=4, parallel={"weight": {"overlap": True}}),
    *(
        Layout(
            tensor=2,
            mode="isp",
            weight=4,
            family=family,
            parallel={"weight": {"overlap": True, key: value}},
        )
        for family, key, value in (
            ("llama", "launch_allgather_before", "attn"),
            ("internlm", "launch_allgather_before", "wqkv"),
            ("internlm2", "forward_overlap_per", "module"),
        )
    ),
    Layout(
        mode="isp",
        weight=2,
        family="qwen3",
        model={"checkpoint": 1.0, "use_fp32_norm": True},
        parallel={"weight": {"overlap": True, "forward_overlap_per": "module"}},
        adam=True,
    ),
    Layout(tensor=2, mode="isp", weight=4, model={"checkpoint": 0.5}),
    Layout(tensor=2, mode="isp", weight=2, pipeline=2),
    Layout(mode="isp", weight=2, pipeline=2, chunks=2),
    Layout(
        tensor=2, mode="isp", weight=2, pipeline=2, chunks=2, model={"checkpoint": 1.0}
    ),
]
ZERO = [
    Layout(adam=True),
    Layout(zero1=2, adam=True, family="internlm"),
    *(
        Layout(tensor=2, mode=mode, adam=True, family="internlm2")
        for mode in ("mtp", "msp", "fsp", "isp")
    ),
    Layout(mode="isp", weight=2, adam=True),
    Layout(tensor=2, mode="isp", weight=4, adam=True),
    Layout(pipeline=2, adam=True),
    Layout(pipeline=2, tensor=2, mode="msp", chunks=2, adam=True),
    Layout(pipeline=2, chunks=2, schedule="zbv", adam=True),
]
CUT = {"zero1": {"fsdp": True}}
FSDP = [
    Layout(parallel=CUT),
    Layout(ranks=2, parallel=CUT, family="internlm"),
    Layout(zero1=2, parallel=CUT, family="internlm2"),
    *(Layout(tensor=2, mode=mode, parallel=CUT, family=family) for mode in ("mtp", "msp", "fsp")
      for family in ("internlm", "internlm2")),
    Layout(tensor=2, parallel=CUT, model={"embed_split_hidden": True}),
    Layout(tensor=2, mode="msp", parallel=CUT, model={"checkpoint": 0.5}, family="post_norm"),
    Layout(pipeline=2, parallel=CUT),
    Layout(pipeline=2, chunks=2, parallel=CUT, packs=8),
    Layout(zero1=2, parallel=CUT, adam=True),
    Layout(tensor=2, mode="msp", parallel=CUT, adam=True, family="internlm2"),
    Layout(pipeline=2, parallel=CUT, adam=True),
]  # fmt: skip
SPLIT = {"tensor": 2, "ranks": 4}


def every_kind_of_layout(family: str) -> list[Layout]:
    """Return the tensor modes, pipelines, sharded weights, fsdp and the real optimizer, each at least once."""
    return [
        *(Layout(**SPLIT, mode=mode, family=family) for mode in ("mtp", "msp", "fsp", "isp")),
        Layout(tensor=2, mode="isp", weight=4, family=family),
        Layout(tensor=2, mode="mtp", pipeline=2, family=family),
        Layout(tensor=2, mode="msp", pipeline=2, chunks=2, family=family),
        *(Layout(tensor=2, mode=mode, adam=True, family=family) for mode in ("msp", "isp")),
        Layout(tensor=2, mode="mtp", parallel=CUT, adam=True, family=family),
    ]  # fmt: skip


FAMILY = [
    *(
        Layout(**SPLIT, mode=mode, family="qwen3")
        for mode in ("mtp", "msp", "fsp", "isp")
    ),
    *(Layout(**SPLIT, mode=mode, family="qwen2") for mode in ("mtp", "fsp", "isp")),
    Layout(tensor=2, mode="isp", weight=4, family="qwen3"),
    Layout(tensor=2, mode="mtp", pipeline=2, family="qwen3"),
    Layout(tensor=2, mode="msp", pipeline=2, chunks=2, family="qwen2"),
    *(
        Layout(tensor=2, mode=mode, adam=True, family="qwen3")
        for mode in ("mtp", "msp", "isp")
    ),
    Layout(tensor=2, mode="mtp", parallel=CUT, family="qwen3"),
    Layout(tensor=2, mode="mtp", parallel=CUT, adam=True, family="qwen3"),
    Layout(mode="isp", weight=2, adam=True, family="qwen2"),
    *(Layout(**SPLIT, mode=mode, family="mistral") for mode in ("mtp", "fsp")),
    Layout(tensor=2, mode="msp", pipeline=2, family="mistral"),
    Layout(tensor=2, mode="isp", weight=2, family="mistral", adam=True),
    Layout(tensor=4, mode="isp", family="llama3"),
    Layout(tensor=2, mode="mtp", pipeline=2, family="llama3"),
    *every_kind_of_layout("olmo2"),
    *every_kind_of_layout("internlm3"),
    *every_kind_of_layout("phi3"),
    *every_kind_of_layout("smollm3"),
    *every_kind_of_layout("baichuan2"),
    *every_kind_of_layout("gemma"),
    *every_kind_of_layout("gemma2"),
    *every_kind_of_layout("gemma3"),
]
TIED = [
    *(Layout(**SPLIT, mode=mode, family="tied") for mode in ("mtp", "msp", "fsp", "isp")),
    *(Layout(tensor=2, mode=mode, pipeline=2, family="tied") for mode in ("mtp", "msp", "fsp", "isp")),
    Layout(pipeline=4, family="tied"),
    Layout(pipeline=2, chunks=2, family="tied"),
    Layout(pipeline=2, chunks=2, schedule="zbv", family="tied"),
    Layout(pipeline=4, family="tied", model={"checkpoint": 1.0}),
    Layout(tensor=2, mode="isp", weight=4, family="tied"),
    Layout(tensor=2, mode="isp", weight=2, pipeline=2, family="tied"),
    Layout(parallel=CUT, family="tied"),
    Layout(pipeline=2, parallel=CUT, family="tied"),
    *(Layout(pipeline=pp, zero1=zero1, adam=True, family="tied") for pp, zero1 in ((1, 2), (2, -1), (2, 1), (4, -1))),
    Layout(tensor=2, mode="isp", pipeline=2, adam=True, family="tied"),
    Layout(tensor=2, mode="msp", pipeline=2, chunks=2, adam=True, family="tied"),
    Layout(pipeline=2, chunks=2, schedule="zbv", adam=True, family="tied"),
    Layout(pipeline=2, parallel=CUT, adam=True, family="tied"),
]  # fmt: skip
STABILITY = [
    *(Layout(**SPLIT, mode=mode, z_loss=0.1) for mode in ("mtp", "msp", "fsp", "isp")),
    Layout(tensor=2, mode="msp", pipeline=2, chunks=2, z_loss=0.1, smoothing=0.1, family="tied"),
    Layout(pipeline=2, z_loss=0.1, adam=True, family="internlm2"),
    *(Layout(**SPLIT, mode=mode, model={"qk_norm": True}, family=family)
      for mode, family in (("mtp", "internlm"), ("msp", "internlm2"), ("fsp", "post_norm"), ("isp", "llama"))),
    Layout(tensor=2, mode="mtp", pipeline=2, model={"qk_norm": True}, family="qwen2"),
    Layout(tensor=2, mode="isp", weight=2, model={"qk_norm": True}, family="mistral", adam=True),
]  # fmt: skip
HIDDEN_DROPOUT = {"drop_rate": 0.2}
BOTH_DROPOUTS = {"drop_rate": 0.1, "attn_drop_rate": 0.3}
DROPOUT = [
    Layout(model=HIDDEN_DROPOUT),
    *(Layout(**SPLIT, mode=mode, model=BOTH_DROPOUTS) for mode in ("mtp", "msp", "fsp", "isp")),
    Layout(tensor=4, mode="isp", model=BOTH_DROPOUTS | {"checkpoint": 0.5}, family="mistral"),
    Layout(tensor=2, mode="msp", pipeline=2, chunks=2, model=BOTH_DROPOUTS | {"checkpoint": 1.0}, family="qwen2"),
    Layout(pipeline=2, chunks=2, schedule="zbv", model=HIDDEN_DROPOUT, family="post_norm"),
    Layout(tensor=2, mode="isp", weight=4, model=BOTH_DROPOUTS, adam=True),
    Layout(pipeline=2, parallel=CUT, model=BOTH_DROPOUTS),
]  # fmt: skip


def as_small_as_it_may_be(layout: Layout) -> Layout:
    """Return the layout with two layers and two micro-batches a rank, where more would add nothing.

    Stages of a pipeline share four layers and keep four micro-batches in flight, and
    weights are gathered for the next layer while one computes: these stay as they are.
    What tensor and data ranks do is the same in each layer; two have a first, a last and
    a border between layers, and two micro-batches add up their gradients.
    """
    has_stages = layout.pipeline > 1
    gathers_weights = layout.weight > 1 or layout.parallel
    if has_stages or gathers_weights or "num_layers" in layout.model:
        return layout
    data_ranks = layout.ranks // layout.tensor
    return replace(layout, layers=2, packs=min(layout.packs, 2 * data_ranks))


ALL = [
    as_small_as_it_may_be(layout)
    for layouts in (
        *(MODES, VARIANTS, PIPELINES, WEIGHTS, ZERO),
        *(FSDP, FAMILY, TIED, STABILITY, DROPOUT),
    )
    for layout in layouts
]


# Of the varied keys those that change the function that is trained.
FUNCTION = ("use_swiglu", "num_layers", "qk_norm", "drop_rate", "attn_drop_rate")


@functools.cache
def reference(
    family: str,
    layers: int,
    terms: LossTerms,
    packs: int,
    adam: bool,
    model: tuple[tuple[str, Any], ...],
) -> Trained:
    layout = Layout(
        ranks=1,
        family=family,
        layers=layers,
        smoothing=terms.label_smoothing,
        z_loss=terms.z_loss_coeff,
        packs=packs,
        adam=adam,
        model=dict(model),
    )
    return join([train(0, layout)])


def one_process(layout: Layout) -> Trained:
    """The same training without any layout: of the varied keys only those that change the model itself remain."""
    model = tuple(
        (key, value) for key, value in layout.model.items() if key in FUNCTION
    )
    return reference(
        layout.family, layout.layers, layout.terms, layout.packs, layout.adam, model
    )


@covers(
    "model.embed_split_hidden",
    "model.tie_word_embeddings",
    "parallel.pipeline.balance",
    "parallel.weight.overlap",
    "parallel.pipeline.schedule",
    "parallel.pipeline.mode",
    "parallel.pipeline.interleaved_overlap",
)
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_trains_like_one_process(pool: Pool, layout: Layout) -> None:
    whole, found = (
        one_process(layout),
        join(pool.run(train, layout, ranks=layout.ranks)),
    )
    for name, tensor in whole.initial.items():
        assert_equal_bits(found.initial[name], tensor, f"initial {name}")
    for step, (a, b) in enumerate(zip(found.losses, whole.losses, strict=True)):
        assert_close(
            torch.tensor(a, dtype=torch.float64),
            torch.tensor(b, dtype=torch.float64),
            LAYOUT,
            f"loss {step}",
        )
    for name, tensor in whole.gradients.items():
        assert_close(found.gradients[name], tensor, LAYOUT, f"gradient of {name}")
    for name, tensor in whole.final.items():
        assert_close(found.final[name], tensor, LAYOUT, f"{name} after three steps")


def test_the_matrix_is_large_and_the_page_counts_it() -> None:
    assert len({str(layout) for layout in ALL}) == len(ALL) >= 40
    page = (Path(__file__).parents[2] / "docs/parallelism.md").read_text()
    for name, number in re.findall(
        r"^\| .*\(`([A-Z]+)`\) \| (\d+) \|", page, re.MULTILINE
    ):
        assert len(globals()[name]) == int(number), name


def test_the_page_of_families_counts_their_layouts() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| [^|]*\|$", page, re.MULTILINE)
    counts = Counter(FAMILIES[layout.family]["model_type"] for layout in ALL)
    assert {name: int(number) for name, number in rows} == counts


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(zero1=2),
        Layout(ranks=2),
        Layout(pipeline=2),
        Layout(pipeline=4),
        Layout(pipeline=2, chunks=2),
    ],
    ids=str,
)
def test_first_loss_without_a_tensor_split_moves_in_the_last_bit_only(
    pool: Pool, layout: Layout
) -> None:
    found, whole = (
        join(pool.run(train, layout, ranks=layout.ranks)).losses[0],
        one_process(layout).losses[0],
    )
    assert abs(found - whole) <= FIRST_LOSS * abs(whole)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, mode="fsp", adam=True),
        Layout(tensor=2, mode="isp", weight=4, adam=True),
        Layout(tensor=2, pipeline=2, chunks=2, adam=True),
    ],
    ids=str,
)
def test_a_layout_repeats_to_the_bit(pool: Pool, layout: Layout) -> None:
    first, second = (join(pool.run(train, layout)) for _ in range(2))
    assert first.losses == second.losses
    for name, tensor in first.final.items():
        assert_equal_bits(second.final[name], tensor, name)


SIXTEEN_BITS = [
    {"schedule": "interleaved"},
    {"schedule": "zbv"},
    {"schedule": "zbv", "overlap": True},
]


def run_in_sixteen_bits(
    schedule: str, overlap: bool, family: str = "llama"
) -> ZeroOptimizer:
    """Run forward and backward of one step over two stages and two data ranks."""
    sizes = {"pipeline": 2, "chunks": 2, "schedule": schedule, "packs": 8}
    layout = Layout(**sizes, model={"dtype": "bfloat16"}, family=family)
    grid = grid_of(pipeline=2)
    stages = build_stages(layout.config, grid, MODE_OF["mtp"], torch.device("cpu"))
    stages.initialize(SEED, grid)
    config = layout.config
    zero = config.hybrid_zero_optimizer.model_copy(
        update={"overlap_sync_grad": overlap, "reduce_bucket_size": 4000}
    )
    optimizer = ZeroOptimizer(
        stages.parameters().items(), config.adam, zero, grid, stages.module
    )
    optimizer.expect_micro_batches(layout.packs // grid.dp.size)
    forward_backward(stages, layout, grid, 0)
    assert all(parameter.grad is None for parameter in stages.parameters().values())
    return optimizer


def in_sixteen_bits(
    rank: int, schedule: str, overlap: bool = False
) -> dict[str, torch.Tensor]:
    """The float32 gradients of this rank, not summed over ranks."""
    slots = run_in_sixteen_bits(schedule, overlap).slots
    return {
        slot.name: slot.gradient_rows().reshape(slot.local.shape).clone()
        for slot in slots
    }


def gradient_norm(rank: int, overlap: bool, family: str) -> float:
    """The norm over all ranks of the gradients that AdamW gets."""
    return run_in_sixteen_bits("zbv", overlap, family).step(RATE, 0.95, 1.0).grad_norm


def test_zbv_adds_up_16_bit_gradients_in_float32(pool: Pool) -> None:
    """After every micro-batch: to the bit what the interleaved pipeline sums, whose hooks are autograd's own."""
    found = []
    for options in SIXTEEN_BITS:
        ranks = pool.run(in_sixteen_bits, *options.values())
        found.append(
            {
                (rank % 2, name): g
                for rank, part in enumerate(ranks)
                for name, g in part.items()
            }
        )
    for one in found[1:]:
        assert one.keys() == found[0].keys()
        for key, gradient in one.items():
            assert_equal_bits(gradient, found[0][key], str(key))
    # in bfloat16 sums of four would have no more than 8 bits
    assert any(
        not torch.equal(g, g.to(torch.bfloat16).float()) for g in found[1].values()
    )


def test_zbv_waits_for_both_gradients_of_a_tied_embedding(pool: Pool) -> None:
    """One rank holds both ends: a bucket that is launched after the first would miss what the second adds."""
    plain, overlapped = (
        pool.run(gradient_norm, overlap, "tied") for overlap in (False, True)
    )
    assert plain == overlapped


def sharded_after_each(rank: int, layout: Layout) -> list[bool]:
    """Whether every block's weights were cut again, after each micro-batch that the last stage finished."""
    grid = grid_of(
        tensor=layout.tensor,
        mode=layout.mode,
        pipeline=layout.pipeline,
        weight=layout.weight,
    )
    stages = build_stages(
        layout.config, grid, MODE_OF[layout.mode], torch.device("cpu")
    )
    stages.initialize(SEED, grid)
    seen: list[bool] = []

    def look(*_: object) -> None:
        blocks = [
            module
            for module in stages.module.modules()
            if isinstance(module, FSDPModule)
        ]
        seen.append(
            all(
                isinstance(p, DTensor)
                for block in blocks[1:]
                for p in block.parameters()
            )
        )

    batch = packs(0, range(layout.packs))
    for block in stages.models[0].layers.values():
        block.register_forward_pre_hook(look, prepend=True)
    stages.schedule.train(
        batch, [1.0] * layout.packs, PLAIN, lambda index, output: None
    )
    return seen


@pytest.mark.parametrize("pipeline", [1, 2])
def test_weights_are_cut_again_between_blocks_and_micro_batches(
    pool: Pool, pipeline: int
) -> None:
    layout = Layout(mode="isp", weight=2, pipeline=pipeline)
    for seen in pool.run(sharded_after_each, layout):
        assert len(seen) == layout.packs * 4 // pipeline
        assert all(seen), "a block still held whole weights when the next one began"


def test_the_run_can_tell_layouts_apart() -> None:
    """What the matrix compares does move: another smoothing gives another loss, and three steps change the weights."""
    layout = Layout(ranks=1)
    plain, smooth = one_process(layout), one_process(replace(layout, smoothing=0.1))
    assert plain.losses[0] != smooth.losses[0]
    assert plain.losses[0] != plain.losses[2]
    assert all(
        not torch.equal(plain.initial[name], tensor)
        for name, tensor in plain.final.items()
    )
