"""``evomesh eval`` on local tasks of each kind, held to the harness's own backend on the exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.restore import load_model
from evomesh.config.schema import GenerationConfig
from evomesh.errors import UserError
from tests.e2e.conftest import Run
from tests.e2e.test_convert_hf import make_tokenizer
from tests.unit.checkpoint.huggingface.hf_models import export, model_config, save_model

pytest.importorskip("lm_eval")

COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
metadata: {version: 1}
"""
CHOICE = """
task: animals
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 1
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
task: answers
output_type: generate_until
doc_to_text: "{{question}} "
doc_to_target: "{{said}}"
generation_kwargs: {until: ["%s"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


LIKELY = """
task: said
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " the cat"
num_fewshot: 2
fewshot_split: test
metric_list: [{metric: perplexity}]
"""
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)


def questions() -> list[dict[str, Any]]:
    animals = ["cat", "dog", "cow", "mat", "naïve café", "春眠不觉晓"]
    return [
        {
            "question": f"what sat on the {animals[n % 6]} number {n}",
            "choices": [animals[n % 6], animals[(n + 1) % 6], "a dog saw the cat"],
            "answer": n % 3,
            "text": f"the {animals[n % 6]} sat on the mat " * (1 + 3 * (n % 4)),
            "said": "",
        }
        for n in range(12)
    ]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint, its exported folder, and three task files; texts are longer than the model reads at once."""
    place = tmp_path
    size = make_tokenizer(place / "tok")
    config = model_config(
        "INTERNLM", "float32", vocab_size=size, max_position_embeddings=48
    )
    _, found = save_model(
        place / "c", config, str(place / "tok"), GenerationConfig(eos_id=(2,), bos_id=1)
    )
    (place / "tok/chat_template.jinja").write_text(CHAT)
    (place / "plain").mkdir()
    (place / "plain/tokenizer.json").write_text(
        (place / "tok/tokenizer.json").read_text()
    )
    export(found, place / "hf", ExportOptions(compare=False), lambda line: None)
    for name, text in (
        ("choice", CHOICE),
        ("rolling", ROLLING),
        ("generate", GENERATE % " s"),
        ("likely", LIKELY),
    ):
        (place / f"{name}.yaml").write_text(text + COMMON)
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, questions())))
    return place


def hf_results(place: Path, tasks: list[str], **how: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    results: dict[str, Any] | None = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(place / "hf"), "dtype": "float32"},
        tasks=tasks,
        device="cpu",
        batch_size=5,
        **how,
    )
    assert results is not None
    return results


FILES = ["choice.yaml", "rolling.yaml", "generate.yaml"]
CHATS = ["choice.yaml", "likely.yaml", "generate.yaml"]


def same_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(theirs["results"]) == 3
    for task in theirs["results"]:
        scores = {
            key: value
            for key, value in theirs["results"][task].items()
            if isinstance(value, float)
        }
        assert scores
        for key, value in scores.items():
            assert ours["results"][task][key] == pytest.approx(value, rel=1e-5), (
                task,
                key,
            )


def test_scores_are_those_of_the_exported_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(place)
    said = run(
        "evomesh",
        "eval",
        "c",
        "--tasks",
        ",".join(FILES),
        "--output",
        "out.json",
        cwd=place,
    )
    assert (
        said.count("step 7 of c") == 1
        and "|animals|" in said
        and "word_perplexity" in said
    )
    same_scores(json.loads((place / "out.json").read_text()), hf_results(place, FILES))


def test_scores_of_a_folder_with_its_chat_template(
    place: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(place)
    command = [
        "evomesh",
        "eval",
        "hf",
        "--tasks",
        ",".join(CHATS),
        "--apply-chat-template",
    ]
    run(*command, "--system-instruction", "be short", "--output", "out.json", cwd=place)
    chat = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "system_instruction": "be short",
    }
    theirs = hf_results(place, CHATS, **chat)
    same_scores(json.loads((place / "out.json").read_text()), theirs)
    (before,) = hf_results(place, ["likely.yaml"])["results"].values()
    assert before["perplexity,none"] != pytest.approx(
        theirs["results"]["said"]["perplexity,none"], rel=1e-3
    )
    said = run(*command, "--tokenizer", "plain", cwd=place, code=2)
    assert "no chat template" in said and "Traceback" not in said


def test_tasks_that_are_not_there(place: Path) -> None:
    from lm_eval.tasks import TaskManager

    from evomesh.evaluate.run import find_tasks, refuse_unknown

    with pytest.raises(UserError, match="no task file"):
        find_tasks([str(place / "no.yaml")])
    known = TaskManager(include_path=str(place), include_defaults=False)
    with pytest.raises(UserError, match="unknown task 'animal'") as caught:
        refuse_unknown("animal", known)
    assert caught.value.fix == "did you mean 'animals'?"


def server_results(place: Path, url: str, tasks: list[str]) -> dict[str, Any]:
    """Return the scores that the harness gets from a server, as its command does for local-completions."""
    from lm_eval.evaluator import simple_evaluate

    results: dict[str, Any] | None = simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(place / "hf"),
            "tokenizer_backend": "huggingface",
            "max_length": SERVED_LENGTH,
            "num_concurrent": 1,
            "max_retries": 1,
            "add_bos_token": True,
        },
        tasks=tasks,
        batch_size=3,
    )
    assert results is not None
    return results


SERVED_LENGTH = 48


def test_scores_through_the_server_are_those_of_the_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness reads its whole context length but for two tokens: one that is generated, one that is predicted."""
    pytest.importorskip("aiohttp")
    from evomesh.evaluate.native import HarnessModel
    from evomesh.evaluate.run import load_tasks, run_tasks
    from evomesh.serve.load import ModelOptions, load_service
    from tests.support.serving import serving

    monkeypatch.chdir(place)
    loaded = load_model("hf", "cpu")
    native = HarnessModel(
        loaded.model,
        loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        context_length=SERVED_LENGTH - 2,
    )
    service = load_service(
        "hf", "cpu", ModelOptions(name="tiny", context_length=SERVED_LENGTH)
    )
    with serving(service) as served:
        theirs = server_results(place, served.url, FILES)
    same_scores(run_tasks(native, load_tasks(FILES)), theirs)
