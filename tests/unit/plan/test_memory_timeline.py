"""The timeline of a step's memory: what it keeps of all changes, and its parts and kinds in a traced step."""

from __future__ import annotations

from evomesh.config.data import DataConfig
from evomesh.config.schema import Config, ModelConfig
from evomesh.plan.memory_timeline import STRETCHES, MemoryChange, stack_changes
from evomesh.plan.step_memory import trace_step_memory
from evomesh.plan.trace import TracedDevice

T, D, F, V, L = 64, 32, 64, 96, 2
KINDS = ("weights", "buckets")


def test_points_are_sums_of_the_changes_so_far() -> None:
    changes = [
        MemoryChange(0, "weights", 5),
        MemoryChange(1, "buckets", 3),
        MemoryChange(2, "buckets", -3),
        MemoryChange(2, "weights", 1),
    ]
    assert stack_changes(changes, KINDS) == [(0, (5, 0)), (1, (5, 3)), (2, (6, 0))]


def test_a_long_timeline_keeps_its_highest_and_its_lowest_points() -> None:
    changes = [MemoryChange(0, "weights", 1)]
    for position in range(1, 50 * STRETCHES):
        growth = 1000 if position % 2 else -1000
        changes.append(MemoryChange(position, "buckets", growth))
    changes[777] = MemoryChange(777, "buckets", 5000)
    changes[778] = MemoryChange(778, "buckets", -5000)
    points = stack_changes(changes, KINDS)
    assert len(points) <= 2 * STRETCHES
    assert (777, (1, 5000)) in points
    assert points == sorted(points)
    assert {sum(nbytes) for _, nbytes in points} == {1, 1001, 5001}


def config(dtype: str, checkpoint: float = 0.0) -> Config:
    model = ModelConfig(
        model_type="LLAMA2",
        dtype=dtype,
        num_layers=L,
        hidden_size=D,
        num_attention_heads=2,
        vocab_size=V,
        mlp_ratio=F / D,
        multiple_of=1,
        no_bias=True,
        checkpoint=checkpoint,
    )
    data = DataConfig(seq_len=T, micro_bsz=1, micro_num=2)
    return Config(model=model, data=data)


def test_gradients_of_wide_weights_come_with_the_first_backward() -> None:
    """In 16 bits their sums are there all the time."""
    for dtype, at_start in (("float32", 0), ("bfloat16", 1)):
        timeline = trace_step_memory(config(dtype), 1)
        gradients = timeline.nbytes[timeline.kinds.index("gradients")]
        weights = timeline.nbytes[timeline.kinds.index("weights")]
        parameters = weights[0] // (4 if dtype == "float32" else 2)
        assert gradients[0] == at_start * 4 * parameters
        assert max(gradients) >= 4 * parameters
        assert set(weights) == {weights[0]}


def test_a_step_begins_with_forward_and_ends_with_the_update() -> None:
    timeline = trace_step_memory(config("float32"), 1)
    names = [part.name for part in timeline.parts]
    assert names == 2 * ["forward", "loss", "backward"] + ["update"]
    ends = [part.end for part in timeline.parts]
    begins = [part.begin for part in timeline.parts]
    assert begins[1:] == ends[:-1]
    assert timeline.micro_batches == 2


def test_recomputed_layers_are_back_in_backward_only() -> None:
    timeline = trace_step_memory(config("float32", checkpoint=1.0), 1)
    row = timeline.nbytes[timeline.kinds.index("recomputed activations")]
    of_parts = {}
    for part in timeline.parts:
        inside = [
            nbytes
            for position, nbytes in zip(timeline.positions, row, strict=True)
            if part.begin <= position < part.end
        ]
        of_parts[part.name] = max(inside)
    assert of_parts.pop("backward") >= 4 * T * (2 * F + 4 * D)  # of one layer
    assert set(of_parts.values()) == {0}


def test_kept_activations_are_the_same_on_the_cpu() -> None:
    """Both devices keep the same numbers, except what their attention kernels keep."""
    kept = []
    for device in TracedDevice:
        timeline = trace_step_memory(config("bfloat16"), 1, device=device)
        kept.append(max(timeline.nbytes[timeline.kinds.index("kept activations")]))
    assert abs(kept[0] - kept[1]) <= 0.02 * kept[0]
