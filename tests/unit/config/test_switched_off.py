"""Blocks that are written out but switched off ask for nothing; keys whose switch is off by default say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.loader import load_config
from evomesh.config.switches import SWITCHES, find_off_keys
from evomesh.errors import ConfigError

BASE = 'model = dict(dtype="torch.float32")\ndata = dict(train_folder="x")\n'

# Settings on top of BASE, each of which would be refused if its block were on.
OFF = {
    "any block, by enable": ["parallel.sequence_2D=dict(enable=False,head_size='x',foo=3)"],
    "enabled, the other spelling": ["parallel.sequence_2D=dict(enabled=False,head_size=2)"],
    "an unknown block at the top": ["cpu_offloading_v2=dict(enable=False,num_layers=3)"],
    "an unknown block in a section": ["ckpt.universal_ckpt=dict(enable=False,x=1)", "ckpt.newer=dict(enable=False)"],
    "a refused block": ["cpu_offloading=dict(enable=False,num_layers=3)"],
    "a block inside a block": ["parallel.fsdp=dict(enable=False,deeper=dict(enable=True))"],
    "size 1 in parallel": ["parallel.expert=dict(size=1,no_tp='?')", "parallel.context=dict(size=1,ring=True)"],
    "size 1, the int form": ["parallel.context=1"],
    "no window": ["model.use_sliding_window=False", "model.sliding_window=-3", "model.max_window_layers=28"],
    "one expert": ["model.num_experts=1", "model.moe_use_residual=True", "model.moe_layer_kwargs=dict(a=1)"],
    "no pipeline": ["parallel.pipeline=dict(size=1,mode='ZBH1',use_zeropp=True,zero_bubble=True)"],
    "no pipeline, the int form": ["parallel.pipeline=1", "data.unit_schedule_size=4"],
    "no saving": ["ckpt=dict(enable_save_ckpt=False,checkpoint_every=0,keep_last=0,enable_internevo2hf_ckpt=True)"],
    "no images": ["data.is_multimodal=False", "data.vocab_file='v'", "data.image_folder='i'"],
    "no validation": ["data.valid_every=0", "data.valid_micro_num=0"],
    "no samples": ["data.sample_every=0", "data.samples=dict(prompts=[],temperature=-1.0)"],
    "no benchmarks": ["data.eval_every=0", "data.evaluation=dict(tasks=[],limit=0)"],
    "no dynamic NTK": ["model.use_dynamic_ntk_rope=False", "model.rope_scaling_factor=0.5"],
    "no rotary scaling": ["model.rope_scaling=dict(type='default',factor=-1,foo=2)"],
    "nothing to load": ["ckpt.load_ckpt_info=dict(path=None,content=3,ckpt_type=4)"],
    "greedy": ["generation=dict(do_sample=False,temperature=-1.0,top_p=7.0)"],
    "no overlap": ["parallel.weight=dict(size=1,overlap=False,launch_allgather_before='x')"],
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.py"
    path.write_text(BASE)
    return str(path)


@pytest.mark.parametrize("name", OFF)
def test_a_block_that_is_off_asks_for_nothing(name: str, config: str) -> None:
    plain = load_config(config).config
    loaded = load_config(config, OFF[name])
    assert loaded.config.model == plain.model
    assert loaded.config.parallel == plain.parallel
    assert not [words for words in loaded.warnings if "no effect" in words]


@pytest.mark.parametrize(
    "sets",
    [
        ["parallel.sequence_2D=dict(enable=True,head_size=2,context_size=2)"],
        ["parallel.context=dict(size=2)"],
        ["tensor=dict(size=1)"],
        ["data.extra=dict(size=1)"],
        ["model.num_experts=2"],
        ["parallel.pipeline=dict(size=2,mode='ZBH1')"],
        ["ckpt=dict(enable_save_ckpt=True,save_ckpt_folder='x',checkpoint_every=0)"],
        ["data.valid_every=5", "data.valid_micro_num=0"],
        ["data.use_shm=False", "data.shm_pathh='x'"],
    ],
    ids=str,
)
def test_a_block_that_is_on_or_unknown_is_still_checked(
    sets: list[str], config: str
) -> None:
    with pytest.raises(ConfigError):
        load_config(config, sets)


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["data.samples.prompts=['Hello']"], "data.samples.prompts"),
        (["data.evaluation.tasks=['arc.yaml']"], "data.evaluation.tasks"),
        (["model.rope_scaling_factor=2.0"], "model.rope_scaling_factor"),
        (["data.shm_path='/tmp/x'"], "data.shm_path"),
        (["data.valid_folder='v'"], "data.valid_folder"),
        (["parallel.pipeline.balance=True"], "parallel.pipeline.balance"),
        (["ckpt.checkpoint_every=5"], "ckpt.checkpoint_every"),
        (["ckpt.keep_last=5"], "ckpt.keep_last"),
        (["lr_scheduler.warmup_start=0.1"], "lr_scheduler.warmup_start"),
        (["data.content_name='body'"], "data.content_name"),
        (["data.type='hf'", "data.tokenizer_path='t'", "data.dataset_weights=dict(a=1.0)"], "data.dataset_weights"),
        (["model_type=LLAMA2", "model.apply_post_layer_norm=True"], "model.apply_post_layer_norm"),
        (["model.top_k=2"], "model.top_k"),
        (["parallel.weight.launch_allgather_before=wqkv"], "parallel.weight.launch_allgather_before"),
        (["generation.length_penalty=2.0"], "generation.length_penalty"),
        (["hybrid_zero_optimizer.all_gather_size=5"], "hybrid_zero_optimizer.all_gather_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_key_without_effect_says_so(sets: list[str], key: str, config: str) -> None:
    warnings = load_config(config, sets).warnings
    named = [words for words in warnings if words.startswith(f"{key} (--set)")]
    assert len(named) == 1
    assert "no effect" in named[0]


@pytest.mark.parametrize(
    "sets",
    [
        ["model.rope_scaling_factor=2.0", "model.use_dynamic_ntk_rope=True"],
        ["model.rope_scaling=dict(type='dynamic',factor=2.0)"],
        ["model.rope_scaling_factor=1.0"],
        ["data.valid_folder='v'", "data.valid_every=2"],
        ["ckpt.checkpoint_every=5", "ckpt.save_ckpt_folder='x'"],
        ["lr_scheduler.warmup_start=0.1", "lr_scheduler.warmup_ratio=0.1"],
        [
            "data.type='streaming'",
            "data.tokenizer_path='t'",
            "data.content_name='body'",
        ],
        ["model_type=INTERNLM2", "model.apply_post_layer_norm=True"],
    ],
    ids=str,
)
def test_a_key_with_an_effect_is_not_reported(sets: list[str], config: str) -> None:
    warnings = load_config(config, sets).warnings
    assert not [words for words in warnings if "no effect" in words]


def test_every_switch_of_the_table_turns_its_keys_off() -> None:
    for switch in SWITCHES:
        value = next(value for value in (False, 0) if switch.is_off(value))
        nested: object = value
        for part in reversed(switch.key.split(".")):
            nested = {part: nested}
        assert isinstance(nested, dict)
        off = find_off_keys(nested)
        for key in switch.governed:
            assert key.replace(".*", ".anything") in off
        assert switch.key not in off


@pytest.mark.parametrize(
    ("parallel", "word"),
    [
        ("dict(tensor=dict(size=4,mode='isp'),sequence_2D=dict(enable=True,head_size=4,context_size=1))", ""),
        ("dict(tensor=dict(size=4,mode='isp'),sequence_2D=dict(enable=True,head_size=1,context_size=4))", "same"),
        ("dict(tensor=dict(size=4,mode='isp'),sequence_2D=dict(enable=True,head_size=2,context_size=2))", "ring"),
        ("dict(tensor=dict(size=4,mode='isp'),sequence_2D=dict(enable=True,head_size=2))", "tensor.size"),
        ("dict(tensor=dict(size=4,mode='msp'),sequence_2D=dict(enable=True,head_size=4,context_size=1))", "mode"),
        ("dict(tensor=dict(size=4,mode='isp'),sequence_2D=3)", "found 3"),
    ],
)  # fmt: skip
def test_two_dimensional_sequence_parallelism_is_isp_where_one_size_is_1(
    parallel: str, word: str, config: str
) -> None:
    isp = load_config(config, ["parallel.tensor=dict(size=4,mode='isp')"]).config
    sets = [f"parallel={parallel}"]
    if word in ("", "same"):
        loaded = load_config(config, sets)
        assert loaded.config.parallel == isp.parallel
        assert any("sequence_2D" in words for words in loaded.warnings) == bool(word)
        return
    with pytest.raises(ConfigError) as caught:
        load_config(config, sets)
    (problem,) = caught.value.problems
    assert word in problem.found
    assert problem.expected


def test_a_hugging_face_type_takes_the_folder_of_its_checkpoint(config: str) -> None:
    folder = Path(__file__).parents[2] / "support" / "llama_sizes"
    info = f"ckpt=dict(auto_resume=False,load_ckpt_info=dict(path='local:{folder}',ckpt_type='hf_model'))"
    loaded = load_config(config, ["model_type=INTERNLM_FROM_HF", info]).config
    from_hf = load_config(config, [f"model.from_hf='{folder}'"]).config
    assert loaded.model == from_hf.model
    with pytest.raises(ConfigError, match="there is none"):
        load_config(config, ["model_type=AUTO"])
