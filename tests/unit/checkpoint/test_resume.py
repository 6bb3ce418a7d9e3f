"""The checkpoint that a run starts from, and the log line that names it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.loaders import checkpoint_loaders, fill
from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.plan import describe
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.resume import (
    check_config,
    decide,
    parse_content,
    restart_line,
    restore,
)
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.record import config_to_dict
from evomesh.config.schema import CheckpointConfig, Config, LoadConfig, OptimizerConfig
from evomesh.errors import UserError
from evomesh.parallel.grid import Axis, Grid
from evomesh.train.stored_state import check_stored_state
from tests.support.covers import covers

NAMES = ("w", "optim.exp_avg.w", "optim.exp_avg_sq.w", "optim.master.w")


def run(value: float, names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    return {name: torch.full((3,), value) for name in names}


def saved(root: Path, *steps: int, names: tuple[str, ...] = NAMES) -> CheckpointWriter:
    writer = CheckpointWriter(str(root))
    for step in steps:
        writer.save(step, run(step, names), {"step": step}, {})
    return writer


def config(root: Path, **values: Any) -> CheckpointConfig:
    return CheckpointConfig(save_ckpt_folder=str(root), **values)


def test_auto_resume_is_the_default_and_takes_the_newest_even_if_saving_is_off(
    tmp_path: Path,
) -> None:
    writer = saved(tmp_path, 5, 10)
    start = decide(
        config(tmp_path, enable_save_ckpt=False), CheckpointReader(), writer.folder
    )
    assert (
        start.resumes and start.checkpoint is not None and start.checkpoint.step == 10
    )
    assert (
        start.reason == f"resuming step 10 from {tmp_path}/step-00000010 (auto_resume)"
    )
    tensors = run(0)
    assert restore(start, CheckpointReader(), tensors) == {"step": 10}
    assert all(torch.equal(t, torch.full((3,), 10.0)) for t in tensors.values())


def test_auto_resume_ignores_load_info_loudly(tmp_path: Path) -> None:
    info = LoadConfig(path=str(tmp_path / "other"))
    start = decide(
        config(tmp_path / "empty", load_ckpt_info=info),
        CheckpointReader(),
        SaveFolder.open(str(tmp_path / "empty")),
    )
    assert not start.resumes and start.checkpoint is None
    assert (
        "starting from scratch" in start.reason
        and f"({tmp_path}/other) IGNORED" in start.reason
    )


@covers("ckpt.load_ckpt_info.fallback")
def test_a_fallback_is_used_only_where_nothing_can_be_resumed(tmp_path: Path) -> None:
    saved(tmp_path / "weights", 3)
    info = LoadConfig(path=str(tmp_path / "weights"), fallback=True)
    empty = decide(
        config(tmp_path / "own", load_ckpt_info=info), CheckpointReader(), None
    )
    assert (
        empty.checkpoint is not None
        and empty.checkpoint.step == 3
        and empty.content == {"model"}
    )
    writer = saved(tmp_path / "own", 5)
    start = decide(
        config(tmp_path / "own", load_ckpt_info=info), CheckpointReader(), writer.folder
    )
    assert start.checkpoint is not None and start.checkpoint.step == 5 and start.resumes


@covers(
    "ckpt.load_ckpt_info",
    "ckpt.load_ckpt_info.path",
    "ckpt.auto_resume",
    "ckpt.load_ckpt_folder",
    "ckpt.load_model_only_folder",
    "promise:ckpt-types",
)
def test_without_auto_resume_load_ckpt_info_decides(tmp_path: Path) -> None:
    writer = saved(tmp_path, 5, 10)
    assert (
        decide(
            config(tmp_path, auto_resume=False), CheckpointReader(), writer.folder
        ).checkpoint
        is None
    )
    info = LoadConfig(
        path=f"local:{tmp_path}/5", content=("all",), ckpt_type="internlm"
    )
    start = decide(
        config(tmp_path, auto_resume=False, load_ckpt_info=info),
        CheckpointReader(),
        writer.folder,
    )
    assert start.checkpoint is not None and start.checkpoint.step == 5 and start.resumes
    missing = LoadConfig(path=f"local:{tmp_path}/6")
    with pytest.raises(UserError, match="has steps 10, 5"):
        decide(
            config(tmp_path, auto_resume=False, load_ckpt_info=missing),
            CheckpointReader(),
            writer.folder,
        )
    nowhere = LoadConfig(path="some/model")
    with pytest.raises(
        UserError,
        match=r"neither an existing folder nor a model in the local Hugging Face cache[^\n]*\n"
        r".*hf download some/model",
    ):
        decide(
            config(tmp_path, auto_resume=False, load_ckpt_info=nowhere),
            CheckpointReader(),
            writer.folder,
        )


def test_a_mistyped_folder_beside_others_is_not_taken_for_a_hub_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("checkpoints/mine"), 5)
    info = LoadConfig(path="checkpoints/mien", ckpt_type="evomesh")
    fresh = config(tmp_path / "own", auto_resume=False, load_ckpt_info=info)
    with pytest.raises(UserError, match="mine with step") as caught:
        decide(fresh, CheckpointReader(), None)
    assert caught.value.code != "EVO-HF-001"


@covers("ckpt.load_ckpt_info.content", "promise:content")
@pytest.mark.parametrize(
    ("content", "loaded"),
    [
        (("model",), {"w"}),
        (("optimizer",), {"optim.exp_avg.w", "optim.exp_avg_sq.w"}),
        (("Model", "optimizer"), set(NAMES)),
        (("sampler", "scheduler"), set()),
        (("all",), set(NAMES)),
    ],
)
def test_content_mixtures(
    tmp_path: Path, content: tuple[str, ...], loaded: set[str]
) -> None:
    writer = saved(tmp_path, 5)
    info = LoadConfig(path=str(tmp_path), content=content)
    start = decide(
        config(tmp_path, auto_resume=False, load_ckpt_info=info),
        CheckpointReader(),
        writer.folder,
    )
    tensors = run(0)
    restore(start, CheckpointReader(), tensors)
    assert {name for name, t in tensors.items() if t[0] == 5} == loaded


def test_unknown_content() -> None:
    with pytest.raises(UserError, match="content has 'weights'"):
        parse_content(("weights",))
    assert parse_content("all") == parse_content(
        ("model", "sampler", "optimizer", "scheduler")
    )


def stored_with(root: Path, stored: Config) -> CheckpointWriter:
    writer = CheckpointWriter(str(root))
    writer.save(5, run(5), {"step": 5}, config_to_dict(stored))
    return writer


def changed(section: str, **values: Any) -> Config:
    base = Config()
    return base.model_copy(
        update={section: getattr(base, section).model_copy(update=values)}
    )


@covers("ckpt.allow_changed_model")
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"rope_base": 5e4},
            "model.rope_base: 10000.0 in the checkpoint, 50000.0 in the config",
        ),
        (
            {"qk_interleaved": True},
            "model.qk_interleaved: False in the checkpoint, True in the config",
        ),
        ({"layer_norm_epsilon": 0.1}, "model.layer_norm_epsilon"),
        ({"norm_type": "layernorm"}, "model.norm_type: 'rmsnorm' in the checkpoint"),
        ({"model_type": "LLAMA2"}, "model.model_type"),
        ({"use_dynamic_ntk_rope": True}, "model.use_dynamic_ntk_rope"),
    ],
)
def test_a_resume_with_another_function_of_the_weights_is_refused_unless_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, values: dict[str, Any], words: str
) -> None:
    writer = stored_with(tmp_path, Config())
    start = decide(config(tmp_path), CheckpointReader(), writer.folder)
    present = changed("model", **values)
    with pytest.raises(UserError, match="trained with other model settings") as caught:
        check_config(start, present, CheckpointReader())
    assert (
        words in str(caught.value)
        and "--set ckpt.allow_changed_model=True" in caught.value.fix
    )
    allowed = present.model_copy(
        update={"ckpt": CheckpointConfig(allow_changed_model=True)}
    )
    check_config(start, allowed, CheckpointReader())
    assert words in caplog.text


@pytest.mark.parametrize(
    ("stored", "present"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("tf32", "float16")],
)
def test_a_run_resumes_in_its_dtype_only_and_its_weights_start_in_any(
    tmp_path: Path, stored: str, present: str
) -> None:
    writer = stored_with(tmp_path, changed("model", dtype=stored))
    run_config = changed("model", dtype=present)
    resumed = decide(config(tmp_path), CheckpointReader(), writer.folder)
    with pytest.raises(UserError, match=f"'{stored}' .* '{present}'") as caught:
        check_config(resumed, run_config, CheckpointReader())
    assert 'content=("model",)' in caught.value.fix

    info = LoadConfig(path=str(tmp_path), content=("model",))
    fresh = config(tmp_path, auto_resume=False, load_ckpt_info=info)
    start = decide(fresh, CheckpointReader(), writer.folder)
    check_config(start, run_config, CheckpointReader())
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in run(0).items()}
    restore(start, CheckpointReader(), tensors)
    assert tensors["w"].dtype == torch.bfloat16 and tensors["w"][0] == 5


def test_float32_and_tf32_differ_in_products_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is another training, which is logged, and not another function, which is refused."""
    caplog.set_level(logging.INFO)
    writer = stored_with(tmp_path, changed("model", dtype="float32"))
    start = decide(config(tmp_path), CheckpointReader(), writer.folder)
    caplog.clear()
    check_config(start, changed("model", dtype="tf32"), CheckpointReader())
    (message,) = caplog.messages
    assert "model.dtype" in message and "float32" in message and "tf32" in message


