"""``evomesh xtuner`` and ``evomesh config translate``: what they write, print and refuse."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from typer.testing import CliRunner

from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.resume import decide
from evomesh.checkpoint.start_point import StartPoint
from evomesh.cli.app import app
from evomesh.cli.xtuner import app as xtuner_app
from evomesh.cli.xtuner_data import make_token_files
from evomesh.cli.xtuner_train import _parser, load_with_strategy, train_overrides
from evomesh.config.loader import load_config
from evomesh.errors import UserError
from tests.support.covers import covers
from tests.support.deepspeed import Zero, write_file
from tests.support.xtuner import CONFIGS, ROOT, model_folder, write_config


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NPROC_PER_NODE", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_list_cfg() -> None:
    assert run("xtuner", "list-cfg").split() == sorted(
        path.stem for path in CONFIGS.glob("*.py")
    )
    assert run("xtuner", "list-cfg", "-p", "20B").split() == [
        "internlm2_20b_w_tokenized_dataset"
    ]
    with pytest.raises(UserError, match="contains 'llama9'"):
        run("xtuner", "list-cfg", "-p", "llama9")


@covers("promise:copy-cfg")
def test_copy_cfg(here: Path) -> None:
    out = run("xtuner", "copy-cfg", "internlm2_7b_w_tokenized_dataset", ".")
    copied = here / "internlm2_7b_w_tokenized_dataset_copy.py"
    assert out == "wrote internlm2_7b_w_tokenized_dataset_copy.py\n"
    assert (
        copied.read_bytes()
        == (CONFIGS / "internlm2_7b_w_tokenized_dataset.py").read_bytes()
    )
    with pytest.raises(UserError, match="already exists"):
        run("xtuner", "copy-cfg", "internlm2_7b_w_tokenized_dataset", ".")
    with pytest.raises(
        UserError, match="did you mean internlm2_7b_w_tokenized_dataset"
    ):
        run("xtuner", "copy-cfg", "internlm2_7b_w_tokenised_dataset", "new")


def test_a_copy_brings_the_config_that_it_is_based_on(here: Path) -> None:
    name = "mistral_7b_w_tokenized_dataset"
    out = run("xtuner", "copy-cfg", name, "new")
    assert out.splitlines() == [
        "wrote new/internlm2_7b_w_tokenized_dataset.py",
        f"wrote new/{name}_copy.py",
    ]
    copied = load_config(f"new/{name}_copy.py").config
    assert copied.model == load_config(CONFIGS / f"{name}.py").config.model
    assert copied.ckpt.load_ckpt_info is not None
    assert copied.ckpt.load_ckpt_info.path == "mistralai/Mistral-7B-v0.3"


def test_a_copy_of_another_name_has_the_lines_that_a_guide_edits(here: Path) -> None:
    """XTuner's migration guide edits these keys of this file."""
    name = "internlm2_7b_w_internevo_dataset"
    assert run("xtuner", "copy-cfg", name, ".") == f"wrote {name}_copy.py\n"
    text = (here / f"{name}_copy.py").read_text()
    lines = {line.partition(" = ")[0] for line in text.splitlines()}
    assert {"dataset_folder", "max_length", "accumulative_counts"} <= lines
    copied = load_config(f"{name}_copy.py").config
    assert copied.data == load_config(CONFIGS / f"{name}.py").config.data


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.py"))])
def test_translate_writes_the_same_config(name: str, here: Path) -> None:
    out = run("config", "translate", name, "out.py")
    assert out.startswith("wrote out.py\n")
    written = load_config("out.py").config
    assert written == load_config(CONFIGS / f"{name}.py").config
    text = (here / "out.py").read_text(encoding="utf-8")
    file = name if "untokenized" in name else "internlm2_7b_w_tokenized_dataset"
    assert f"seq_len=32768,  # {CONFIGS}/{file}.py:" in text and " max_length\n" in text
    assert (
        "EvaluateChatHook" in text and "xtuner." not in text and "mmengine" not in text
    )
    ruff = shutil.which(
        "ruff",
        path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    if ruff:
        subprocess.run(
            [ruff, "check", "--isolated", "--select", "E9,F", "out.py"], check=True
        )
    with pytest.raises(UserError, match="exists already"):
        run("config", "translate", name, "out.py")


def test_translate_refuses_what_needs_no_translation(here: Path) -> None:
    with pytest.raises(UserError, match="evomesh reads it as it is"):
        run("config", "translate", str(ROOT / "configs" / "7B_sft.py"), "out.py")
    with pytest.raises(UserError, match=r"does not end in \.py"):
        run("config", "translate", "internlm2_7b_w_tokenized_dataset", "out.txt")


def options(*arguments: str) -> argparse.Namespace:
    return _parser().parse_args(list(arguments))


THEIRS = [
    ([], []),
    (["--work-dir", "a b"], ["work_dir='a b'"]),
    (["--seed", "3"], ["randomness.seed=3"]),
    (["--resume"], ["resume=True"]),
    (["--resume", "x/step-00000002"], ["resume=True", "load_from='x/step-00000002'"]),
    (
        ["--cfg-options", "lr=1e-3", "max_length=64", "--launcher", "pytorch"],
        ["lr=1e-3", "max_length=64"],
    ),
]
OURS = [
    (["--work-dir", "w"], ["run_dir='w'", "ckpt.save_ckpt_folder='local:w'"]),
    (["--seed", "3"], ["seed=3"]),
    (["--resume"], ["ckpt.auto_resume=True"]),
    (
        ["--resume", "p"],
        ["ckpt.auto_resume=False", "ckpt.load_ckpt_info=dict(path='p', content='all')"],
    ),
]


@pytest.mark.parametrize(("arguments", "overrides"), THEIRS, ids=str)
def test_options_of_train(
    arguments: list[str], overrides: list[str], here: Path
) -> None:
    path = str(write_config(here / "c.py"))
    assert train_overrides(path, options(path, *arguments)) == overrides
    load_config(path, overrides)


@pytest.mark.parametrize(("arguments", "overrides"), OURS, ids=str)
def test_options_of_train_for_a_config_of_ours(
    arguments: list[str], overrides: list[str], here: Path
) -> None:
    path = str(ROOT / "configs" / "7B_internlm2.py")
    assert train_overrides(path, options(path, *arguments)) == overrides
    load_config(path, overrides)


def test_a_deepspeed_strategy_with_sequence_parallelism_shards_the_weight_axis(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(here / "tiny")
    path = str(write_config(here / "c.py"))
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    common = ["pretrained_model_name_or_path=tiny", "max_length=64"]
    sequence = load_with_strategy(
        path, [*common, "sequence_parallel_size=2"], "deepspeed_zero3", "auto"
    )
    # Divides 32, 64 (4 + 2 x 2 heads of 8) and 48.
    assert sequence.config.parallel.weight.size == 8
    assert not sequence.config.parallel.zero1.fsdp
    assert "parallel.weight.size" in sequence.warnings[-1]
    whole = load_with_strategy(path, common, "deepspeed_zero3", "auto")
    assert whole.config.parallel.zero1.fsdp and whole.config.parallel.weight.size == 1


def test_merge_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match="LoRA adapters are not part of evomesh"):
        run(
            "xtuner",
            "convert",
            "merge",
            "llm",
            "adapter",
            "out",
            "--max-shard-size",
            "2GB",
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with the config.json of a tiny model, and weights under XTuner's names."""
    folder = model_folder(tmp_path_factory.mktemp("model") / "tiny")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_pretrained(folder)
    ).state_dict()
    return folder, {f"llm.{name}": value for name, value in model.items()}


def config_of(folder: Path, model: Path) -> str:
    return str(write_config(folder / "c.py", ("internlm/internlm2-7b", str(model))))


@covers("promise:pth-to-hf", "promise:xtuner-checkpoints")
@pytest.mark.parametrize("written", ["file", "zero2", "zero3"])
def test_pth_to_hf_reads_what_xtuner_wrote(
    written: str, tiny: tuple[Path, dict[str, Tensor]], here: Path
) -> None:
    folder, state = tiny
    path = here / "iter_9.pth"
    if written == "file":
        write_file(path, state)
    else:
        Zero([state], stage=int(written[-1]), ranks=3).write(path)
    config = config_of(here, folder)
    out = run("xtuner", "convert", "pth_to_hf", config, str(path), "hf", "--fp32")
    assert "its optimizer state is not used" in out
    exported = transformers.LlamaForCausalLM.from_pretrained(here / "hf").state_dict()
    assert exported.keys() == {name.removeprefix("llm.") for name in state}
    for name, value in exported.items():
        assert torch.equal(value, state[f"llm.{name}"]), name
    assert (here / "hf" / "xtuner_config.py").read_text() == Path(config).read_text()
    # Nothing is left of the way there.
    assert {file.name for file in here.iterdir()} == {"c.py", "hf", "iter_9.pth"}


def test_pth_to_hf_keeps_the_dtype_of_the_training(
    tiny: tuple[Path, dict[str, Tensor]], here: Path
) -> None:
    folder, state = tiny
    path = Zero([state]).write(here / "work" / "iter_9.pth")
    config = config_of(here, folder)
    # The work folder means its newest checkpoint.
    run("xtuner", "convert", "pth_to_hf", config, str(path.parent), "hf")
    model = transformers.LlamaForCausalLM.from_pretrained(here / "hf", dtype="auto")
    name = "model.norm.weight"
    assert torch.equal(model.state_dict()[name], state[f"llm.{name}"].bfloat16())


def test_pth_to_hf_leaves_nothing_after_a_refusal(
    tiny: tuple[Path, dict[str, Tensor]], here: Path
) -> None:
    folder, state = tiny
    other = {name: value for name, value in state.items() if "norm" not in name}
    Zero([other]).write(here / "iter_9.pth")
    config = config_of(here, folder)
    with pytest.raises(UserError, match=r"missing(.|\n)*model\.norm\.weight"):
        run("xtuner", "convert", "pth_to_hf", config, "iter_9.pth", "hf")
    assert {file.name for file in here.iterdir()} == {"c.py", "iter_9.pth"}


def start_of(path: str, *overrides: str) -> StartPoint:
    config = load_config(path, list(overrides)).config.ckpt
    assert config.save_ckpt_folder is not None
    folder = SaveFolder.open(config.save_ckpt_folder, None)
    return decide(config, CheckpointReader(), folder)


def test_where_a_run_starts_from(
    tiny: tuple[Path, dict[str, Tensor]], here: Path
) -> None:
    """XTuner's ``load_from`` takes the weights, ``resume`` the steps too; optimizer state is not read, and this is
    said."""
    folder, state = tiny
    Zero([state]).write(here / "iter_9.pth")
    config = config_of(here, folder)
    weights = start_of(config, "load_from=iter_9.pth")
    assert (weights.ckpt_type, weights.content) == ("xtuner", {"model"})
    assert not weights.keeps_counters
    work = "work_dir='.'"
    for resumed in (
        start_of(config, "load_from=iter_9.pth", "resume=True"),
        start_of(config, "resume=True", work),
    ):
        assert resumed.ckpt_type == "xtuner" and resumed.path.endswith("iter_9.pth")
        assert resumed.content == {"model", "scheduler", "sampler"}
        assert resumed.keeps_counters and "moments start anew" in resumed.reason
    ours = str(ROOT / "configs" / "7B_internlm2.py")
    info = "ckpt.load_ckpt_info=dict(path='iter_9.pth', content=('model', 'optimizer'))"
    with pytest.raises(UserError, match="only the model, scheduler, sampler can be"):
        start_of(ours, "ckpt.auto_resume=False", info)


def test_other_commands_name_the_one_that_reads_xtuners_checkpoint(here: Path) -> None:
    write_file(here / "iter_9.pth", {"llm.w": torch.ones(2)})
    for command in (
        ("convert", "to-hf", "iter_9.pth", "out"),
        ("generate", "--ckpt", "iter_9.pth", "--prompt", "a"),
    ):
        with pytest.raises(UserError, match=r"evomesh xtuner convert pth_to_hf"):
            run(*command)


def test_show_does_not_count_tokens_of_passes(here: Path) -> None:
    path = str(write_config(here / "c.py"))
    out = run("config", "show", path)
    assert "passes over the data    1.0" in out and "tokens in total" not in out
    assert "tokens in total" in run(
        "config", "show", path, "--set", "data.total_steps=3"
    )


def test_unknown_launcher_and_config(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        options("c.py", "--launcher", "mpi")
    assert caught.value.code == 2 and "pytorch" in capsys.readouterr().err
    with pytest.raises(UserError, match="no config named 'internlm9'"):
        run("xtuner", "train", "internlm9")


def test_the_command_xtuner_is_installed_only_where_there_is_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = here / "bin"
    scripts.mkdir()
    monkeypatch.setenv("PATH", str(scripts))
    assert run("xtuner", "install-command", "--into", str(scripts)) == (
        f"wrote {scripts}/xtuner: xtuner is now evomesh xtuner\n"
    )
    done = subprocess.run(
        [str(scripts / "xtuner"), "list-cfg", "-p", "mistral"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "mistral_7b_w_tokenized_dataset\n"
    # Ours may be written again.
    run("xtuner", "install-command", "--into", str(scripts))

    (scripts / "xtuner").write_text("#!/bin/sh\necho the real one\n")
    with pytest.raises(UserError, match="another command of this name"):
        run("xtuner", "install-command", "--into", str(scripts))
    with pytest.raises(UserError, match="exists already"):
        run("xtuner", "install-command", "--into", str(here))
    assert "the real one" in (scripts / "xtuner").read_text()


RAW = "internlm2_7b_w_untokenized_dataset"


def tokenizer_of_words(*words: str) -> Tokenizer:
    """A tokenizer of whole words with ChatML's marks and no template."""
    names = ["<unk>", "<s>", "</s>", *words, "user", "assistant", "Ċ"]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    made.add_special_tokens([AddedToken(name, special=True) for name in marks])
    return made


def write_chats(path: Path, answers: list[str]) -> None:
    turns = [{"messages": [{"role": "user", "content": "say"},
                           {"role": "assistant", "content": text}]} for text in answers]  # fmt: skip
    path.write_text("".join(f"{json.dumps(turn)}\n" for turn in turns))


@pytest.fixture
def raw_config(here: Path) -> Path:
    """A config of raw data in messages.jsonl, with a model whose tokenizer has ChatML's marks."""
    folder = model_folder(here / "tiny")
    tokenizer_of_words("say", "one", "two", "three").save(
        str(folder / "tokenizer.json")
    )
    write_chats(here / "messages.jsonl", ["one", "two"])
    imports = "from datasets import load_dataset\nfrom xtuner.dataset import process_hf_dataset\n"
    imports += (
        "from xtuner.dataset.map_fns import openai_map_fn, template_map_fn_factory\n"
    )
    dataset = (
        "dict(type=process_hf_dataset, dataset=dict(type=load_dataset, path='json', data_files=['messages.jsonl']), "
        "max_length=MAX, dataset_map_fn=openai_map_fn, template_map_fn=dict(type=template_map_fn_factory, "
        "template=PROMPT_TEMPLATE.internlm2_chat))"
    )
    imports += "from xtuner.utils import PROMPT_TEMPLATE\nMAX = 64\n"
    return write_config(
        here / "raw.py",
        ('"internlm/internlm2-7b"', '"tiny"'),
        ("# PART 4: ", f"{imports}train_dataloader['dataset'] = {dataset}\n# PART 4: "),
        name=RAW,
    )


def test_token_files_of_raw_data_follow_the_config_and_the_data(
    raw_config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = Path("work_dirs/raw/tokenized/raw/dataset0.bin")

    def tokenize() -> str:
        make_token_files(load_config(raw_config), is_alone=True)
        return capfd.readouterr().err

    assert "made anew" not in tokenize()
    first = output.read_bytes()
    assert tokenize() == ""
    assert output.read_bytes() == first
    # 1. Another answer of the same length; then a longer file.
    write_chats(Path("messages.jsonl"), ["two", "two"])
    assert "made anew: messages.jsonl has another content\n" in tokenize()
    second = output.read_bytes()
    assert second != first
    write_chats(Path("messages.jsonl"), ["two", "two", "three"])
    assert "made anew: messages.jsonl has another content\n" in tokenize()
    assert output.read_bytes().startswith(second) and output.read_bytes() != second
    # 2. Another length, format and template.
    text = raw_config.read_text()
    raw_config.write_text(text.replace("MAX = 64", "MAX = 8"))
    assert "made anew: max_length 64 -> 8\n" in tokenize()
    raw_config.write_text(text.replace("openai_map_fn", "pretrain_map_fn"))
    write_lines = Path("messages.jsonl")
    write_lines.write_text('{"text": "one two"}\n')
    assert "made anew: format messages -> text; messages.jsonl has" in tokenize()
    # 3. A dataset that the config does not name any more is not trained on.
    left = output.with_name("dataset1.bin")
    left.write_bytes(b"")
    assert "dataset1.bin is removed" in tokenize()
    assert not left.exists()


def test_raw_data_that_a_run_trained_on_is_not_replaced(
    raw_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_token_files(load_config(raw_config), is_alone=True)
    output = Path("work_dirs/raw/tokenized/raw/dataset0.bin")
    first = output.read_bytes()
    Path("work_dirs/raw/step-00000003").mkdir()
    text = raw_config.read_text()
    raw_config.write_text(text.replace("MAX = 64", "MAX = 8"))
    refused = r"until step 3: max_length 64 -> 8(.|\n)*remove ./work_dirs/raw"
    with pytest.raises(UserError, match=refused):
        make_token_files(load_config(raw_config), is_alone=True)
    assert output.read_bytes() == first
    # As it was, or elsewhere.
    raw_config.write_text(text)
    make_token_files(load_config(raw_config), is_alone=True)
    raw_config.write_text(text.replace("MAX = 64", "MAX = 8"))
    make_token_files(load_config(raw_config, ["work_dir='other'"]), is_alone=True)
    assert Path("other/tokenized/raw/dataset0.bin").exists()


def test_one_of_several_ranks_refuses_data_that_changed(
    raw_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_token_files(load_config(raw_config), is_alone=True)
    write_chats(Path("messages.jsonl"), ["three"])
    several = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "::1",
        "MASTER_PORT": "1",
    }
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"are of other data(.|\n)*xtuner tokenize"):
        make_token_files(load_config(raw_config))
    monkeypatch.setenv("RANK", "1")
    make_token_files(load_config(raw_config))  # hears of it from rank 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("max_lenght=128", "max_length"), ("max_iters=3", "data.total_steps")],
)
def test_a_misspelled_option_gets_the_nearest_name_of_the_config(
    typed: str, meant: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_config(CONFIGS / f"{RAW}.py", [typed])
    message = str(refused.value)
    assert f"did you mean {meant}" in message
    # Which of --set and --cfg-options was typed, the reader of the config cannot know.
    assert "of the command line" in message and "--set" not in message


def test_train_accepts_another_schedule_when_told_to(here: Path) -> None:
    path = str(write_config(here / "c.py"))
    typed = _parser().parse_args([path, "--accept-schedule-change"])
    assert "ckpt.accept_schedule_change=True" in train_overrides(path, typed)
    plain = _parser().parse_args([path])
    assert train_overrides(path, plain) == []


def test_commands_of_xtuner_that_are_elsewhere_are_named() -> None:
    result = CliRunner().invoke(app, ["xtuner", "chat", "model"])
    assert result.exit_code == 2
    assert "evomesh generate --chat" in result.output
    alone = CliRunner().invoke(xtuner_app, ["-h"])
    assert alone.exit_code == 0 and "list-cfg" in alone.output


@pytest.mark.parametrize("name", ["./tiny", "/data/tiny", "~/tiny", "here/tiny"])
def test_a_path_is_not_taken_for_a_model_of_the_hub(name: str, here: Path) -> None:
    (here / "here").mkdir()
    path = write_config(here / "c.py", ('"internlm/internlm2-7b"', f'"{name}"'))
    with pytest.raises(UserError, match="give an existing folder") as refused:
        load_config(path)
    assert "hf download" not in str(refused.value)
