"""Both template configs of XTuner's guides are translated and traced on a fake world of 8.

Both are trained in tests/e2e/test_xtuner.py, where the losses are compared with XTuner's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.loader import load_config
from evomesh.config.write_config import config_text
from evomesh.plan.trace import trace
from tests.support.xtuner import write_config

TEMPLATES = ("internlm2_7b_w_tokenized_dataset", "internlm2_7b_w_internevo_dataset")


@pytest.mark.parametrize("sequence_parallel", [1, 4])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_step_is_traced_on_eight_ranks(
    name: str, sequence_parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    # The second stands on the first, which it finds beside it.
    write_config(tmp_path / f"{TEMPLATES[0]}.py", name=TEMPLATES[0])
    write_config(tmp_path / "theirs.py", name=name)
    sets = [
        f"sequence_parallel_size={sequence_parallel}",
        "model.num_layers=1",
        "data.seq_len=4096",
    ]
    theirs = load_config("theirs.py", sets)
    (tmp_path / "ours.py").write_text(config_text(theirs))
    config = load_config("ours.py").config
    assert config == theirs.config

    found = trace(config, 8, 7)
    assert (found.grid.dp.size, found.grid.tp.size) == (
        8 // sequence_parallel,
        sequence_parallel,
    )
    operations = {(call.operation, call.axis) for call in found.traffic.calls}
    assert (("all_to_all", "tp") in operations) == (sequence_parallel > 1)