def test_imported_weights_say_how_to_start_from_them(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    writer.save(0, {"w": torch.zeros(3)}, {}, {})
    with pytest.raises(UserError, match=r'fix: start anew .*content=\("model",\)'):
        decide(
            config(tmp_path),
            CheckpointReader(),
            writer.folder,
            check=check_stored_state,
        )


def test_another_training_is_logged_with_both_values_and_other_changes_are_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = stored_with(tmp_path, Config())
    caplog.clear()  # the save is logged too, where another test has raised the log level
    start = decide(config(tmp_path), CheckpointReader(), writer.folder)
    check_config(start, changed("run", job_name="x"), CheckpointReader())
    check_config(start, changed("ckpt", keep_last=5), CheckpointReader())
    assert caplog.messages == []
    check_config(start, changed("data", micro_num=4), CheckpointReader())
    check_config(start, Config(), CheckpointReader(Grid(dp=Axis("dp", 2, 0))))
    assert caplog.messages == [
        "the training changes: data.micro_num: 1 in the checkpoint, 4 in the config",
        "the training changes: 1 data-parallel rank in the checkpoint, 2 now: 2 packs per step, before 1; "
        "no data.micro_num keeps them, as 2 does not divide 1",
    ]


def test_other_ranks_are_logged_with_the_micro_num_that_keeps_the_packs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = stored_with(tmp_path, changed("data", micro_num=60))
    start = decide(config(tmp_path), CheckpointReader(), writer.folder)
    reader = CheckpointReader(Grid(dp=Axis("dp", 4, 0)))
    caplog.clear()
    check_config(start, changed("data", micro_num=60), reader)
    assert caplog.messages == [
        "the training changes: 1 data-parallel rank in the checkpoint, 4 now: 240 packs per step, before 60; "
        "data.micro_num=15 keeps them"
    ]
    caplog.clear()
    check_config(start, changed("data", micro_num=15), reader)
    assert not any("packs per step" in words for words in caplog.messages)


@pytest.mark.parametrize("values", [{"auto_resume": False}, {}])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_layers": 2}, "model.num_layers: 48 in the checkpoint, 2 in the config"),
        ({"num_attention_heads": 8}, "model.num_attention_heads: 32 in the checkpoint"),
        ({"no_bias": True}, "model.no_bias: False in the checkpoint"),
        ({"rope_base": 5e5}, "model.rope_base: 10000.0 in the checkpoint, 500000.0"),
    ],
)
def test_a_start_from_weights_with_another_function_is_refused_unless_asked_for(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    values: dict[str, Any],
    model: dict[str, Any],
    words: str,
) -> None:
    stored_with(tmp_path, Config())
    caplog.clear()  # the save is logged too, where another test has raised the log level
    fallback = values.get("auto_resume", True)
    info = LoadConfig(path=str(tmp_path), content=("model",), fallback=fallback)
    fresh = config(tmp_path / "own", load_ckpt_info=info, **values)
    start = decide(fresh, CheckpointReader(), None)
    present = changed("model", **model)
    with pytest.raises(UserError) as caught:
        check_config(start, present, CheckpointReader())
    assert words in str(caught.value) and caught.value.code == "EVO-CKPT-010"
    assert "--set ckpt.allow_changed_model=True" in caught.value.fix

    accepted = CheckpointConfig(allow_changed_model=True)
    allowed = present.model_copy(update={"ckpt": accepted})
    check_config(start, allowed, CheckpointReader())
    assert words in caplog.text


