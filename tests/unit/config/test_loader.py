"""What a config file may be written like, and what comes out of it."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from evomesh.config.json_codec import decode_json, encode_json
from evomesh.config.loader import LoadedConfig, load_config
from evomesh.config.reading import source_lines
from evomesh.config.reading.overrides import parse_value
from evomesh.config.reading.source_lines import config_lines
from evomesh.config.record import config_from_dict, config_to_dict
from evomesh.config.warning_lines import warning_lines
from evomesh.errors import UserError
from tests.support.covers import covers

BASE = 'data = dict(train_folder="x")\nmodel = dict(dtype="torch.float32")\n'


def load(folder: Path, text: str, *sets: str) -> LoadedConfig:
    path = folder / "config.py"
    path.write_text(text)
    return load_config(str(path), sets)


def test_authors_own_names_are_not_keys(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nimport os\nfrom pathlib import Path\nSEQ = 64\n_hidden = 3\n"
        "def f(x):\n    return x\nclass Own:\n    pass\n"
        "registry = Own()\ndata = dict(seq_len=f(SEQ), train_folder=os.sep)\n"
    )
    assert load(tmp_path, text).config.data.seq_len == 64


def test_an_override_reaches_what_is_computed_from_it(tmp_path: Path) -> None:
    text = (
        "SEQ = 64\ndata = dict(seq_len=SEQ, total_steps=100)\nlr_scheduler = dict(total_steps=data['total_steps'])\n"
        "EVERY = 50\nckpt = dict(checkpoint_every=int(EVERY / 2))\n"
    )
    config = load(tmp_path, text, "data.total_steps=7", "SEQ=32", "EVERY=8").config
    assert (
        config.lr_scheduler.total_steps,
        config.data.seq_len,
        config.ckpt.checkpoint_every,
    ) == (7, 32, 4)
    assert (
        load(
            tmp_path, text, "data.total_steps=7", "lr_scheduler.total_steps=9"
        ).config.lr_scheduler.total_steps
        == 9
    )


def test_overrides_of_int_and_dict_forms(tmp_path: Path) -> None:
    dicts = (
        BASE + 'parallel = dict(zero1=dict(size=-1), tensor=dict(size=1, mode="fsp"))\n'
    )
    ints = BASE + "parallel = dict(zero1=8, tensor=1)\n"
    assert load(tmp_path, dicts, "parallel.zero1=4").config.parallel.zero1.size == 4
    assert (
        load(tmp_path, dicts, "parallel.tensor=1").config.parallel.tensor.mode == "fsp"
    )
    assert load(tmp_path, ints, "parallel.zero1.size=2").config.parallel.zero1.size == 2
    assert (
        load(
            tmp_path, BASE, "ckpt.load_ckpt_folder=local:a/1"
        ).config.ckpt.load_ckpt_info
        is not None
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-4", 1e-4), ("True", True), ("true", True), ("None", None), ("inf", math.inf), ("abc", "abc"),
     ("[2, 0]", [2, 0]), ("dict(a=1, b=dict(c=2))", {"a": 1, "b": {"c": 2}}), ("'1'", "1"), ("", ""),
     ("local:a/b", "local:a/b"), ("__import__('os')", "__import__('os')"), ('float("inf")', math.inf)],
)  # fmt: skip
def test_override_values(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_read_base_and_relative_imports(tmp_path: Path) -> None:
    (tmp_path / "_base_").mkdir()
    (tmp_path / "_base_" / "runtime.py").write_text(
        "seed = 3\nadam = dict(\n    lr=0.5,\n)\n"
    )
    text = (
        "from somewhere.unknown import read_base\nwith read_base():\n    from _base_.runtime import *\n"
        "    from ._base_.runtime import adam as loss_of_time\n"
        + BASE
        + "adam['adam_eps'] = 1e-6\n"
        "del loss_of_time\n"
    )
    for lr in (0.5, 0.25):  # a second load reads the changed file
        (tmp_path / "_base_" / "runtime.py").write_text(
            f"seed = 3\nadam = dict(\n    lr={lr},\n)\n"
        )
        loaded = load(tmp_path, text)
        assert (
            loaded.config.run.seed,
            loaded.config.adam.lr,
            loaded.config.adam.adam_eps,
        ) == (3, lr, 1e-6)
        assert loaded.origins["adam.lr"].endswith("_base_/runtime.py:3")
    assert not [
        name
        for name in sys.modules
        if name.startswith(("_base_", "evomesh_config_file"))
    ]


def test_each_imported_module_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of ten modules imports the next one twice; the last one imports the first."""
    for number in range(10):
        following = (number + 1) % 10
        text = f"from part_{following} import LR as FIRST\nfrom part_{following} import LR as SECOND\n"
        (tmp_path / f"part_{number}.py").write_text(
            "LR = 0.5\n" + (text if number < 9 else "import part_0\n")
        )
    parsed: list[str] = []
    parse = source_lines.ast.parse
    monkeypatch.setattr(
        source_lines.ast,
        "parse",
        lambda text, *more: parsed.append(text) or parse(text, *more),
    )
    loaded = load(tmp_path, "from part_0 import LR\nadam = dict(lr=LR)\n" + BASE)
    assert loaded.config.adam.lr == 0.5
    assert len([text for text in parsed if text.startswith("LR = 0.5")]) == 10


