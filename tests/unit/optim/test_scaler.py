from __future__ import annotations

from evomesh.config.schema import Fp16Config, ScalerConfig
from evomesh.optim.scaler import LossScaler
from tests.support.covers import covers

pytestmark = covers("promise:loss-scale")


def make(**keys: object) -> LossScaler:
    fp16 = Fp16Config(initial_scale=16.0, growth_interval=3, min_scale=4.0)
    return LossScaler(
        ScalerConfig.model_validate(
            {"fp16": fp16, "max_scale": 64.0, "hysteresis": 2, **keys}
        ),
        "float16",
    )


def scales(scaler: LossScaler, found: str) -> list[float]:
    result = []
    for letter in found:
        scaler.update({"o": "ok", "i": "inf", "n": "nan"}[letter])  # type: ignore[arg-type]
        result.append(scaler.scale)
    return result


@covers(
    "grad_scaler.fp16.initial_scale",
    "grad_scaler.fp16.growth_interval",
    "grad_scaler.growth_factor",
    "grad_scaler.max_scale",
)
def test_grows_after_the_interval_up_to_the_maximum() -> None:
    assert scales(make(), "ooooooooo") == [16, 16, 32, 32, 32, 64, 64, 64, 64]


@covers(
    "grad_scaler.fp16.min_scale", "grad_scaler.backoff_factor", "grad_scaler.hysteresis"
)
def test_backs_off_at_the_second_overflow_and_then_at_each_down_to_the_minimum() -> (
    None
):
    assert scales(make(), "iiii") == [16, 8, 4, 4]


def test_an_overflow_restarts_the_count_of_good_steps_but_not_the_hysteresis() -> None:
    assert scales(make(), "ooioo" + "i" + "ooo" + "i") == [
        16,
        16,
        16,
        16,
        16,
        8,
        8,
        8,
        16,
        16,
    ]


def test_nan_counts_as_overflow() -> None:
    assert scales(make(hysteresis=1), "n") == [8]


def test_other_dtypes_have_no_scale() -> None:
    for dtype in ("bfloat16", "float32", "tf32", "float64"):
        scaler = LossScaler(ScalerConfig(), dtype)  # type: ignore[arg-type]
        assert scales(scaler, "iinno") == [1.0] * 5


def test_a_saved_state_goes_on_where_it_was() -> None:
    straight, first, second = make(), make(), make()
    whole = scales(straight, "ooiooiooooi")
    head = scales(first, "ooioo")
    second.load_state(first.state())
    assert head + scales(second, "iooooi") == whole
