"""Over how many ranks the optimizer's state is sharded, against counts by hand and the state of a built rank."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.config.layout import check_world, run_sizes, zero_note
from evomesh.config.schema import Config
from evomesh.config.size import parameter_counts
from evomesh.config.zero_size import elements_per_rank
from evomesh.plan.trace import hold
from tests.support.covers import covers

# The rows of wqkv are (4 + 2 * 2) * 16 = 128, of wo and w2 64, of w1 and w3 96, of
# embedding and head 120. Elements of the first: 128 * 64, and so on.
MODEL: dict[str, Any] = {
    "model_type": "INTERNLM2_PUBLIC",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_attention_heads": 2,
    "vocab_size": 120,
    "mlp_ratio": 1.5,
    "multiple_of": 32,
    "dtype": "float32",
    "no_bias": True,
}
QKV = 2 * 128 * 64
WO = 2 * 64 * 64
INPUTS = 2 * 2 * 96 * 64
W2 = 2 * 64 * 96
ENDS = 2 * 120 * 64
ALL = QKV + WO + INPUTS + W2 + ENDS
NORMS = 5 * 64


def config(**parallel: Any) -> Config:
    return Config.model_validate({"model": MODEL, "parallel": parallel})


def test_the_shapes_are_those_of_the_model() -> None:
    counts = parameter_counts(config().model)
    assert sum(counts.values()) - counts["norms"] == ALL
    assert counts["norms"] == NORMS


@pytest.mark.parametrize(
    ("world", "size", "zero", "elements"),
    [
        # 3 divides 96 and 120 only, and leaves less than 1 does.
        (3, -1, 3, (INPUTS + ENDS) // 3 + QKV + WO + W2),
        # Of 12 the divisor 4 divides all rows; 12 and 6 do not divide 128 and 64.
        (12, -1, 4, ALL // 4),
        (12, 12, 12, (INPUTS + ENDS) // 12 + QKV + WO + W2),
        (24, -1, 8, ALL // 8),
        (4, -1, 4, ALL // 4),
    ],
)
@covers("parallel.zero1.size")
def test_elements_of_a_rank(world: int, size: int, zero: int, elements: int) -> None:
    made = config(zero1={"size": size})
    sizes = run_sizes(made, world)
    assert (sizes.zero, sizes.replica) == (zero, world // zero)
    assert elements_per_rank(made, sizes, zero) == elements
    # Float32 parameters are their own masters: Adam has two moments of 4 bytes.
    held = hold(made, world, 0).optimizer
    assert held == pytest.approx(8 * (elements + NORMS), abs=1000)


@pytest.mark.parametrize(
    ("parallel", "rows"),
    [
        ({"tensor": {"size": 2, "mode": "mtp"}}, 4),
        ({"tensor": {"size": 2, "mode": "msp"}}, 4),
        ({"tensor": {"size": 1, "mode": "isp"}, "weight": {"size": 2}}, 4),
    ],
)
def test_a_size_that_divides_the_rows_of_a_tensor_rank(
    parallel: dict[str, Any], rows: int
) -> None:
    made = config(**parallel)
    assert run_sizes(made, 24).zero == rows
    whole = hold(config(zero1={"size": 1}, **parallel), 24, 0).optimizer
    shared = hold(made, 24, 0).optimizer
    assert shared < 0.27 * whole


def test_a_size_that_shards_little_is_warned_of() -> None:
    (words,) = check_world(config(zero1={"size": 12}), 12)
    share = (INPUTS + ENDS) / ALL
    assert words.startswith("parallel.zero1.size: ") and f"only {share:.0%}" in words
    assert words.endswith("with size=4 it is 100%")
    assert check_world(config(zero1={"size": 4}), 12) == []
    assert check_world(config(), 12) == []
    # Of 3 ranks there is no better size: the warning names none.
    (words,) = check_world(config(), 3)
    assert "with size=" not in words


def test_a_run_says_over_how_many_ranks() -> None:
    note = zero_note(config(), 12)
    assert note is not None
    assert "4 ranks share the optimizer's state, in 3 groups" in note
    assert zero_note(config(zero1={"size": 4}), 12) is None
    assert zero_note(config(), 8) is None


def test_the_shapes_of_a_custom_model_are_unknown() -> None:
    made = config()
    model = made.model.model_copy(update={"model_type": "MINE"})
    custom = made.model_copy(update={"model": model})
    assert run_sizes(custom, 12).zero == 12
    assert check_world(custom, 12) == []
