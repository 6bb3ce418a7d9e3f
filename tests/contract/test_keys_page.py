"""docs/keys.md and its Chinese page are what their tool writes from the schema, and leave no key out."""

from __future__ import annotations

import re

import pytest

from evomesh.config.explain import describe
from evomesh.config.loader import known_keys
from tests.support.pages import STAMP
from tools import keys_page

ROW = re.compile(r"^\| `([^`]+)` \|", re.M)


def test_pages_are_up_to_date() -> None:
    english, chinese = keys_page.pages()
    assert keys_page.PAGE.text == english, "run: python tools/reference.py"
    written = STAMP.sub("", keys_page.PAGE.translation.text)
    assert written == chinese, "run: python tools/reference.py"


def test_every_key_with_an_effect_has_one_row() -> None:
    named = ROW.findall(keys_page.PAGE.text)
    headings = re.findall(r"^## (\w+)$", keys_page.PAGE.text, re.M)
    entries = [
        name
        for section in keys_page.LISTS.values()
        for name in section.model_fields
    ]  # fmt: skip
    without_effect = ("Has no effect", "Refused")
    effective = [
        key for key in known_keys() if not describe(key).startswith(without_effect)
    ]
    assert sorted(named + headings) == sorted(effective + entries)


@pytest.mark.parametrize(
    "row",
    [
        "| `data.seq_len` | `int` >= 1 | `2048` | Longest attention segment, in tokens. |",
        "| `data.min_length_dict` | `dict[str, int]` | `{}` | min_length by part of the path. |",
        "| `data.skip_batches` | `str` | `''` | Steps whose data is consumed without training on it. |",
        "| `data.stop_when.patience` | `int` >= 1 | `3` | The run ends after so many validations without a gain. |",
        "| `ckpt.load_ckpt_info.path` | `str` | required | Folder of the checkpoint to start from. |",
        "| `model.adapt_hf` |  |  | The opposite of model.qk_interleaved. |",
        "| `lr_scale` | `float` >= 0 | `1.0` | Factor of the learning rate; 0: no update. |",
    ],
)
def test_rows_have_type_default_and_effect(row: str) -> None:
    assert row in keys_page.PAGE.text.splitlines()
    assert row not in keys_page.PAGE.translation.text.splitlines()


def test_choices_are_written_as_their_values() -> None:
    (row,) = re.findall(r"^\| `parallel.tensor.mode` .*$", keys_page.PAGE.text, re.M)
    assert "`'mtp' or 'msp' or 'fsp' or 'isp'` | `'mtp'` |" in row


def test_a_text_without_chinese_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    left = dict(keys_page.MORE_CHINESE)
    del left["Loss function."]
    monkeypatch.setattr(keys_page, "MORE_CHINESE", left)
    with pytest.raises(SystemExit, match=r"add the Chinese of: \['Loss function\.'\]"):
        keys_page.pages()