def test_a_config_that_imports_evomesh_does_not_read_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a config with a custom model does; in a checkout the package is not in site-packages."""
    files: list[str] = []
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **how: files.append(str(path)) or read(path, **how),
    )
    load(
        tmp_path,
        "from evomesh import register_model\nfrom evomesh.errors import UserError\n"
        + BASE,
    )
    # Packages that torch imports read their metadata, where nothing has imported it before.
    sources = [name for name in files if name.endswith(".py")]
    assert sources == [str(tmp_path / "config.py")]


@covers("promise:config-leaves-nothing")
def test_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    before = list(sys.path)
    for name, seed in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "shared_part.py").write_text(f"seed = {seed}\n")
        assert (
            load(folder, "from shared_part import *\n" + BASE).config.run.seed == seed
        )
    assert sys.path == before
    assert "shared_part" not in sys.modules


def test_a_byte_order_mark_is_not_part_of_the_config(tmp_path: Path) -> None:
    """Editors on Windows write one; Python reads such a file too."""
    (tmp_path / "_base_").mkdir()
    (tmp_path / "_base_/more.py").write_text(
        "adam = dict(\n    lr=0.5,\n)\n", encoding="utf-8-sig"
    )
    loaded = load(tmp_path, "\ufefffrom _base_.more import *\n" + BASE)
    assert loaded.config.adam.lr == 0.5
    assert loaded.origins["adam.lr"].endswith("_base_/more.py:2")


def test_modules_may_import_each_other(tmp_path: Path) -> None:
    (tmp_path / "first_part.py").write_text(
        "data = dict(seq_len=64)\nfrom second_part import *\n"
    )
    (tmp_path / "second_part.py").write_text("from first_part import data\nseed = 7\n")
    loaded = load(
        tmp_path, "from first_part import *\n" + BASE.replace("data", "_data")
    )
    assert loaded.config.run.seed == 7
    assert loaded.origins["data.seq_len"].endswith("first_part.py:1")
    assert loaded.origins["seed"].endswith("second_part.py:2")


def test_modules_of_evomesh_have_no_lines_of_keys() -> None:
    tree = ast.parse("from evomesh.config.schema import IGNORE\n")
    assert config_lines(tree, "config.py", {"__package__": "here"}) == {}


def test_base_by_path(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(BASE + "adam = dict(lr=0.5, adam_eps=1e-6)\n")
    loaded = load(
        tmp_path, '_base_ = "base.py"\nadam = dict(lr=0.25)\n', "adam.weight_decay=0.5"
    )
    adam = loaded.config.adam
    assert (adam.lr, adam.adam_eps, adam.weight_decay) == (0.25, 1e-6, 0.5)
    assert loaded.origins["adam.adam_eps"].endswith("base.py:3")


def test_origins(tmp_path: Path) -> None:
    text = BASE + 'JOB_NAME = "j"\nparallel = dict(zero1=8)\n'
    origins = load(
        tmp_path, text, "data.seq_len=64", "model_type=INTERNLM2_PUBLIC"
    ).origins
    path = tmp_path / "config.py"
    assert origins["JOB_NAME"] == f"{path}:3"
    assert origins["data.train_folder"] == f"{path}:1"
    assert origins["data.seq_len"] == origins["model_type"] == "--set"
    assert origins["parallel.zero1.size"] == f"legacy parallel.zero1 {path}:4"
    assert origins["parallel.zero1.fsdp"] == origins["adam.lr"] == "default"
    assert origins["model.qk_interleaved"] == "default of INTERNLM2_PUBLIC"


def test_family_defaults(tmp_path: Path) -> None:
    for family, interleaved in (
        ("INTERNLM", False),
        ("INTERNLM2_PUBLIC", False),
        ("LLAMA2", True),
    ):
        model = load(tmp_path, BASE, f"model_type={family}").config.model
        assert (model.qk_interleaved, model.no_bias) == (interleaved, False)
        assert load(
            tmp_path, BASE, f"model_type={family}", "model.adapt_hf=False"
        ).config.model.qk_interleaved


def test_own_model_type_keeps_its_own_keys(tmp_path: Path) -> None:
    model = load(
        tmp_path, BASE, "model_type=MINE", "model.experts=4", "model.num_layers=2"
    ).config.model
    assert (model.model_type, model.num_layers, model.extra) == (
        "MINE",
        2,
        {"experts": 4},
    )


def test_load_folder_forms(tmp_path: Path) -> None:
    def info(*sets: str) -> tuple[str, tuple[str, ...], str]:
        found = load(
            tmp_path, BASE, "ckpt.auto_resume=False", *sets
        ).config.ckpt.load_ckpt_info
        assert found is not None
        return found.path, found.content, found.ckpt_type

    assert info("ckpt.load_ckpt_folder=local:a") == ("local:a", ("all",), "internevo")
    assert info("ckpt.load_model_only_folder=a") == ("a", ("model",), "internevo")
    form = "ckpt.load_ckpt_folder=dict(path='a', content=['model', 'sampler'], ckpt_type='normal')"
    assert info(form) == ("a", ("model", "sampler"), "normal")
    both = load(
        tmp_path, BASE, "ckpt.load_ckpt_folder=a", "ckpt.load_ckpt_info=dict(path='b')"
    )
    assert both.config.ckpt.load_ckpt_info is not None
    assert both.config.ckpt.load_ckpt_info.path == "b"
    assert [w for w in both.warnings if w.startswith("ckpt.load_ckpt_folder")]


def test_a_load_path_of_none_is_a_start_from_scratch(tmp_path: Path) -> None:
    """As InternEvo's own configs/demo.py has it."""
    loaded = load(
        tmp_path,
        BASE,
        "ckpt.load_ckpt_info=dict(path=None, content=('model',), ckpt_type='internevo')",
    )
    assert loaded.config.ckpt.load_ckpt_info is None
    assert not [words for words in loaded.warnings if "load_ckpt_info" in words]


