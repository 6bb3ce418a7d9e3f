"""The settings that messages name are read by the loader, and mean what the sentence says of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from evomesh.config.loader import load_config
from evomesh.config.start_anew import WITHOUT_POSITION, start_anew
from tests.support.runs import CONFIG

ROOT = Path(__file__).parents[3]


def test_what_is_named_can_be_set(tmp_path: Path) -> None:
    words = start_anew("ckpts/step-00000005", WITHOUT_POSITION, "internevo")
    setting, _, rest = words.partition(" and ")
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    other, same = rest.split("; or, in the same folder, with ")
    assert other == "another ckpt.save_ckpt_folder"
    for way in ("ckpt.save_ckpt_folder=local:new", same):
        ckpt = load_config(config, [setting, way]).config.ckpt
        info = ckpt.load_ckpt_info
        assert info is not None and info.fallback
        assert info.path == "ckpts/step-00000005" and info.ckpt_type == "internevo"
        assert info.content == ("model", "optimizer", "scheduler")
    assert not ckpt.auto_resume


def test_weights_alone() -> None:
    assert start_anew().startswith(
        'ckpt.load_ckpt_info=dict(path=..., content=("model",), fallback=True) and '
    )


def test_no_message_names_one_way_only() -> None:
    """A string of the code that loads a checkpoint without a resume is written by ``start_anew``."""
    found = []
    for path in (ROOT / "evomesh").rglob("*.py"):
        if path.name == "start_anew.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                text = ast.unparse(node)
                if re.search(r"auto_resume=False,? .*load_ckpt_info=dict", text):
                    found.append(f"{path}:{node.lineno}")
                if re.search(r"load_ckpt_info=dict\(.*auto_resume=False", text):
                    found.append(f"{path}:{node.lineno}")
    assert not found
