"""Ramps and skipped steps are parsed once, and print as what a user may write."""

from __future__ import annotations

import pytest

from evomesh.config.data import DataConfig
from evomesh.config.step_values import BatchSizeRampup, SettingError, StepRanges


@pytest.mark.parametrize("text", ["192 24", "a b c", "0 1 1", "1 -1 1"])
def test_a_ramp_is_three_positive_integers(text: str) -> None:
    with pytest.raises(SettingError, match="three positive integers"):
        BatchSizeRampup.parse(text)


def test_skipped_steps_contain_both_ends_of_a_range() -> None:
    steps = StepRanges.parse("1, 3-5,9")
    assert [step for step in range(12) if step in steps] == [1, 3, 4, 5, 9]
    assert 0 not in StepRanges.parse("")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10-5", "item 1, '10-5', runs backwards"),
        ("5,3", "item 2, '3', comes after step 5"),
        ("a-b", "item 1, 'a-b', is not a step"),
        ("1,2-", "item 2, '2-', is not a step"),
    ],
)
def test_what_is_no_ascending_step_or_range_is_refused(text: str, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        StepRanges.parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("written", [53, (53, 58), [53, 58]])
def test_steps_may_be_numbers_as_a_shell_leaves_them(written: object) -> None:
    config = DataConfig.model_validate({"skip_batches": written})
    expected = "53" if written == 53 else "53,58"
    assert str(config.skip_batches) == expected
    for wrong in (True, [53, "58"], [58, 53], 5.0):
        with pytest.raises(ValueError, match="expected"):
            DataConfig.model_validate({"skip_batches": wrong})


def test_the_schema_parses_what_is_written_and_dumps_it_again() -> None:
    written = {"rampup_batch_size": "1  1 10", "skip_batches": "3, 7-9"}
    config = DataConfig.model_validate(written)
    assert config.rampup_batch_size == BatchSizeRampup(1, 1, 10)
    assert config.skip_batches == StepRanges(((3, 3), (7, 9)))
    dumped = config.model_dump()
    assert (dumped["rampup_batch_size"], dumped["skip_batches"]) == ("1 1 10", "3,7-9")
    assert DataConfig.model_validate(dumped) == config
    empty = DataConfig.model_validate({"rampup_batch_size": None, "skip_batches": None})
    assert (
        empty.model_dump()["rampup_batch_size"],
        empty.model_dump()["skip_batches"],
    ) == ("", "")
