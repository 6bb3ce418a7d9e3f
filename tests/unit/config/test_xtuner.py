"""XTuner's configs: what each key becomes, with which unit, from which line, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evomesh.config.loader import LoadedConfig, load_config
from evomesh.config.reading.draft import leaves
from evomesh.config.reading.spellings import written_key
from evomesh.errors import ConfigError
from tests.support.covers import covers
from tests.support.xtuner import CONFIGS, ROOT, model_folder, write_config

Edit = tuple[str, str]
MODEL = 'pretrained_model_name_or_path = "internlm/internlm2-7b"'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with an empty cache of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def load(
    folder: Path, *edits: Edit, overrides: tuple[str, ...] = (), **options: Any
) -> LoadedConfig:
    return load_config(write_config(folder / "c.py", *edits, **options), overrides)


def values(loaded: LoadedConfig) -> dict[str, Any]:
    return {
        written_key(key): value for key, value in leaves(loaded.config.model_dump())
    }


TEMPLATE = {
    "JOB_NAME": "c",
    "run_dir": "./work_dirs/c",
    "enable_tb": False,
    "model_type": "INTERNLM2_PUBLIC",
    "model.num_layers": 32,
    "model.hidden_size": 4096,
    "model.num_kv_attention_heads": 8,
    "model.vocab_size": 92544,
    "model.rope_base": 1e6,
    "model.no_bias": True,
    "model.qk_interleaved": False,
    "model.dtype": "bfloat16",
    "model.checkpoint": 1.0,
    "data.type": "tokenized",
    "data.train_folder": "/path/to/sft/data/folder",
    "data.data_order_path": None,
    "data.min_length": 0,
    "data.seq_len": 32768,
    "data.micro_bsz": 1,
    "data.micro_num": 1,
    "data.pack_sample_into_one": False,
    "data.order": "xtuner",
    "data.seed": 1024,
    "data.num_worker": 4,
    "data.epochs": 1,
    "adam.lr": 4e-5,
    "adam.adam_beta1": 0.9,
    "adam.adam_beta2": 0.95,
    "adam.weight_decay": 0.01,
    "hybrid_zero_optimizer.clip_grad_norm": 1.0,
    "lr_scheduler.warmup_ratio": 0.025,
    "lr_scheduler.warmup_start": 1 / 40,
    "lr_scheduler.eta_min": 0.15 * 4e-5,
    "parallel.tensor.size": 1,
    "parallel.zero1.size": -1,
    "ckpt.enable_save_ckpt": True,
    "ckpt.save_ckpt_folder": "local:./work_dirs/c",
    "ckpt.checkpoint_every": 500,
    "ckpt.keep_last": 2,
    "ckpt.save_optimizer": True,
    "ckpt.auto_resume": False,
    "ckpt.load_ckpt_info.path": "internlm/internlm2-7b",
    "ckpt.load_ckpt_info.content": ("model",),
    "ckpt.load_ckpt_info.ckpt_type": "hf",
}


def test_every_setting_of_the_template(here: Path) -> None:
    loaded = load(here)
    found = values(loaded)
    assert {key: found[key] for key in TEMPLATE} == TEMPLATE
    assert loaded.config.model.mlp_width == 14336
    assert [
        words
        for words in loaded.warnings
        if "hf download internlm/internlm2-7b" in words
    ]
    # That, and the prompts that are not answered during training.
    assert len(loaded.warnings) == 2


def test_each_value_names_the_line_that_decides_it(here: Path) -> None:
    origins = load(here, overrides=("betas=(0.9, 0.98)",)).origins
    text = (here / "c.py").read_text().splitlines()

    def line(key: str) -> str:
        place, _, name = origins[key].removesuffix(")").partition(" ")
        return f"{name.split()[0]} <- {text[int(place.rpartition(':')[2]) - 1].strip()}"

    assert line("adam.lr") == "lr <- lr = 4e-5"
    assert (
        line("data.train_folder")
        == 'dataset_folder <- dataset_folder = "/path/to/sft/data/folder"'
    )
    assert (
        line("data.min_length")
        == "train_dataset.dataset_cfg.min_length <- min_length=0,"
    )
    assert "sampler=dict(type=InternRepoSampler" in line("data.order")
    assert origins["adam.adam_beta2"] == "--set betas"
    assert origins["adam.adam_eps"] == "XTuner's default of optim_wrapper.optimizer.eps"


# The +/- pairs of XTuner's two guides, as a user types them, and what each is meant to change.
GUIDES: dict[str, tuple[tuple[Edit, ...], dict[str, Any]]] = {
    "another model": (
        ((MODEL, MODEL.replace("7b", "20b")),),
        {
            "model.num_layers": 48,
            "model.hidden_size": 6144,
            "ckpt.load_ckpt_info.path": "internlm/internlm2-20b",
        },
    ),
    "data and length": (
        (
            (
                "dataset_folder = ",
                'TRAIN_FOLDER, SEQ_LEN = "tree/train", 2048\ndataset_folder = TRAIN_FOLDER or ',
            ),
            ("max_length = 32768", "max_length = SEQ_LEN"),
            ("min_length=0", "min_length=50"),
        ),
        {
            "data.train_folder": "tree/train",
            "data.seq_len": 2048,
            "data.min_length": 50,
        },
    ),
    "whole packs": (
        (("use_varlen_attn = True", "use_varlen_attn = False"),),
        {"data.pack_sample_into_one": True},
    ),
    "accumulation and epochs": (
        (
            ("accumulative_counts = 1\n", "accumulative_counts = 4\n"),
            ("max_epochs = 1", "max_epochs = 3"),
        ),
        {"data.micro_num": 4, "data.epochs": 3, "ckpt.checkpoint_every": 125},
    ),
    "sequence parallel": (
        (
            ("sequence_parallel_size = 1", "sequence_parallel_size = 2"),
            ("accumulative_counts = 1\n", "accumulative_counts = 2 * 1 * 2 / 2\n"),
            ("accumulative_counts *= sequence_parallel_size\n", ""),
            (
                "from xtuner.dataset.samplers import InternRepoSampler",
                "from xtuner.parallel.sequence import SequenceParallelSampler",
            ),
            (
                "dict(type=InternRepoSampler, shuffle=True, seed=1024)",
                "dict(type=SequenceParallelSampler)",
            ),
        ),
        {
            "parallel.tensor.size": 2,
            "parallel.tensor.mode": "isp",
            "data.micro_num": 2,
            "ckpt.checkpoint_every": 250,
        },
    ),
    "weights only": (
        (
            (
                "type=CheckpointHook,\n",
                "type=CheckpointHook,\n        save_optimizer=False,\n",
            ),
        ),
        {"ckpt.save_optimizer": False},
    ),
    "order of the files": (
        (("data_order_path=None", "data_order_path='/folder/'+'data_order.txt'"),),
        {"data.data_order_path": "/folder/data_order.txt"},
    ),
}


@covers("promise:xtuner-config")
@pytest.mark.parametrize("name", GUIDES)
def test_edits_of_the_guides(name: str, here: Path) -> None:
    edits, changed = GUIDES[name]
    before = values(load(here))
    after = values(load(here, *edits))
    assert {key: after[key] for key in changed} == changed
    # Sizes of another model; figures of float arithmetic.
    follows = ("model.", "lr_scheduler.")
    unrelated = [
        key for key in before if key not in changed and not key.startswith(follows)
    ]
    assert {key: after[key] for key in unrelated} == {
        key: before[key] for key in unrelated
    }


def test_the_template_multiplies_accumulation_by_the_sequence_size_once(
    here: Path,
) -> None:
    loaded = load(
        here,
        ("sequence_parallel_size = 1", "sequence_parallel_size = 4"),
        ("accumulative_counts = 1\n", "accumulative_counts = 2\n"),
    )
    data, parallel = loaded.config.data, loaded.config.parallel
    gpus = 64
    ours = gpus // parallel.tensor.size * data.micro_num * data.packed_length
    # XTuner: N / SP x the number that mmengine receives x max_length.
    theirs = gpus // 4 * (2 * 4) * 32768
    assert ours == theirs


# Units: mmengine counts micro-iterations, evomesh steps.
UNITS: list[tuple[tuple[Edit, ...], dict[str, Any], str]] = [
    (
        (
            (
                "train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)",
                "train_cfg = dict(max_iters=400)\nparam_scheduler = None",
            ),
        ),
        {"data.total_steps": 50, "data.epochs": None, "ckpt.checkpoint_every": 62},
        "500 micro-iterations are 62.5 steps of 8",
    ),
    (
        (
            (
                "train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)",
                "train_cfg = dict(max_iters=401)\nparam_scheduler = None",
            ),
        ),
        {"data.total_steps": 50},
        "the last 1 would end no step",
    ),
    ((("save_steps = 500", "save_steps = 800"),), {"ckpt.checkpoint_every": 100}, ""),
    (
        (("save_steps = 500", "save_steps = 3"),),
        {"ckpt.checkpoint_every": 1},
        "a checkpoint every 1 step",
    ),
    (
        (
            ("by_epoch=False,\n", "by_epoch=True,\n"),
            ("interval=save_steps", "interval=2"),
        ),
        {"ckpt.checkpoint_every_epochs": 2, "ckpt.checkpoint_every": float("inf")},
        "",
    ),
    (
        (("interval=save_steps", "interval=-1"),),
        {"ckpt.checkpoint_every": float("inf")},
        "",
    ),
    (
        (
            ("use_varlen_attn = True", "use_varlen_attn = False"),
            ("batch_size = 1", "batch_size = 3"),
        ),
        {"data.micro_num": 24, "data.micro_bsz": 1},
        "",
    ),
]


@pytest.mark.parametrize(("edits", "expected", "warning"), UNITS)
def test_units(
    edits: tuple[Edit, ...], expected: dict[str, Any], warning: str, here: Path
) -> None:
    loaded = load(
        here, ("accumulative_counts = 1\n", "accumulative_counts = 8\n"), *edits
    )
    found = values(loaded)
    assert {key: found[key] for key in expected} == expected
    assert warning in "\n".join(loaded.warnings)


RUNTIME: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("work_dir=out",), {"run_dir": "out", "ckpt.save_ckpt_folder": "local:out"}),
    (("randomness.seed=7",), {"seed": 7, "data.seed": 1024}),
    (("randomness.deterministic=True",), {"cudnn_deterministic": True}),
    (
        ("resume=True",),
        {"ckpt.auto_resume": True, "ckpt.load_ckpt_info.fallback": True},
    ),
    (
        ("resume=True", "load_from=old"),
        {
            "ckpt.auto_resume": False,
            "ckpt.load_ckpt_info.path": "old",
            "ckpt.load_ckpt_info.content": ("all",),
        },
    ),
    (
        ("load_from=old",),
        {
            "ckpt.load_ckpt_info.content": ("model",),
            "ckpt.load_ckpt_info.ckpt_type": "internevo",
        },
    ),
    (
        ("visualizer=dict(vis_backends=[dict(type='TensorboardVisBackend')])",),
        {"enable_tb": True},
    ),
    (("save_total_limit=-1",), {"ckpt.keep_last": None}),
    (("optim_wrapper.dtype=float16",), {"model.dtype": "float16"}),
    (("optim_wrapper.clip_grad=None",), {"hybrid_zero_optimizer.clip_grad_norm": 0.0}),
    (("model.use_activation_checkpointing=False",), {"model.checkpoint": 0.0}),
    (
        ("sequence_parallel_size=2", "max_length=64"),
        {"parallel.tensor.size": 2, "data.micro_num": 2},
    ),
    # ours, over the translation
    (
        ("model.dtype=torch.float32", "data.total_steps=7"),
        {"model.dtype": "float32", "data.total_steps": 7},
    ),
    (("data.total_steps=7",), {"data.epochs": None}),
    (
        ("param_scheduler=None",),
        {"lr_scheduler.eta_min": 4e-5, "lr_scheduler.warmup_ratio": 0.0},
    ),
]


@pytest.mark.parametrize(
    ("overrides", "expected"), RUNTIME, ids=lambda value: str(value)[:60]
)
def test_runtime(
    overrides: tuple[str, ...], expected: dict[str, Any], here: Path
) -> None:
    found = values(load(here, overrides=overrides))
    assert {key: found.get(key) for key in expected} == expected


REFUSED: list[tuple[tuple[Edit, ...], tuple[str, ...], str]] = [
    ((("llm=dict(", 'lora=dict(type="peft.LoraConfig", r=64),\n    llm=dict('),), (), r"model\.lora.*LoRA is not part"),
    ((), ("model.llm.quantization_config=dict(load_in_4bit=True)",), r"QLoRA .* is not part"),
    ((("SupervisedFinetune", "DPO"),), (), r"DPO is not part"),
    ((("optim_type = AdamW", "optim_type = Lion"), ("import AdamW", "import Lion")), (), r"Lion is not part"),
    ((), ("optim_wrapper.optimizer.weight_decoy=0.1",), r"did you mean optim_wrapper\.optimizer\.weight_decay"),
    ((), ("train_dataloader.dataset.dataset_cfg.foldr=x",), r"unknown key 'foldr'(.|\n)*did you mean .*folder"),
    ((), ("max_lenght=512",), r"unknown key 'max_lenght'"),
    ((), ("train_cfg.max_iters=10",), r"exactly one of them"),
    ((), ("train_cfg=dict(max_iters=10)",), r"the schedule counts passes, train_cfg counts micro-iterations"),
    ((), ("accumulative_counts=1.5", "sequence_parallel_size=1"), r"1\.5 micro-iterations(.|\n)*such as 1 or 2"),
    ((("batch_size = 1\n", "batch_size = 2\n"),), (), r"2 with use_varlen_attn=True"),
    ((), ("sequence_parallel_size=3",), r"3 does not divide max_length=32768"),
    ((), ("param_scheduler=[dict(type='PolyLR')]",), r"found PolyLR(.|\n)*LinearLR from the start"),
    ((), ("pretrained_model_name_or_path=nobody/nothing",), r"hf download nobody/nothing"),
    ((("llm=dict(", "max_position_embeddings=65536,\n    llm=dict("),), (), r"linear rotary scaling"),
    ((), ("train_dataset.dataset_cfg.file_type=.json",), r"token files end so"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edits", "overrides", "message"), REFUSED, ids=[row[2] for row in REFUSED]
)
def test_refused(
    edits: tuple[Edit, ...], overrides: tuple[str, ...], message: str, here: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(here, *edits, overrides=overrides)
    assert "1 problem in the config" in str(caught.value)


def test_sizes_come_from_the_model_folder(here: Path) -> None:
    model_folder(here / "tiny", tie_word_embeddings=False)
    loaded = load(
        here, overrides=("pretrained_model_name_or_path=tiny", "max_length=64")
    )
    model = loaded.config.model
    assert (model.model_type, model.num_layers, model.hidden_size, model.kv_heads) == (
        "LLAMA2",
        2,
        32,
        2,
    )
    assert (model.mlp_width, model.rope_base, model.layer_norm_epsilon) == (
        48,
        5000.0,
        1e-6,
    )
    assert loaded.origins["model.hidden_size"] == "tiny/config.json hidden_size"
    assert len(loaded.warnings) == 1


def test_a_model_in_the_cache_is_found_by_its_id(here: Path) -> None:
    snapshot = model_folder(here / "hub" / "models--owner--tiny" / "snapshots" / "abc")
    (snapshot / "tokenizer.model").touch()
    refs = here / "hub" / "models--owner--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    config = load(here, overrides=("pretrained_model_name_or_path=owner/tiny",)).config
    assert config.model.hidden_size == 32 and config.data.tokenizer_path == str(
        snapshot
    )


@pytest.mark.parametrize("window", [None, 16])
def test_mistral_is_read_with_its_window(window: int | None, here: Path) -> None:
    model_folder(here / "tiny", model_type="mistral", sliding_window=window)
    model = load(here, overrides=("pretrained_model_name_or_path=tiny",)).config.model
    assert (model.model_type, model.sliding_window) == ("MISTRAL", window)
    assert not model.has_qkv_bias and not model.has_o_bias


@pytest.mark.slow
def test_nothing_that_a_config_imports_is_imported(here: Path) -> None:
    """None of the packages is needed, and of those that are installed none is loaded."""
    path = write_config(
        here / "c.py",
        ("import AdamW", "import AdamW\nimport torch.cuda as cuda\nimport datasets"),
    )
    program = (
        "import sys\nfrom evomesh.config.loader import load_config\n"
        f"load_config({str(path)!r})\n"
        "print({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'datasets', 'peft', 'mmengine', 'xtuner'})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_a_name_of_another_package_has_no_truth(here: Path) -> None:
    path = write_config(
        here / "c.py",
        (
            "\n# PART 1",
            "\nimport torch\nlr = 1.0 if torch.cuda.is_available() else 2.0\n# PART 1",
        ),
    )
    with pytest.raises(
        ConfigError, match=r"torch\.cuda\.is_available\(\.\.\.\) is not run"
    ):
        load_config(path)


def test_a_config_that_mmengine_dumped(here: Path) -> None:
    """mmengine writes classes as dotted strings and imports nothing."""
    (here / "dumped.py").write_text(
        "model = dict(type='xtuner.model.SupervisedFinetune', use_varlen_attn=True, llm=dict("
        "pretrained_model_name_or_path='internlm/internlm2-7b', "
        "type='transformers.AutoModelForCausalLM.from_pretrained'))\n"
        "train_dataloader = dict(batch_size=1, num_workers=4, dataset=dict(packed_length=4096, seed=1024, "
        "type='xtuner.dataset.intern_repo.build_packed_dataset', dataset_cfg=dict(folder='d', "
        "type='xtuner.dataset.intern_repo.load_intern_repo_tokenized_dataset')), "
        "sampler=dict(seed=1024, shuffle=True, type='xtuner.dataset.samplers.InternRepoSampler'))\n"
        "optim_wrapper = dict(type='mmengine.optim.AmpOptimWrapper', accumulative_counts=2, "
        "optimizer=dict(type='torch.optim.AdamW', lr=4e-05, betas=(0.9, 0.95)))\n"
        "param_scheduler = [dict(type='mmengine.optim.CosineAnnealingLR', eta_min=0.0, T_max=1)]\n"
        "train_cfg = dict(type='xtuner.engine.runner.TrainLoop', max_epochs=1)\n"
        "custom_hooks = [dict(type='xtuner.engine.hooks.ThroughputHook')]\nlauncher = 'pytorch'\n"
    )
    found = values(load_config(here / "dumped.py"))
    expected = {
        "data.seq_len": 4096,
        "data.micro_num": 2,
        "data.train_folder": "d",
        "adam.adam_beta2": 0.95,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["ckpt.enable_save_ckpt"] is False


@pytest.mark.parametrize(
    "text",
    [
        '_base_ = "c.py"\nmax_length = 64\ntrain_dataset = dict(packed_length=64)\n'
        "train_dataloader = dict(dataset=dict(packed_length=64))\n",
        "from mmengine.config import read_base\nwith read_base():\n    from .c import *\n"
        "train_dataloader['dataset']['packed_length'] = 64\n",
        "from c import *\nfrom xtuner.model import SupervisedFinetune\n"
        "train_dataloader['dataset']['packed_length'] = 64\n",
    ],
    ids=["_base_", "read_base", "import"],
)
def test_configs_on_top_of_others(text: str, here: Path) -> None:
    write_config(here / "c.py")
    (here / "child.py").write_text(text)
    config = load_config(here / "child.py").config
    assert (config.data.seq_len, config.adam.lr, config.run.job_name) == (
        64,
        4e-5,
        "child",
    )


RAW = "internlm2_7b_w_untokenized_dataset"
TYPES = "dict(type=template_map_fn_factory, template=prompt_template)"


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (
            "",
            [
                "tokenize",
                "/path/to/sft/data/folder",
                "--format",
                "messages",
                "chatml",
                "32768",
            ],
        ),
        (
            "dict(type=process_hf_dataset, dataset=dict(type=load_dataset, path='json', data_files=['a.json']), "
            f"max_length=512, dataset_map_fn=alpaca_map_fn, template_map_fn={TYPES})",
            ["a.json", "--format", "alpaca", "chatml", "512"],
        ),
        (
            "dict(type=process_hf_dataset, dataset=dict(path='json', data_files=dict(train='b.json')), "
            "max_length=512, dataset_map_fn=pretrain_map_fn, template_map_fn=None)",
            ["b.json", "--format", "text"],
        ),
        (
            "dict(type=process_hf_dataset, dataset=dict(path='json', data_files='c.json'), max_length=512, "
            "template_map_fn=None)",
            ["c.json", "--format", "xtuner", "--chat-template", "tokenizer"],
        ),
    ],
)
def test_raw_data_is_tokenized_by_a_command(
    dataset: str, expected: list[str], here: Path
) -> None:
    imports = "from datasets import load_dataset\nfrom xtuner.dataset import process_hf_dataset\n"
    imports += "from xtuner.dataset.map_fns import alpaca_map_fn, pretrain_map_fn\n"
    edits = (
        [
            (
                "# PART 4: ",
                f"{imports}\ntrain_dataloader['dataset'] = {dataset}\n# PART 4: ",
            )
        ]
        if dataset
        else []
    )
    loaded = load(here, *edits, name=RAW)
    (command,) = loaded.preparation
    assert set(expected) <= set(command)
    assert loaded.config.data.train_folder == "work_dirs/c/tokenized"
    assert command[command.index("--output") + 1].startswith("work_dirs/c/tokenized/")
    assert any("evomesh tokenize" in words for words in loaded.warnings)
    # Chats with the model use the template of the conversations.
    chatml = "chatml" if "chatml" in expected else None
    assert loaded.config.data.chat_template == chatml


def test_a_template_that_is_not_built_in_is_reported(here: Path) -> None:
    loaded = load_with_template(here, "moss_sft")
    (command,) = loaded.preparation
    assert command[command.index("--chat-template") + 1] == "tokenizer"
    assert loaded.config.data.chat_template is None
    assert any(
        "no template moss_sft: the conversations get the tokenizer's own" in words
        for words in loaded.warnings
    )


def load_with_template(here: Path, name: str) -> LoadedConfig:
    """A config whose conversations get a prompt template of XTuner."""
    edit = ("PROMPT_TEMPLATE.internlm2_chat", f"PROMPT_TEMPLATE.{name}")
    dataset = "train_dataset"
    use = f"""
