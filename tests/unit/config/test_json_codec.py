"""Values that JSON has no word for survive a checkpoint's record and are plain words in metrics.jsonl."""

from __future__ import annotations

import json
import math

import pytest

from evomesh.config.json_codec import decode_json, encode_json, float_word


def test_infinities_nan_and_bytes_come_back_from_strict_json() -> None:
    value = {
        "high": math.inf,
        "low": [-math.inf, 1.5],
        "raw": b"\x00\xff",
        "none": None,
        "yes": True,
    }
    text = json.dumps(encode_json(value), allow_nan=False)
    assert decode_json(json.loads(text)) == value
    assert math.isnan(
        decode_json(json.loads(json.dumps(encode_json(math.nan), allow_nan=False)))
    )


def test_encoded_form_is_the_one_that_checkpoints_on_disk_have() -> None:
    assert encode_json({"every": math.inf}) == {"every": {"$float": "inf"}}
    assert encode_json((b"ab",)) == [{"$bytes": "YWI="}]


@pytest.mark.parametrize(
    "value", [{"$float": 1}, {1: 2}, {"x": object()}], ids=["tag", "key", "object"]
)
def test_what_would_not_come_back_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be stored as JSON"):
        encode_json(value)


def test_metrics_get_words_that_float_reads() -> None:
    words = [float_word(value) for value in (math.nan, math.inf, -math.inf, 0.5, 3)]
    assert words == ["NaN", "Infinity", "-Infinity", 0.5, 3]
    assert float(words[1]) == math.inf