def test_a_start_from_weights_may_change_the_training_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored_with(tmp_path, Config())
    caplog.clear()
    info = LoadConfig(path=str(tmp_path), content=("model",), fallback=True)
    start = decide(
        config(tmp_path / "own", load_ckpt_info=info), CheckpointReader(), None
    )
    check_config(start, changed("adam", lr=5.0), CheckpointReader())
    assert caplog.messages == []


def test_weights_that_the_model_lacks_are_refused_and_optimizer_state_is_not(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 5, names=(*NAMES, "layers.2.w"))
    info = LoadConfig(path=str(tmp_path), content=("model",), fallback=True)
    start = decide(
        config(tmp_path / "own", load_ckpt_info=info), CheckpointReader(), None
    )
    with pytest.raises(UserError, match=r"'layers\.2\.w' \(1 name\)") as caught:
        restore(start, CheckpointReader(), run(0))
    assert caught.value.code == "EVO-CKPT-005"
    tensors = run(0, (*NAMES, "layers.2.w"))
    restore(start, CheckpointReader(), tensors)
    assert tensors["layers.2.w"][0] == 5 and tensors["optim.exp_avg.w"][0] == 0


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"num_attention_heads": 4}, "model.num_attention_heads: 4 in the checkpoint"),
        ({"num_kv_attention_heads": 2}, "model.num_kv_attention_heads: 2"),
        ({"rope_base": 1e6, "dtype": torch.bfloat16}, "model.rope_base: 1000000.0"),
        ({"dtype": torch.bfloat16, "use_flash_attn": False}, ""),
        (None, ""),
    ],
)
def test_internevos_model_section_is_compared_where_there_is_one(
    tmp_path: Path, stored: dict[str, Any] | None, words: str
) -> None:
    if stored is not None:
        torch.save(stored, tmp_path / "model_config.pt")
    start = StartPoint(
        "", path=str(tmp_path), ckpt_type="internevo", content=frozenset({"model"})
    )
    if not words:
        check_config(start, Config(), CheckpointReader())
        return
    with pytest.raises(UserError) as caught:
        check_config(start, Config(), CheckpointReader())
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