from xtuner.dataset import process_hf_dataset
{dataset} = dict(type=process_hf_dataset, dataset=dict(path='json', data_files='c.json'), max_length=512,
                 template_map_fn=dict(type=template_map_fn_factory, template=prompt_template))
train_dataloader['dataset'] = {dataset}
# PART 4: """
    return load(here, edit, ("# PART 4: ", use), name=RAW)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("vicuna", "xtuner_vicuna"),
        ("mixtral", "xtuner_mistral"),
        ("default", "xtuner_default"),
    ],
)
def test_a_template_without_special_tokens(here: Path, theirs: str, ours: str) -> None:
    loaded = load_with_template(here, theirs)
    (command,) = loaded.preparation
    assert command[command.index("--chat-template") + 1] == ours
    assert loaded.config.data.chat_template == ours
    assert not any("no template" in words for words in loaded.warnings)


def test_a_map_function_of_the_user_is_refused_with_the_formats(here: Path) -> None:
    edit = ("# PART 4", "def mine(x):\n    return x\n\ntrain_dataset = dict(type='process_hf_dataset', "
            "dataset=dict(path='json', data_files='c.json'), dataset_map_fn=mine)\n"
            "train_dataloader['dataset'] = train_dataset\n# PART 4")  # fmt: skip
    with pytest.raises(ConfigError, match=r"mine is not run(.|\n)*alpaca_map_fn"):
        load(here, edit, name=RAW)


@covers("promise:copy-cfg")
@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem
)
def test_shipped_configs_are_of_the_models_they_name(path: Path, here: Path) -> None:
    found = load_config(path).config
    layers = {
        "internlm2_1_8b": 24,
        "internlm2_7b": 32,
        "internlm2_20b": 48,
        "mistral_7b": 32,
    }
    name = path.stem.partition("_w_")[0]
    assert found.model.num_layers == layers[name]
    assert found.model.model_type == (
        "MISTRAL" if name == "mistral_7b" else "INTERNLM2_PUBLIC"
    )
