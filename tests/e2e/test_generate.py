"""``evomesh generate`` on a checkpoint that the training command wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from evomesh.checkpoint.restore import restore_model
from evomesh.generate.decode import generate_tokens as answers_of
from evomesh.generate.options import SamplingParams
from tests.support.covers import covers
from tests.support.golden import write_bin
from tests.support.interpreter import Finished, Interpreter
from tests.support.runs import write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter) -> Path:
    """A folder with a trained tiny model and a tokenizer of single bytes, ids 0..255."""
    folder = tmp_path_factory.mktemp("trained")
    alphabet = {
        symbol: number
        for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_run(folder, 'data["tokenizer_path"] = "tokenizer.json"\n')
    assert (
        interpreter.run(["evomesh", "train", "config.py"], cwd=folder).returncode == 0
    )
    return folder


def generate(trained: Path, interpreter: Interpreter, *options: str) -> Finished:
    return interpreter.run(
        ["evomesh", "generate", "--ckpt", "ckpts", *options], cwd=trained
    )


def test_text_goes_on_from_the_prompt(trained: Path, interpreter: Interpreter) -> None:
    done = generate(trained, interpreter, "--prompt", "abc", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("abc")
    again = generate(trained, interpreter, "--prompt", "abc", "--max-new-tokens", "12")
    assert again.stdout == done.stdout


def test_chat_needs_a_template(trained: Path, interpreter: Interpreter) -> None:
    done = generate(trained, interpreter, "--prompt", "abc", "--chat")
    assert done.returncode == 2
    assert "--chat: the tokenizer has no chat template" in done.stderr


def test_an_earlier_step_is_another_model(
    trained: Path, interpreter: Interpreter
) -> None:
    """Drawn, not greedy: of two distributions, 60 equal random numbers make other texts on any machine."""
    command = [
        "evomesh",
        "generate",
        "--prompt",
        "abc",
        "--max-new-tokens",
        "60",
        "--temperature",
        "1",
        "--ckpt",
    ]
    older, newer = (
        interpreter.run([*command, path], cwd=trained) for path in ("ckpts/5", "ckpts")
    )
    assert older.returncode == newer.returncode == 0, older.stderr + newer.stderr
    assert older.stdout != newer.stdout


def test_a_seed_means_the_same_draws(trained: Path, interpreter: Interpreter) -> None:
    drawn = [
        "--prompt",
        "abc",
        "--max-new-tokens",
        "20",
        "--temperature",
        "1.5",
        "--seed",
    ]
    one, same, other = (
        generate(trained, interpreter, *drawn, seed).stdout for seed in ("1", "1", "2")
    )
    assert one == same != other


def test_a_users_own_model_trains_and_writes(
    trained: Path, tmp_path: Path, interpreter: Interpreter
) -> None:
    example = Path(__file__).parents[2] / "examples/custom_model"
    shutil.copytree(example, tmp_path / "mine")
    small = [
        "--set",
        "data.total_steps=2",
        "--set",
        "ckpt.save_ckpt_folder=ck",
        "--set",
        "ckpt.enable_save_ckpt=True",
    ]
    done = interpreter.run(
        ["evomesh", "train", "config.py", *small], cwd=tmp_path / "mine"
    )
    assert done.returncode == 0, done.stderr
    write = [
        "evomesh",
        "generate",
        "--ckpt",
        "ck",
        "--prompt",
        "abc",
        "--max-new-tokens",
        "5",
    ]
    write += ["--tokenizer", str(trained / "tokenizer.json")]
    alone = interpreter.run(write, cwd=tmp_path / "mine")
    assert alone.returncode == 2
    assert "PARALLEL_BLOCKS" in alone.stderr
    registered = interpreter.run(
        [*write, "--config", "config.py"], cwd=tmp_path / "mine"
    )
    assert registered.returncode == 0, registered.stderr
    assert registered.stdout.startswith("abc")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "1", "--eos-id", "999"], "id 999 is outside the vocabulary"),
        (["--prompt", "a", "--ckpt", "nowhere"], "nowhere"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--device", "gpu"], "--device: 'gpu' cannot be used"),
        (["--prompt", "a", "--tokenizer", "missing.json"], "missing.json"),
        (
            ["--prompt", "a", "--paged", "on"],
            "with paged keys and values: it is on cpu",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    trained: Path, interpreter: Interpreter, options: list[str], part: str
) -> None:
    done = generate(trained, interpreter, *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert part in done.stderr
    assert "Traceback" not in done.stderr


ROOT = Path(__file__).parents[2]
PROMPTS = {
    "math": [[5, 6, 7, 8], [9], list(range(60, 75))],
    "words": [[30, 31, 32], [], list(range(40)), [-3, -5, 7, 9]],
}
SECTION = """
generation = dict(
    ckpt_folder="ckpts", output_folder="out", data_folder="prompts", batch_size=2, eos_id=[2, 0], bos_id=1,
    max_length=24, do_sample=True, temperature=2.0, top_k=50, top_p=1.0, repetition_penalty=1, length_penalty=1.0,
)
"""
WANTED = SamplingParams(
    temperature=2.0, top_k=50, max_length=24, seed=1024, eos_ids=(2, 0)
)


@pytest.fixture
def section(trained: Path, tmp_path: Path) -> Path:
    """Prepare a folder with the trained model, prompts of two tasks and the generation section of InternEvo's guide."""
    for name, prompts in PROMPTS.items():
        write_bin(tmp_path / "prompts" / name / "a.bin", prompts)
    write_bin(tmp_path / "wild" / "en" / "a.bin", [[1], [2, 999]])
    (tmp_path / "ckpts").symlink_to(trained / "ckpts")
    (tmp_path / "data").symlink_to(trained / "data")
    shutil.copy(trained / "tokenizer.json", tmp_path)
    (tmp_path / "config.py").write_text((trained / "config.py").read_text() + SECTION)
    return tmp_path