COUNTERS = {
    "step": 5,
    "step_count": 5,
    "num_consumed_tokens": 9,
    "inf_nan_skip_batches": 0,
    "consecutive_skips": 0,
    "run_folder": "",
}
POSITION = {"step": 5, "epoch": 0, "offset": 10, "consumed": 10}
SAMPLER = {
    "position": POSITION,
    "num_packs": 100,
    "seed": 1024,
    "order": "internevo",
    "unit": 1,
    "rampup": None,
}
CURSOR = {"n": 7, "epoch": 0, "window": 1, "file": 0, "row": 7}
STREAMING = {"step": 5, "num_lanes": 2, "cursor": CURSOR, "lanes": {"0": [4, 0]}}
STAGE = {
    "pack_tokens": 8,
    "weights": None,
    "sources": [0],
    "until": 9,
    "until_tokens": None,
}
CURSOR_OF_SOURCE = {"packs": 9, "epoch": 0, "offset": 5, "consumed": 5}
STAGED = {
    "stages": [STAGE],
    "position": {**POSITION, "stage": 0, "tokens": 80, "drawn": 10},
    "cursors": {"0": CURSOR_OF_SOURCE},
    "seed": 1024,
    "order": "internevo",
    "unit": 1,
}
STATE = {
    "train": COUNTERS,
    "optimizer": {"steps": 5},
    "scaler": {"scale": 1.0, "good_steps": 0, "overflows": 0},
    "sampler": SAMPLER,
    "data": {"hash": "ab", "files": [{"file": "a.bin"}], "types": ["en"]},
}


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("train", None),
        ("train", []),
        ("train", {"step": 5}),
        ("train", {**COUNTERS, "run_folder": 5}),
        ("train", {**COUNTERS, "step_count": "5"}),
        ("train", {**COUNTERS, "step_count": True}),
        ("train", {**COUNTERS, "num_consumed_tokens": -1}),
        ("train", {**COUNTERS, "num_consumed_tokens": 10**30}),
        ("train", {**COUNTERS, "step": 4}),
        ("optimizer", None),
        ("optimizer", {"steps": 1.5}),
        ("optimizer", {}),
        ("optimizer", {"steps": 5, "ema_calls": "5"}),
        ("optimizer", {"steps": 5, "weight_sum": "1"}),
        ("optimizer", {"steps": 5, "weight_sum": -1.0}),
        ("scaler", 3),
        ("scaler", {"scale": "1", "good_steps": 0, "overflows": 0}),
        ("scaler", {"scale": float("nan"), "good_steps": 0, "overflows": 0}),
        ("scaler", {"scale": 1.0, "good_steps": None, "overflows": 0}),
        ("data", {}),
        ("data", {"hash": "ab", "files": {}, "types": []}),
        ("data", {"hash": "ab", "files": [{}], "types": []}),
        ("data", -1),
        ("sampler", None),
        ("sampler", {}),
        ("sampler", {**SAMPLER, "position": 1.5}),
        ("sampler", {**SAMPLER, "position": {**POSITION, "offset": 1.5}}),
        ("sampler", {**SAMPLER, "position": {**POSITION, "offset": []}}),
        ("sampler", {**SAMPLER, "position": {**POSITION, "more": 1}}),
        ("sampler", {**SAMPLER, "position": without(POSITION, "epoch")}),
        ("sampler", {**SAMPLER, "unit": None}),
        ("sampler", {**SAMPLER, "order": 1}),
        ("sampler", without(SAMPLER, "rampup")),
        ("sampler", {**SAMPLER, "rampup": {"start": 1}}),
        ("sampler", {**SAMPLER, "counts": {"en/": "1"}}),
        ("sampler", {**STREAMING, "cursor": {**CURSOR, "row": -1}}),
        ("sampler", {**STREAMING, "lanes": {"0": [4]}}),
        ("sampler", {**STREAMING, "lanes": [[4, 0]]}),
        ("sampler", {"internevo": {"step": 5}}),
        ("sampler", {**STAGED, "stages": []}),
        ("sampler", {**STAGED, "stages": [without(STAGE, "weights")]}),
        ("sampler", {**STAGED, "position": POSITION}),
        ("sampler", {**STAGED, "cursors": {"0": {**CURSOR_OF_SOURCE, "packs": "9"}}}),
        ("sampler", without(STAGED, "unit")),
        ("early_stop", []),
        ("early_stop", {"best": 1.5}),
        ("early_stop", {"best": "1.5", "since_best": 0}),
    ],
)
def test_a_state_that_cannot_continue_a_run_makes_the_one_before_it_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, value: Any
) -> None:
    earlier = {**STATE, "train": {**COUNTERS, "step": 4}}
    writer = CheckpointWriter(str(tmp_path))
    writer.save(4, run(4), earlier, {})
    writer.save(5, run(5), {**STATE, part: value}, {})
    start = decide(
        config(tmp_path), CheckpointReader(), writer.folder, check=check_stored_state
    )
    assert start.checkpoint is not None and start.checkpoint.step == 4
    assert "skipped" in caplog.text and "step-00000005" in caplog.text


