"""Conversations become token ids: which tokens are written, and which of them are targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from evomesh.data.chat import build_template
from evomesh.data.prepare.conversations import ChatOptions, tokenize_chats
from evomesh.data.prepare.read_conversation import read_conversation
from evomesh.data.records.reader import SourceRecord
from evomesh.data.records.source_files import find_source_files
from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError
from tests.support.covers import covers

ROOT = Path(__file__).parents[3]
SPECIAL = ["<s>", "</s>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder: byte-level BPE, special tokens, ChatML as its jinja template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world"], trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def encode(
    folder: Path, template: str, turns: Any, schema: Any = "messages", **options: Any
) -> tuple[str, str]:
    """Decoded (everything, targets only) of one conversation."""
    tokenizer = load_tokenizer(folder)
    record = SourceRecord(turns, "here")
    ids = build_template(template, tokenizer).encode(
        read_conversation(record, schema, **options)
    )
    return tokenizer.decode([abs(x) for x in ids]), tokenizer.decode(
        [x for x in ids if x > 0]
    )


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "world"},
]


def test_internlm_style_matches_internevo(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = build_template("internlm", tokenizer).encode(
        read_conversation(SourceRecord(ALPACA, ""), "alpaca")
    )
    plain = tokenizer.encode
    name = tokenizer.token_id
    expected = [name("<s>")]
    expected += [
        -x
        for x in [
            *plain("<|User|>:Add.\n1 2"),
            name("<eoh>") or -1,
            *plain("\n"),
            *plain("<|Bot|>:"),
        ]
    ]
    expected += [*plain("3"), name("<eoa>"), *plain("\n"), name("</s>")]
    assert ids == expected
    whole, targets = encode(folder, "internlm", ALPACA | {"input": ""}, "alpaca")
    assert whole == "<s><|User|>:Add.<eoh>\n<|Bot|>:3<eoa>\n</s>"
    assert targets == "3<eoa>\n</s>"  # bos has id 0 here, whose sign cannot show


def test_only_answers_are_targets_in_every_style(folder: Path) -> None:
    whole, targets = encode(folder, "chatml", TURNS)
    assert whole == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"
        "<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"
    )
    assert targets == "hello<|im_end|>world<|im_end|>"
    whole, targets = encode(folder, "llama3", TURNS[1:3])
    assert whole == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nhello<|eot_id|>"
    )
    assert targets == "hello<|eot_id|>"


def test_template_of_the_tokenizer_folder_gives_the_same_ids_and_targets(
    folder: Path,
) -> None:
    whole, targets = encode(folder, "tokenizer", TURNS)
    assert whole == encode(folder, "chatml", TURNS)[0].removeprefix("<s>")
    assert targets == "hello<|im_end|>\nworld<|im_end|>\n"


def test_loss_key_and_roles_choose_the_targets(folder: Path) -> None:
    muted = [*TURNS[:2], TURNS[2] | {"loss": False}, *TURNS[3:]]
    assert encode(folder, "chatml", {"messages": muted})[1] == "world<|im_end|>"
    assert (
        encode(folder, "chatml", TURNS, roles=("user", "system"))[1]
        == "Be brief.<|im_end|>hi<|im_end|>bye<|im_end|>"
    )


def test_sharegpt_records_are_read_like_messages(folder: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert encode(folder, "chatml", {"conversations": turns}, "sharegpt") == encode(
        folder, "chatml", TURNS[1:3]
    )


@pytest.mark.parametrize(
    ("schema", "value", "part"),
    [
        (
            "alpaca",
            {"instruction": "a", "input": "b"},
            "here: the record has no key 'output' (it has: instruction, input)",
        ),
        ("messages", {"text": "a"}, "no key 'messages'"),
        (
            "messages",
            [{"role": "robot", "content": "a"}],
            "the role 'robot' is unknown",
        ),
        ("messages", [{"role": "user", "content": 1}], "content is of type number"),
        ("xtuner", {"conversation": ["a"]}, "the record has no key 'input'"),
        (
            "xtuner",
            {"conversation": [{"system": 7, "input": "a", "output": "b"}]},
            "system is of type number",
        ),
        ("sharegpt", {"conversations": []}, "conversations is empty"),
        ("sharegpt", {"conversations": None}, "conversations is of type null"),
        ("messages", {"messages": "hello"}, "messages is not JSON"),
        ("messages", {"messages": "{}"}, "messages is of type object"),
        ("xtuner", {"conversation": 3}, "conversation is of type number"),
        (
            "xtuner",
            {"conversation": [{"input": "q", "output": "a"}], "system": "s", "meta": 1},
            "unknown keys: 'system', 'meta'",
        ),
        (
            "xtuner",
            {"conversation": [{"input": "q", "output": "a", "output_with_loss": "no"}]},
            "output_with_loss of a message is 'no'",
        ),
        ("alpaca", ALPACA | {"history": "[1"}, "history is not JSON"),
    ],
)
def test_bad_records_are_rejected(schema: Any, value: Any, part: str) -> None:
    with pytest.raises(UserError) as caught:
        read_conversation(SourceRecord(value, "here"), schema)
    assert part in str(caught.value)


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": ""}])
def test_an_alpaca_record_needs_no_input(folder: Path, absent: dict[str, Any]) -> None:
    record = {"instruction": "Add.", "output": "3"} | absent
    whole, _ = encode(folder, "chatml", record, "alpaca")
    assert "user\nAdd.<|im_end|>" in whole


@pytest.mark.parametrize(
    ("schema", "key", "turn"),
    [
        ("messages", "messages", {"role": "assistant", "content": "a"}),
        ("sharegpt", "conversations", {"from": "gpt", "value": "a"}),
        ("xtuner", "conversation", {"input": "q", "output": "a"}),
    ],
)
def test_a_list_of_messages_may_be_a_text_of_json(
    folder: Path, schema: Any, key: str, turn: dict[str, str]
) -> None:
    """As in a column of a csv or parquet file."""
    as_list = encode(folder, "chatml", {key: [turn]}, schema)
    assert encode(folder, "chatml", {key: json.dumps([turn])}, schema) == as_list


def test_history_may_be_a_text_of_json(folder: Path) -> None:
    as_list = encode(
        folder, "chatml", ALPACA | {"history": [["hi", "hello"]]}, "alpaca"
    )
    as_text = ALPACA | {"history": '[["hi", "hello"]]'}
    assert encode(folder, "chatml", as_text, "alpaca") == as_list


@pytest.mark.parametrize(("flag", "targets"), [(0, ""), (None, "a<|im_end|>")])
def test_a_turn_of_xtuner_is_muted_by_zero_too(
    folder: Path, flag: int | None, targets: str
) -> None:
    turn = {"input": "q", "output": "a", "output_with_loss": flag}
    assert encode(folder, "chatml", [turn], "xtuner")[1] == targets


def test_system_and_history_are_part_of_the_conversation(folder: Path) -> None:
    alpaca = ALPACA | {"system": "Be brief.", "history": [["hi", "hello"]], "id": 7}
    whole, targets = encode(folder, "chatml", alpaca, "alpaca")
    assert whole == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"
        "<|im_end|>\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert targets == "hello<|im_end|>3<|im_end|>"
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello", "weight": 0},
    ]
    sharegpt = {"system": "Be brief.", "conversations": turns}
    whole, targets = encode(folder, "chatml", sharegpt, "sharegpt")
    assert "system\nBe brief.<|im_end|>" in whole
    assert targets == ""


@pytest.mark.parametrize(
    ("schema", "value", "part"),
    [
        ("alpaca", ALPACA | {"prompt": "x"}, "unknown keys: 'prompt'"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}], "lang": "en"},
            "'lang'",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a", "score": 1}]},
            "'score'",
        ),
        (
            "messages",
            [{"role": "user", "content": "a", "weight": 0.5}],
            "weight of a message is 0.5",
        ),
        ("alpaca", ALPACA | {"history": ["a"]}, "history has another form"),
    ],
)
def test_keys_that_would_vanish_are_refused_by_name(
    schema: Any, value: Any, part: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_conversation(SourceRecord(value, "here"), schema)
    assert part in str(caught.value)


def test_built_in_templates_refuse_what_they_have_no_place_for(folder: Path) -> None:
    turns = [{"role": "tool", "content": "4", "name": "add"}]
    with pytest.raises(
        UserError, match="no place for the role 'tool', the key 'name' of a message"
    ):
        encode(folder, "chatml", turns)


def test_conversations_without_any_target_are_an_error(
    folder: Path, tmp_path: Path
) -> None:
    files = find_source_files([str(write_alpaca(tmp_path / "a.json", 3))])
    with pytest.raises(UserError, match="none of the 3 conversations has a target"):
        tokenize_chats(
            files,
            tmp_path / "o.bin",
            load_tokenizer(folder),
            ChatOptions("alpaca", max_length=4),
        )


def test_one_of_many_files_without_any_target_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    muted = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo", "loss": False},
    ]
    rows = [{"messages": TURNS}, {"messages": muted}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[1]))
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    options = ChatOptions("messages", template="chatml")
    with pytest.raises(UserError, match=r"b.jsonl: none of the 1 conversations"):
        tokenize_chats(
            find_source_files(names),
            tmp_path / "o.bin",
            load_tokenizer(folder),
            options,
        )
    assert not (tmp_path / "o.bin").exists()
    # A conversation without one is left out and counted.
    _, counts = tokenize_chats(
        find_source_files(names[:1]),
        tmp_path / "o.bin",
        load_tokenizer(folder),
        options,
    )
    assert counts.without_target == 1


def write_alpaca(path: Path, count: int) -> Path:
    path.write_text(
        json.dumps([ALPACA | {"output": f"answer {n}"} for n in range(count)])
    )
    return path


def read_documents(path: Path) -> list[list[int]]:
    dataset = BinDataset(path)
    return [dataset.read(np.array([i])).tolist() for i in range(len(dataset))]


def test_split_is_disjoint_complete_and_repeatable(
    folder: Path, tmp_path: Path
) -> None:
    files = find_source_files([str(write_alpaca(tmp_path / "a.json", 150))])
    tokenizer = load_tokenizer(folder)
    tokenize_chats(
        files, tmp_path / "all.bin", tokenizer, ChatOptions("alpaca"), workers=2
    )
    for seed in (0, 0, 1):
        _, counts = tokenize_chats(
            files,
            tmp_path / f"o{seed}",
            tokenizer,
            ChatOptions("alpaca", split_ratio=0.1, seed=seed),
        )
        assert counts.truncated == 0
    every = read_documents(tmp_path / "all.bin")
    train, valid = (
        read_documents(tmp_path / "o0" / part / "en/dataset.bin")
        for part in ("train", "valid")
    )
    assert (len(train), len(valid)) == (135, 15)
    assert sorted(train + valid) == sorted(every)
    assert [
        document for document in every if document in train
    ] == train  # order is kept
    assert read_documents(tmp_path / "o1/valid/en/dataset.bin") != valid


def test_truncation_is_counted_and_keeps_the_ending(
    folder: Path, tmp_path: Path
) -> None:
    files = find_source_files([str(write_alpaca(tmp_path / "a.json", 3))])
    tokenizer = load_tokenizer(folder)
    tokenize_chats(files, tmp_path / "a.bin", tokenizer, ChatOptions("alpaca"))
    whole = read_documents(tmp_path / "a.bin")
    limit = len(whole[0]) - 3
    facts, counts = tokenize_chats(
        files, tmp_path / "b.bin", tokenizer, ChatOptions("alpaca", max_length=limit)
    )
    cut = read_documents(tmp_path / "b.bin")
    assert [document[:-1] for document in cut] == [
        document[: limit - 1] for document in whole
    ]
    assert all(document[-1] == tokenizer.eos_id for document in cut)
    assert (counts.truncated, counts.lost_tokens) == (
        3,
        sum(len(document) - limit for document in whole),
    )
    assert facts[str(tmp_path / "b.bin")]["truncated"] == 3


def test_conversation_truncated_before_its_answer_is_left_out(
    folder: Path, tmp_path: Path
) -> None:
    """Its ending alone is not worth learning."""
    rows = [ALPACA, ALPACA | {"instruction": "long " * 50}, ALPACA]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    files, tokenizer = (
        find_source_files([str(tmp_path / "a.json")]),
        load_tokenizer(folder),
    )
    facts, counts = tokenize_chats(
        files, tmp_path / "a.bin", tokenizer, ChatOptions("alpaca", max_length=60)
    )
    assert (counts.truncated, counts.without_target) == (1, 1)
    assert (
        facts[str(tmp_path / "a.bin")]["documents"]
        == len(read_documents(tmp_path / "a.bin"))
        == 2
    )


def test_append_adds_conversations_to_every_file(folder: Path, tmp_path: Path) -> None:
    files, tokenizer = (
        find_source_files([str(write_alpaca(tmp_path / "a.json", 20))]),
        load_tokenizer(folder),
    )
    for options, name in (
        (ChatOptions("alpaca"), "o.bin"),
        (ChatOptions("alpaca", split_ratio=0.1), "o"),
    ):
        first, _ = tokenize_chats(files, tmp_path / name, tokenizer, options)
        once = {path: read_documents(Path(path)) for path in first}
        both, _ = tokenize_chats(
            files, tmp_path / name, tokenizer, options, append=True
        )
        for path, found in once.items():
            assert read_documents(Path(path)) == found * 2
            assert both[path]["documents"] == 2 * len(found)
            assert both[path]["sources"] == first[path]["sources"] * 2
    other = load_tokenizer(
        sentencepiece_model(tmp_path, ["<eoh>", "<eoa>", "<|User|>", "<|Bot|>"])
    )
    with pytest.raises(UserError, match="made with another tokenizer"):
        tokenize_chats(
            files, tmp_path / "o.bin", other, ChatOptions("alpaca"), append=True
        )


def test_progress_of_conversations_ends_at_the_size_of_the_input(
    folder: Path, tmp_path: Path
) -> None:
    files, tokenizer = (
        find_source_files([str(write_alpaca(tmp_path / "a.json", 300))]),
        load_tokenizer(folder),
    )
    seen: list[tuple[int, int, int]] = []
    tokenize_chats(
        files,
        tmp_path / "o.bin",
        tokenizer,
        ChatOptions("alpaca"),
        workers=1,
        progress=lambda *now: seen.append(now),
    )
    assert len(seen) > 2 and seen == sorted(seen)
    assert seen[-1] == (
        files[0].size,
        300,
        sum(map(len, read_documents(tmp_path / "o.bin"))),
    )


@pytest.mark.parametrize("roles", [("robot",), ("assistant", "gpt"), (), ("",)])
def test_unknown_roles_are_rejected(
    folder: Path, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    files = find_source_files([str(write_alpaca(tmp_path / "a.json", 3))])
    with pytest.raises(
        UserError, match=r"--train-on: no role .*\n.*system, user, assistant"
    ):
        tokenize_chats(
            files,
            tmp_path / "o.bin",
            load_tokenizer(folder),
            ChatOptions("alpaca", roles=roles),
        )


def test_parquet_and_saved_datasets_are_read_like_json(
    folder: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [ALPACA | {"output": str(n)} for n in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "disk"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tokenizer = load_tokenizer(folder)
    found = []
    for name in ("a.json", "disk", "x.parquet"):
        tokenize_chats(
            find_source_files([str(tmp_path / name)]),
            tmp_path / "o.bin",
            tokenizer,
            ChatOptions("alpaca"),
        )
        found.append(read_documents(tmp_path / "o.bin"))
    assert found[0] == found[1] == found[2]


def test_missing_template_or_special_token_is_rejected(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path, [])
    with pytest.raises(
        UserError, match="no token <eoh>, which the chat template 'internlm' needs"
    ):
        build_template("internlm", load_tokenizer(path))
    with pytest.raises(UserError, match="no chat template 'x'"):
        build_template("x", load_tokenizer(path))
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        build_template("tokenizer", load_tokenizer(path))


@pytest.mark.parametrize("kind", ["text", "symbol", "control"])
def test_special_tokens_are_looked_up_by_name(tmp_path: Path, kind: str) -> None:
    """Role marks may be plain text, symbols recognized in text, or control symbols, found by name only."""
    ends, marks = ["<eoh>", "<eoa>"], ["<|User|>", "<|Bot|>"]
    symbols = ends if kind == "control" else marks if kind == "symbol" else []
    control = marks if kind == "control" else ends
    path = sentencepiece_model(tmp_path, symbols, control)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    name = {piece: int(plain.piece_to_id(piece)) for piece in (*ends, *marks)}

    def mark(piece: str, text: str) -> list[int]:
        return (
            list(plain.encode(piece + text))
            if kind == "text"
            else [name[piece], *plain.encode(text)]
        )

    ids = build_template("internlm", load_tokenizer(path)).encode(
        read_conversation(SourceRecord(ALPACA, ""), "alpaca")
    )
    newline = plain.encode("\n")
    expected = [
        -x
        for x in [
            *mark("<|User|>", ":Add.\n1 2"),
            name["<eoh>"],
            *newline,
            *mark("<|Bot|>", ":"),
        ]
    ]
    assert ids == [1, *expected, *plain.encode("3"), name["<eoa>"], *newline, 2]
    assert len({name["<eoh>"], name["<eoa>"], 0}) == 3
    assert 103166 not in ids


def sentencepiece_model(
    tmp_path: Path, symbols: list[str], control: list[str] | None = None
) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("hello world, this is a line\nand another one\n" * 50)
    control = control or []
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "sp"), vocab_size=300 + len(symbols) + len(control),
        model_type="bpe", byte_fallback=True, user_defined_symbols=symbols, control_symbols=control,
        normalization_rule_name="identity", add_dummy_prefix=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return tmp_path / "sp.model"


@pytest.mark.slow
@covers("promise:tokenizer-tool", "promise:alpaca-tool")
def test_tools_tokenize_like_internevo(tmp_path: Path) -> None:
    model = str(sentencepiece_model(tmp_path, ["<eoh>", "<eoa>"]))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / name), *arguments]
        return subprocess.run(
            command, env=environment, text=True, capture_output=True, check=False
        )

    source = str(write_alpaca(tmp_path / "a.json", 20))
    result = tool(
        "alpaca_tokenizer.py",
        source,
        str(tmp_path / "out"),
        model,
        "--split_ratio",
        "0.2",
    )
    assert result.returncode == 0, result.stderr
    assert len(read_documents(tmp_path / "out/train/en/dataset.bin")) == 16
    valid = read_documents(tmp_path / "out/valid/en/dataset.bin")
    assert len(valid) == 4
    assert {document[0] for document in valid} == {1}
    assert {document[-1] for document in valid} == {2}

    (tmp_path / "raw.txt").write_text(" hello world\n\nthis is\n")
    output = str(tmp_path / "cn" / "o.bin")
    arguments = (
        "--text_input_path",
        str(tmp_path / "raw.txt"),
        "--bin_output_path",
        output,
    )
    result = tool("tokenizer.py", *arguments)
    assert result.returncode == 2
    assert "--tokenizer_path" in result.stderr
    assert tool("tokenizer.py", *arguments, "--tokenizer_path", model).returncode == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert read_documents(Path(output)) == [
        processor.encode("hello world"),
        processor.encode("this is"),
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(Path(model).read_bytes())
    (folder / "tokenization_x.py").write_text("raise SystemExit('this must not run')")
    assert load_tokenizer(folder).encode("hello") == processor.encode("hello")