def results(folder: Path, name: str) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()
    ]


@covers(
    "generation.output_folder",
    "generation.ckpt_folder",
    "generation.data_folder",
    "generation.bos_id",
    "generation.pad_id",
    "promise:generation-section",
)
def test_the_documents_section(section: Path, interpreter: Interpreter) -> None:
    done = interpreter.run(
        [str(ROOT / "generate.py"), "--config", "config.py"], cwd=section
    )
    assert done.returncode == 0, done.stderr
    assert "words: 4 prompts, 2 skipped" in done.stdout + done.stderr
    model = restore_model(str(section / "ckpts")).model
    for name, first in (("math", 0), ("words", 3)):
        prompts = [[abs(token) for token in prompt] for prompt in PROMPTS[name]]
        kept = [index for index, prompt in enumerate(prompts) if 0 < len(prompt) < 24]
        numbers = [first + index for index in kept]
        wanted = answers_of(
            model, [prompts[index] for index in kept], WANTED, numbers=numbers
        )
        rows = results(section, name)
        assert [row["line"] for row in rows] == [1, 2, 3, 4][: len(prompts)]
        assert [row["answer_ids"] for row in rows if "skipped" not in row] == wanted
        assert [index for index, row in enumerate(rows) if "skipped" not in row] == kept
        for row in rows:
            ends = [
                "stop" if new[-1] in (2, 0) else "length" for new in row["answer_ids"]
            ]
            assert row["finish"] == ends
            assert len(row["answers"]) == len(row["answer_ids"])
        records = [
            [*prompts[index], *new] for index, [new] in zip(kept, wanted, strict=True)
        ]
        raw = (section / "out" / f"{name}.bin").read_bytes()
        meta = np.load(section / "out" / f"{name}.bin.meta")
        assert [
            json.loads(raw[start:].split(b"\n")[0])["tokens"] for start, _ in meta
        ] == records
        assert [count for _, count in meta] == [len(record) for record in records]


@covers("generation.batch_size")
def test_any_layout_and_batch_size_gives_the_same_results(
    section: Path, interpreter: Interpreter
) -> None:
    command = [str(ROOT / "generate.py"), "--config", "config.py"]
    done = interpreter.run([*command, "--set", "generation.batch_size=5"], cwd=section)
    assert done.returncode == 0, done.stderr
    alone = {
        name: (results(section, name), (section / f"out/{name}.bin").read_bytes())
        for name in PROMPTS
    }
    shutil.rmtree(section / "out")
    # Two stages; two data-parallel ranks.
    for layout in ("parallel.pipeline=2", "parallel.tensor=1"):
        ranks = interpreter.start_ranks(
            [*command, "--launcher", "torch", "--set", layout], 2, cwd=section
        )
        finished = [rank.wait(120) for rank in ranks]
        assert [one.returncode for one in finished] == [0, 0], (
            finished[0].stderr + finished[1].stderr
        )
        assert {
            n: (results(section, n), (section / f"out/{n}.bin").read_bytes())
            for n in PROMPTS
        } == alone


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (
            ["generation.data_folder=None", "data.valid_folder=None"],
            "neither generation.data_folder nor data.valid",
        ),
        (
            ["generation.data_folder=nothing"],
            "generation.data_folder: cannot read the folder nothing",
        ),
        (["generation.output_folder=None"], "generation.output_folder"),
        (
            ["generation.output_folder=prompts/out"],
            "is inside the folder of the prompts",
        ),
        (
            [
                "generation.ckpt_folder=None",
                "ckpt.save_ckpt_folder=None",
                "ckpt.enable_save_ckpt=False",
            ],
            "no weights",
        ),
        (["generation.ckpt_folder=nowhere"], "nowhere"),
        (
            ["generation.num_return_sequences=3", "generation.num_beams=2"],
            "num_return_sequences is 3",
        ),
        (["generation.data_folder=wild"], "a.bin line 2"),
        (["model.hidden_size=64"], "the model wants"),
        (["generation.paged=on"], "with paged keys and values: it is on cpu"),
    ],
)
@covers("generation.paged")
def test_a_section_that_cannot_be_done(
    section: Path, interpreter: Interpreter, settings: list[str], part: str
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    done = interpreter.run(["evomesh", "generate", "config.py", *sets], cwd=section)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((section / "out").glob("*")) if (section / "out").exists() else True


def test_the_validation_folder_is_the_default(
    section: Path, interpreter: Interpreter
) -> None:
    sets = [
        "--set",
        "generation.data_folder=None",
        "--set",
        "generation.max_new_tokens=2",
    ]
    sets += ["--set", "generation.ckpt_folder=None", "--set", "generation.num_beams=2"]
    done = interpreter.run(["evomesh", "generate", "config.py", *sets], cwd=section)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (section / "out").glob("*.jsonl")) == [
        "code.jsonl",
        "en.jsonl",
    ]
    assert all(len(row["answer_ids"][0]) <= 2 for row in results(section, "en"))


@covers("generation.num_return_sequences")
def test_several_answers_to_a_prompt(trained: Path, interpreter: Interpreter) -> None:
    options = [
        "--prompt",
        "abc",
        "--num-beams",
        "3",
        "--num-return-sequences",
        "2",
        "--max-new-tokens",
        "5",
    ]
    done = generate(trained, interpreter, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--- answer 1 of 2\nabc")
    assert "--- answer 2 of 2\nabc" in done.stdout