@covers("ckpt.load_optimizer")
@pytest.mark.parametrize(
    ("sets", "content"),
    [
        (("ckpt.load_ckpt_folder=a", "ckpt.load_optimizer=True"), ("all",)),
        (
            ("ckpt.load_ckpt_folder=a", "ckpt.load_optimizer=False"),
            ("model", "sampler", "scheduler"),
        ),
        (
            (
                "ckpt.load_ckpt_info=dict(path='a', content=['model', 'optimizer'])",
                "ckpt.load_optimizer=False",
            ),
            ("model",),
        ),
        (("ckpt.load_model_only_folder=a", "ckpt.load_optimizer=True"), ("model",)),
    ],
)
def test_load_optimizer(
    tmp_path: Path, sets: tuple[str, ...], content: tuple[str, ...]
) -> None:
    info = load(
        tmp_path, BASE, "ckpt.auto_resume=False", *sets
    ).config.ckpt.load_ckpt_info
    assert info is not None and info.content == content


def test_load_optimizer_without_anything_to_load(tmp_path: Path) -> None:
    assert not load(tmp_path, BASE, "ckpt.load_optimizer=True").warnings
    (words,) = load(tmp_path, BASE, "ckpt.load_optimizer=False").warnings
    assert words.startswith("ckpt.load_optimizer") and "no effect" in words
    with pytest.raises(
        UserError, match=r"ckpt.load_optimizer(.|\n)*expected: True or False"
    ):
        load(tmp_path, BASE, "ckpt.load_optimizer=1")


