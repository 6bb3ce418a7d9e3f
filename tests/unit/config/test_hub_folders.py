"""The advice on a folder or hub id that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.hub_folders import advice_on_missing


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("out/qwen2", "did you mean out/qwen3?"),
        ("out/zzz", "give an existing folder; out has llama, qwen3"),
        ("qwenn/zzz", "hf download qwenn/zzz"),  # no such folder: an id
        ("otu", "did you mean out?"),
        ("zzz", "hf download OWNER/MODEL"),
        ("a/b/zzz", "give an existing folder"),
        ("/nowhere/zzz", "give an existing folder"),
    ],
)
def test_a_path_beside_other_folders_is_nothing_to_download(
    name: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("out/qwen3", "out/llama", "out/.git"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = advice_on_missing(name)
    assert found.endswith(advice)
    assert ("hf download" in found) == ("hf download" in advice)


def test_the_download_of_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = advice_on_missing("owner/texts", "dataset", " --repo-type dataset")
    assert found.endswith("hf download owner/texts --repo-type dataset")