@pytest.mark.parametrize(
    ("part", "value"),
    [("sampler", STAGED), ("early_stop", {"best": 1.5, "since_best": 2})],
)
def test_states_of_data_stages_and_early_stops_are_resumed(
    tmp_path: Path, part: str, value: Any
) -> None:
    writer = CheckpointWriter(str(tmp_path))
    writer.save(5, run(5), {**STATE, part: value}, {})
    start = decide(
        config(tmp_path), CheckpointReader(), writer.folder, check=check_stored_state
    )
    assert start.checkpoint is not None and start.checkpoint.step == 5


@pytest.mark.parametrize("section", ["model", "adam", "data"])
def test_a_stored_config_whose_sections_are_none_makes_the_one_before_it_the_start(
    tmp_path: Path, section: str
) -> None:
    writer = CheckpointWriter(str(tmp_path))
    writer.save(4, run(4), {**STATE, "train": {**COUNTERS, "step": 4}}, {})
    writer.save(5, run(5), STATE, {section: [1]})
    start = decide(
        config(tmp_path), CheckpointReader(), writer.folder, check=check_stored_state
    )
    assert start.checkpoint is not None and start.checkpoint.step == 4


@pytest.mark.parametrize(
    "sampler",
    [
        SAMPLER,
        {**SAMPLER, "rampup": {"start": 1, "increment": 1, "every": 2}},
        {"position": POSITION, "seed": 1, "rampup": None, "counts": {"en/": 3}},
        STREAMING,
    ],
)
def test_the_positions_of_every_source_of_data_are_accepted(
    tmp_path: Path, sampler: dict[str, Any]
) -> None:
    writer = CheckpointWriter(str(tmp_path))
    writer.save(5, run(5), {**STATE, "sampler": sampler}, {})
    start = decide(
        config(tmp_path), CheckpointReader(), writer.folder, check=check_stored_state
    )
    assert start.checkpoint is not None and start.checkpoint.step == 5