def test_warnings_are_said_once(tmp_path: Path) -> None:
    text = (
        BASE
        + "lr_scheduler = dict(total_steps=100)\ngrad_scaler = dict(hysteresis=2)\n"
    )
    warnings = load(
        tmp_path,
        text,
        "data.total_steps=50",
        "data.train_folder=None",
        "model.dtype=None",
    ).warnings
    assert len(warnings) == len(set(warnings))
    text = "\n".join(warnings)
    assert "100 differs from data.total_steps=50: training ends after 50 steps" in text
    assert "SYNTHETIC" in text
    assert "model.dtype (--set): is not set: float16" in text
    assert "grad_scaler" not in text  # float16 uses it
    assert "bfloat16: only float16" in "\n".join(
        load(
            tmp_path, BASE, "grad_scaler.hysteresis=2", "model.dtype=torch.bfloat16"
        ).warnings
    )


@covers("data.valid_every", "data.valid_folder")
@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["data.train_folder=d", "data.valid_every=2"], "data.valid_folder"),
        (["data.type=streaming", "data.tokenizer_path=t", "data.valid_every=2"], "data.valid_folder"),
        (["data.train_folder=None", "data.valid_every=2"], "data.train_folder"),
        (["data.train_folder=d", "data.valid_every=0"], None),
        (["data.train_folder=d", "data.valid_every=2", "data.valid_folder=v"], None),
    ],
    ids=str,
)  # fmt: skip
def test_synthetic_data_is_one_warning_however_many_there_are(
    tmp_path: Path, sets: list[str], key: str | None
) -> None:
    others = ["grad_scaler.hysteresis=2", "model.num_chunks=2", "data.use_shm=False"]
    found = load(tmp_path, BASE, *sets, *others, "model.dtype=torch.float32").warnings
    lines = warning_lines([*found, "a.b: x", "c.d: x", "e.f: x"], "my.py")
    synthetic = [words for words in lines if "SYNTHETIC data" in words]
    assert [words.split()[0].rstrip(":") for words in synthetic] == (
        [key] if key else []
    )


def test_a_rate_that_rises_at_the_end_is_a_warning(tmp_path: Path) -> None:
    sets = ("adam.lr=2e-6", "lr_scheduler.eta_min=1e-5")
    (text,) = [one for one in load(tmp_path, BASE, *sets).warnings if "eta_min" in one]
    assert "1e-05 is above adam.lr=2e-06" in text and "rises to it" in text
    assert not [
        one
        for one in load(tmp_path, BASE, sets[0], "lr_scheduler.eta_min=2e-6").warnings
        if "eta_min" in one
    ]


def test_record_is_strict_json_and_comes_back(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, BASE, "monitor.alert.feishu_alert_address=http://hook/SECRET", "generation.eos_id=[2, 0]",
        "ckpt.save_ckpt_folder=local:x", "data.train_folder=https://me:SECRET@host/x?token=SECRET",
    )  # fmt: skip
    text = json.dumps(encode_json(config_to_dict(loaded.config)), allow_nan=False)
    assert "SECRET" not in text
    back = config_from_dict(decode_json(json.loads(text)))
    assert back.model == loaded.config.model
    assert back.ckpt == loaded.config.ckpt
    assert back.generation == loaded.config.generation
    assert back.ckpt.checkpoint_every == math.inf
    assert config_to_dict(back) == config_to_dict(loaded.config)


