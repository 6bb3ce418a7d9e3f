"""``evomesh config check`` on folders and files that are not there, against what the start of a run says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.checkpoint.loaders import checkpoint_loaders
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.resume import decide
from evomesh.cli.config import app
from evomesh.cli.xtuner_data import make_token_files
from evomesh.config.loader import load_config
from evomesh.config.reading.xtuner.tokenize_command import output_of
from evomesh.data.build import build_train_data, build_valid_data
from evomesh.errors import UserError
from tests.support.golden import write_folder
from tests.support.runs import write_run

Check = Callable[..., list[str]]
MANUAL = "ckpt.auto_resume=False"
TEXT = ["data.type=streaming", "data.tokenizer_path=tok"]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """What the command says of a config whose data is there, with settings: its lines but the last."""
    write_run(tmp_path, "data |= dict(valid_every=5)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def check(*settings: str) -> list[str]:
        result = CliRunner().invoke(
            app, ["check", "config.py", *options(settings)], catch_exceptions=False
        )
        assert result.exit_code == 0
        return result.output.splitlines()[:-1]

    return check


def options(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def refusal_of_start(*settings: str) -> UserError:
    """What a run with these settings ends with, before it trains."""
    config = load_config("config.py", settings).config
    with pytest.raises(UserError) as refusal:
        build_train_data(config.data, 256)
        build_valid_data(config.data, 256)
        start = decide(config.ckpt, CheckpointReader(), None)
        loader = checkpoint_loaders.get(start.ckpt_type)
        assert loader is not None
        list(loader(start.path, {}))
    return refusal.value


def test_a_folder_in_the_home_folder(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = ["data.train_folder='~/data/train'", "data.valid_folder='~/data/valid'"]
    assert check(*folders) == []
    config = load_config("config.py", folders).config
    sets = build_valid_data(config.data, 256)
    assert {found.name for found in sets} == {"code", "en"}


def write_step(step: int) -> None:
    """A folder that looks like a checkpoint; it is one of another run, so nothing is read from it."""
    folder = Path(f"ckpts/step-{step:08d}")
    folder.mkdir(parents=True)
    (folder / "commit.json").touch()


def load_from(path: str, ckpt_type: str = "internevo") -> list[str]:
    info = f"dict(path={path!r}, ckpt_type={ckpt_type!r})"
    return [MANUAL, f"ckpt.load_ckpt_info={info}"]


REFUSED: dict[str, list[str]] = {
    "data.train_folder": ["data.train_folder=nix"],
    "os.environ['DATA']": ["data.train_folder=${DATA}/train"],
    "no .bin file below": ["data.train_folder=empty"],
    "mount the bucket": ["data.train_folder=s3://bucket/data"],
    "data.valid_folder": ["data.valid_folder=data/valdi"],
    "no folder owner/texts": [*TEXT, "data.train_folder=owner/texts"],
    "no checkpoint at 'ckpts/7'": load_from("ckpts/7"),
    "hf download owner/model": load_from("owner/model"),
    "no checkpoint at 'local:owner/model'": load_from("local:owner/model"),
    "hf download OWNER/MODEL": load_from("hfx", "hf"),
}


class TestWhatIsNotThere:
    def test_nothing_is_said_where_all_is_there(self, check: Check) -> None:
        assert check() == []

    @pytest.mark.parametrize("part", REFUSED)
    def test_the_words_of_the_start(self, check: Check, part: str) -> None:
        Path("empty").mkdir()
        write_step(5)
        settings = REFUSED[part]
        refusal = refusal_of_start(*settings)
        lines = [line for line in check(*settings) if "started here" in line]
        line = " ".join(lines)
        assert part in line
        assert line.startswith("warning: ")
        for words in (refusal.found, refusal.fix):
            assert " ".join(words.split()) in line
        key = "ckpt.load_ckpt_info (" if MANUAL in settings else "data."
        assert line.startswith(f"warning: {key}")
        if not refusal.fix:
            assert f"a relative one is seen from {Path.cwd()} (" in line

    def test_a_tokenizer(self, check: Check) -> None:
        (unneeded,) = check("data.tokenizer_path=tok")
        assert "does not exist: training reads tokens and needs none" in unneeded
        (needed,) = check(
            "data.tokenizer_path=tok",
            "data.sample_every=5",
            "data.samples=dict(prompts=['a'])",
        )
        assert "warning: data.tokenizer_path: no tokenizer at tok; " in needed

    def test_a_tokenizer_that_did_not_make_the_data(self, check: Check) -> None:
        tokenizer = Path("tokenizer.json")
        tokenizer.write_text('{"model": {}}')
        setting = "data.tokenizer_path=tokenizer.json"
        assert check(setting) == []
        (data, *_) = Path().rglob("*.bin")
        Path(f"{data}.json").write_text('{"tokenizer_hash": "77"}')
        (warning,) = check(setting)
        assert "made with another tokenizer (tokenizer 77) than" in warning
        assert check("data.tokenizer_path=None") == []

    def test_a_data_stage(self, check: Check) -> None:
        stages = "data.stages=[dict(until=5), dict(train_folder='later')]"
        (line,) = check(stages)
        assert "cannot read the folder later: " in line
        write_folder(Path("later"))
        assert check(stages) == []

    def test_what_a_run_would_not_read(self, check: Check) -> None:
        assert check("data.valid_folder=nix", "data.valid_every=0") == []
        assert check("data.train_folder=None")[0].startswith("warning: data.train")
        (ignored,) = check("ckpt.load_ckpt_info=dict(path='nix')")
        assert "is not used: ckpt.auto_resume is True" in ignored
        assert check(*load_from("s3://bucket/run")) == []
        (line,) = check("ckpt.load_ckpt_info=dict(path='nix', fallback=True)")
        assert "no checkpoint at 'nix'" in line
        # A run that resumes does not read it.
        step = Path("kept/step-00000002")
        step.mkdir(parents=True)
        (step / "commit.json").touch()
        info = "ckpt.load_ckpt_info=dict(path='nix', fallback=True)"
        assert check(info, "ckpt.save_ckpt_folder='local:kept'") == []

    def test_a_checkpoint_to_branch_from(self, check: Check) -> None:
        decay = ["lr_scheduler.decay_from='other/5'", "lr_scheduler.decay_steps=5"]
        (line,) = [line for line in check(*decay) if "started here" in line]
        assert line.startswith("warning: lr_scheduler.decay_from (other/5): ")


def test_a_model_of_xtuner_is_named_once(check: Check) -> None:
    configs = Path(__file__).parents[3] / "configs/xtuner"
    path = configs / "internlm2_7b_w_tokenized_dataset.py"
    lines = CliRunner().invoke(app, ["check", str(path)]).output.splitlines()
    downloads = [line for line in lines if "hf download internlm/internlm2-7b" in line]
    assert len(downloads) == 1 and "only its sizes are known" in downloads[0]
    assert any(line.startswith("warning: data.train_folder: ") for line in lines)


def test_a_step_that_is_there_is_no_missing_folder(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_step(5)
    assert check(*load_from("ckpts/5")) == []
    with pytest.raises(CheckpointError):
        decide(
            load_config("config.py", load_from("ckpts/5")).config.ckpt,
            CheckpointReader(),
            None,
        )


def raw_data_warnings(config: Path) -> list[str]:
    lines = CliRunner().invoke(app, ["check", str(config)]).output.splitlines()
    return [line for line in lines if "raw data: " in line]


def test_raw_data_of_xtuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(__file__).parents[3] / "configs/xtuner"
    text = (shipped / "internlm2_7b_w_untokenized_dataset.py").read_text()
    config = tmp_path / "raw.py"
    config.write_text(text.replace("/path/to/sft/data/folder", "talks"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        make_token_files(load_config(config))
    (line,) = raw_data_warnings(config)
    assert refusal.value.found in line and "started here" in line
    # Made by an earlier start: a run reads them, wherever the raw data is now.
    (command,) = load_config(config).preparation
    output_of(command).parent.mkdir(parents=True, exist_ok=True)
    output_of(command).touch()
    assert raw_data_warnings(config) == []
    output_of(command).unlink()
    Path("talks").mkdir()
    Path("talks/one.jsonl").write_text('{"messages": []}\n')
    assert raw_data_warnings(config) == []