def internevo(root: Path, *folders: str, without: str = "") -> SaveFolder:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for name in ("model_tp0_pp0.pt", "context.pt", "sampler.pt", "schedulder.pt"):
            if name != without:
                (root / folder / name).write_bytes(b"")
    return SaveFolder.open(str(root))


def test_auto_resume_takes_the_newest_checkpoint_of_internevo(tmp_path: Path) -> None:
    folder = internevo(tmp_path, "50", "100", "snapshot/0")
    (tmp_path / "900").mkdir()  # empty
    start = decide(config(tmp_path), CheckpointReader(), folder)
    assert (
        start.resumes
        and start.path == f"local:{tmp_path}/100"
        and start.ckpt_type == "internevo"
    )
    assert (
        start.reason == f"resuming InternEvo's checkpoint {tmp_path}/100 (auto_resume)"
    )
    writer = saved(tmp_path, 101)  # from then on there are checkpoints of this program
    start = decide(config(tmp_path), CheckpointReader(), writer.folder)
    assert start.checkpoint is not None and start.checkpoint.step == 101


@pytest.mark.parametrize("missing", ["context.pt", "sampler.pt", "schedulder.pt"])
def test_auto_resume_never_starts_from_scratch_over_an_incomplete_checkpoint_of_internevo(
    tmp_path: Path, missing: str
) -> None:
    folder = internevo(tmp_path, "50", without=missing)
    with pytest.raises(
        UserError, match=f"has no {missing}: it cannot resume a run"
    ) as caught:
        decide(config(tmp_path), CheckpointReader(), folder)
    assert (
        f'load_ckpt_info=dict(path="{tmp_path}/50", content=("model",)'
        in caught.value.fix
    )