def test_environment_names_the_tensorboard_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("tensorboard_folder", "from_env")
    loaded = load(tmp_path, BASE)
    assert loaded.config.run.tensorboard_folder == "from_env"
    assert (
        loaded.origins["tensorboard_folder"]
        == "environment variable tensorboard_folder"
    )


@pytest.mark.slow
def test_torch_is_never_imported() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom evomesh.cli.config import app\n"
        "result = CliRunner().invoke(app, ['check', 'configs/7B_sft.py'])\n"
        "assert result.exit_code == 0, result.output\nsys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode
        == 0
    )


def test_s3_endpoint_of_the_config(tmp_path: Path) -> None:
    """Paths then name their endpoint themselves; other forms stay, and the environment is not asked."""
    sets = [
        "ckpt.s3_endpoint=http://h:9000/",
        "ckpt.save_ckpt_folder=s3://b/runs",
        "ckpt.snapshot_ckpt_folder=local:x",
        "ckpt.load_ckpt_folder=s3://b/old/49",
    ]
    found = load(tmp_path, BASE, *sets).config.ckpt
    assert found.save_ckpt_folder == "s3:http://h:9000/b/runs"
    assert found.snapshot_ckpt_folder == "local:x"
    assert (
        found.load_ckpt_info is not None
        and found.load_ckpt_info.path == "s3:http://h:9000/b/old/49"
    )


@pytest.mark.parametrize("is_xtuner", [False, True])
@pytest.mark.parametrize(
    "chain", [("config.py",), ("a.py", "config.py"), ("a.py", "b.py", "a.py")]
)
def test_a_file_that_is_its_own_base(
    tmp_path: Path, chain: tuple[str, ...], is_xtuner: bool
) -> None:
    config = tmp_path / "config.py"
    config.write_text(BASE + f"_base_ = '{chain[0]}'\n")
    for file, base in pairwise(chain):
        if file != "config.py":
            (tmp_path / file).write_text(f"_base_ = '{base}'\n")
    if is_xtuner:
        config.write_text(
            f"from mmengine.config import read_base\n_base_ = '{chain[0]}'\n"
        )
    with pytest.raises(UserError, match="is its own base: ") as caught:
        load_config(str(config))
    assert f"-> {chain[-1]}" in str(caught.value)


@pytest.mark.parametrize("dot", ["", "."])
@pytest.mark.parametrize(
    "chain", [("config",), ("first", "config"), ("first", "second", "first")]
)
def test_a_file_whose_read_base_leads_back(
    tmp_path: Path, chain: tuple[str, ...], dot: str
) -> None:
    """Python would import what the unfinished file has assigned by then."""
    reads = "with read_base():\n    from {}{} import *\n"
    config = tmp_path / "config.py"
    config.write_text(BASE + reads.format(dot, chain[0]))
    for module, base in pairwise(chain):
        if module != "config":
            (tmp_path / f"{module}.py").write_text(reads.format(dot, base))
    with pytest.raises(UserError, match="is its own base: ") as caught:
        load_config(str(config))
    assert f"-> {chain[-1]}.py" in str(caught.value)


def test_two_files_of_read_base_may_share_one(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text("adam = dict(lr=7e-4)\n")
    reads = "with read_base():\n    from {} import *\n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(reads.format("shared"))
    config = tmp_path / "config.py"
    config.write_text(BASE + reads.format("one") + reads.format("two"))
    assert load_config(str(config)).config.adam.lr == 7e-4


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text("adam = dict(lr=7e-4)\n")
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("_base_ = 'shared.py'\n")
    config = tmp_path / "config.py"
    config.write_text(BASE + "_base_ = ['a.py', 'b.py']\n")
    assert load_config(str(config)).config.adam.lr == 7e-4


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export BOTO3_NOWHERE=VALUE"):
        load(tmp_path, 'import os\nIP = os.environ["BOTO3_NOWHERE"]\n')


def test_a_bare_name_is_pointed_to_the_shipped_configs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evomesh config copy NAME"):
        load_config("7B_nowhere")