def test_auto_resume_over_snapshots_of_internevo_stops_and_says_how(
    tmp_path: Path,
) -> None:
    folder = internevo(tmp_path, "snapshot/0", "snapshot/1")
    with pytest.raises(UserError, match="snapshots of InternEvo") as caught:
        decide(config(tmp_path), CheckpointReader(), folder)
    assert "auto_resume=False" in caught.value.fix and "snapshot/1" in caught.value.fix


@covers("promise:save-optimizer")
def test_a_weights_only_checkpoint_cannot_resume(tmp_path: Path) -> None:
    writer = saved(tmp_path, 5, names=("w",))
    with pytest.raises(UserError, match=r"has weights only .*cannot resume"):
        decide(config(tmp_path), CheckpointReader(), writer.folder)
    info = LoadConfig(path=str(tmp_path), content=("model",))
    start = decide(
        config(tmp_path, auto_resume=False, load_ckpt_info=info),
        CheckpointReader(),
        writer.folder,
    )
    tensors = run(0)
    restore(start, CheckpointReader(), tensors)
    assert tensors["w"][0] == 5 and tensors["optim.master.w"][0] == 0


@covers("ckpt.load_ckpt_info.ckpt_type")
def test_a_custom_loader(tmp_path: Path) -> None:
    @checkpoint_loaders.register("my_format")
    def load(path: str, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        yield (
            "w",
            torch.tensor(
                [float(word) for word in Path(path, "w.txt").read_text().split()]
            ),
        )

    (tmp_path / "w.txt").write_text("1 2 3")
    info = LoadConfig(path=str(tmp_path), content=("model",), ckpt_type="my_format")
    writer = CheckpointWriter(str(tmp_path / "save"))
    start = decide(
        config(tmp_path / "save", auto_resume=False, load_ckpt_info=info),
        CheckpointReader(),
        writer.folder,
    )
    tensors = run(0)
    restore(start, CheckpointReader(), tensors)
    assert tensors["w"].tolist() == [1, 2, 3]


def test_foreign_tensors_that_do_not_fit_are_all_named() -> None:
    def refused(
        source: dict[str, torch.Tensor], elsewhere: tuple[str, ...] = ()
    ) -> str:
        with pytest.raises(UserError) as caught:
            fill(
                describe({"a": torch.zeros(2), "b": torch.zeros(3, 1)}, Grid()),
                source.items(),
                "there",
                elsewhere,
            )
        return str(caught.value)

    a, b = torch.ones(2), torch.ones(3, 1)
    text = refused({"a": torch.ones(3), "b": torch.ones(3)})
    assert (
        "2 tensors differ" in text
        and "a: the checkpoint has [3], the model wants [2]" in text
    )
    assert "b: the checkpoint has [3], the model wants [3, 1]" in text
    assert "has no 'a', 'b' (2 names)" in refused({})
    assert "unexpected tensors in the checkpoint: 'c' (1 name)" in refused(
        {"a": a, "b": b, "c": a, "d": a}, ("d",)
    )


def test_unknown_type_names_the_known_ones(tmp_path: Path) -> None:
    info = LoadConfig(path=str(tmp_path), ckpt_type="mystery")
    with pytest.raises(UserError, match="no loader for ckpt_type='mystery'"):
        decide(
            config(tmp_path, auto_resume=False, load_ckpt_info=info),
            CheckpointReader(),
            SaveFolder.open(str(tmp_path)),
        )


def test_a_hugging_face_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    info = LoadConfig(path=str(tmp_path), ckpt_type="internevo")
    with pytest.raises(
        UserError, match="is a Hugging Face model folder, but ckpt_type='internevo'"
    ):
        decide(
            config(tmp_path, auto_resume=False, load_ckpt_info=info),
            CheckpointReader(),
            SaveFolder.open(str(tmp_path)),
        )


@pytest.mark.parametrize("kind", ["hf", "llama"])
def test_a_folder_of_ours_given_as_another_kind(tmp_path: Path, kind: str) -> None:
    writer = saved(tmp_path, 5)
    info = LoadConfig(path=str(tmp_path), ckpt_type=kind)
    with pytest.raises(
        UserError,
        match=f"is an evomesh checkpoint, but ckpt_type='{kind}'(.|\\n)*'internevo'",
    ):
        decide(
            config(tmp_path, auto_resume=False, load_ckpt_info=info),
            CheckpointReader(),
            writer.folder,
        )


def test_pickled_metadata_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    info = LoadConfig(path=str(tmp_path), ckpt_type="internevo")
    with pytest.raises(UserError, match="never opened"):
        decide(
            config(tmp_path, auto_resume=False, load_ckpt_info=info),
            CheckpointReader(),
            SaveFolder.open(str(tmp_path)),
        )


def test_the_restart_line_names_the_checkpoint_that_a_restart_uses(
    tmp_path: Path,
) -> None:
    assert "from scratch" in restart_line(SaveFolder.open(str(tmp_path)))
    writer = saved(tmp_path, 5, 10)
    (tmp_path / "step-00000010/commit.json").unlink()
    assert (
        restart_line(writer.folder)
        == f"a restart resumes from step 5: {tmp_path}/step-00000005"
    )
    (tmp_path / "step-00000005/commit.json").write_text("{}")
    assert "finds no checkpoint" in restart_line(writer.folder)


@pytest.mark.parametrize(
    ("stored", "present"), [("adamw", "muon"), ("muon", "adamw"), (None, "lion")]
)
def test_optimizer_state_of_another_rule_is_refused(
    tmp_path: Path, stored: str | None, present: str
) -> None:
    """A checkpoint of before the key is AdamW's."""
    record = config_to_dict(Config())
    if stored is None:
        del record["optimizer"]
    else:
        record["optimizer"]["type"] = stored
    writer = CheckpointWriter(str(tmp_path))
    writer.save(5, run(1.0), {"step": 5}, record)
    start = decide(config(tmp_path), CheckpointReader(), writer.folder)
    now = Config(optimizer=OptimizerConfig.model_validate({"type": present}))
    with pytest.raises(UserError) as raised:
        check_config(start, now, CheckpointReader())
    assert f"{stored or 'adamw'!r} in the checkpoint and {present!r}" in str(
        raised.value
    )

    # The way that the message names.
    info = LoadConfig(
        path=str(tmp_path / "step-00000005"), content=("model", "scheduler", "sampler")
    )
    anew = CheckpointConfig(auto_resume=False, load_ckpt_info=info)
    start = decide(anew, CheckpointReader(), None)
    check_config(start, now, CheckpointReader())
    tensors = {"w": torch.zeros(3), "optim.momentum.w": torch.zeros(3)}
    assert restore(start, CheckpointReader(), tensors) == {"step": 5}
    assert tensors["w"].tolist() == [1, 1, 1] and not tensors["optim.momentum.w"].any()
