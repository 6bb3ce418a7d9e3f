"""Tokenizer folders of public shapes: text, ids and targets are those of ``transformers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from evomesh.data.chat import end_of_answer_ids
from evomesh.data.chat_message import ChatMessage
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.template import TemplateRenderer
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError

CORPUS = [
    "what is the answer to the question",
    "the cat sat on the mat 12345",
    "be brief, please\n\n",
    "春眠不觉晓",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The features of published templates, in other words.
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set rules = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set rules = false %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and rules %}{{ '<<SYS>>\n' + rules + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m.role %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ENDS_WITH_EOS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}" + CHATML
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ text ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% continue %}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "what is <the> answer? "}
ANSWER = {"role": "assistant", "content": " the cat 春眠 é🙂"}
MARKS = {"role": "user", "content": "write <|im_end|> and </s> and <end_of_turn>"}
LAST = {"role": "assistant", "content": "12345\n"}
EMPTY = {"role": "user", "content": ""}
CONVERSATIONS = {
    "one turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "two turns": [USER, ANSWER, MARKS, LAST],
    "empty turn": [EMPTY, {"role": "assistant", "content": ""}, USER, LAST],
}


def byte_level(folder: Path, special: list[str], *, bos: str = "") -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=pair
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def spaced(folder: Path, special: list[str]) -> None:
    """A tokenizer.json with a mark for spaces and byte fallback, as Mistral's and Gemma's have it."""
    tokenizer = Tokenizer(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, show_progress=False
    )
    tokenizer.train_from_iterator([text[:30] for text in CORPUS], trainer)
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [
        token for token in record["added_tokens"] if token["content"] in special
    ]
    (folder / "tokenizer.json").write_text(json.dumps(record))


def sentencepiece(folder: Path, symbols: list[str], *, prefix: bool) -> None:
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 9), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=330, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, user_defined_symbols=symbols, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


IM = ["<|im_start|>", "<|im_end|>"]
FOLDERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "llama2": (
        lambda path: sentencepiece(path, [], prefix=True),
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>"},
        BRACKETS,
    ),
    "llama2 legacy": (
        lambda path: sentencepiece(path, [], prefix=True),
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>"},
        BRACKETS,
    ),
    "llama3": (
        lambda path: byte_level(
            path,
            ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
            bos="<|begin_of_text|>",
        ),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
        },
        HEADERS,
    ),
    "internlm": (
        lambda path: sentencepiece(path, [], prefix=False),
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "additional_special_tokens": IM},
        "{{ bos_token }}" + CHATML,
    ),
    "qwen2": (
        lambda path: byte_level(path, ["<|endoftext|>"]),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": IM,
        },
        TOOLS,
    ),
    "qwen3": (
        lambda path: byte_level(path, ["<|endoftext|>", *IM]),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"},
        THINKING,
    ),
    "mistral": (
        lambda path: spaced(path, ["<unk>", "<s>", "</s>"]),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        BRACKETS,
    ),
    "gemma": (
        lambda path: spaced(path, ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"},
        TURNS,
    ),
    "phi3": (
        lambda path: spaced(path, ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>", "<|assistant|>"]),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"},
        ENDS_WITH_EOS,
    ),
    "smollm3": (
        lambda path: byte_level(path, ["<|begin_of_text|>", *IM]),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"},
        TAGGED,
    ),
    "deepseek": (
        lambda path: byte_level(
            path, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
        ),
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "bos_token": {
                "__type": "AddedToken",
                "content": "<｜begin▁of▁sentence｜>",
                "normalized": True,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            },
            "eos_token": "<｜end▁of▁sentence｜>",
            "unk_token": None,
        },
        ROLES,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FOLDERS)
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("folder")
    build, settings, template = FOLDERS[request.param]
    build(path)
    (path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True
    )


def messages(turns: list[dict[str, str]]) -> list[ChatMessage]:
    return [
        ChatMessage(turn["role"], turn["content"], turn["role"] == "assistant")
        for turn in turns
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_and_ids_of_transformers(folder: Path, theirs: Any, name: str) -> None:
    turns = CONVERSATIONS[name]
    tokenizer = load_tokenizer(folder)
    template = JinjaTemplate(tokenizer)
    whole = theirs.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert [abs(token) for token in template.encode(messages(turns))] == whole
    prompt = turns[:-1]
    wanted = theirs.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert template.encode_prompt(messages(prompt)) == wanted
    text = theirs.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=False
    )
    assert template.render(prompt, add_generation_prompt=True) == text


def test_plain_texts_and_special_tokens_of_transformers(
    folder: Path, theirs: Any
) -> None:
    tokenizer = load_tokenizer(folder)
    for text in (
        "the cat",
        " a  b\n\n",
        "x</s> y<|im_end|>z",
        "春眠 é🙂",
        "",
        "<s>[INST] a",
    ):
        assert tokenizer.encode(text) == theirs.encode(
            text, add_special_tokens=False
        ), text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
    )
    assert dict(tokenizer.special_tokens) == theirs.special_tokens_map
    assert tokenizer.vocab_size == max(theirs.get_vocab().values()) + 1


def test_targets_are_what_follows_the_generation_prompt(
    folder: Path, theirs: Any
) -> None:
    """An answer's targets decode to its text and its terminator, which is an id that ends an answer."""
    tokenizer = load_tokenizer(folder)
    template = JinjaTemplate(tokenizer)
    for turns in (CONVERSATIONS["one turn"], CONVERSATIONS["two turns"]):
        ids = template.encode(messages(turns))
        answers = [
            turn["content"].strip() for turn in turns if turn["role"] == "assistant"
        ]
        targets = tokenizer.decode([token for token in ids if token > 0])
        for answer in answers:
            assert answer in targets
        assert "what is" not in targets and "write" not in targets
        ends = end_of_answer_ids(tokenizer, None, 1000, template)
        assert len([token for token in ids if token in ends]) >= len(answers)


def test_tagged_targets_are_the_assistant_mask(tmp_path: Path) -> None:
    build, settings, template = FOLDERS["smollm3"]
    build(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    ours = JinjaTemplate(load_tokenizer(tmp_path))
    for turns in CONVERSATIONS.values():
        wanted = theirs.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = ours.encode(messages(turns))
        assert [int(token > 0) for token in ids] == wanted["assistant_masks"]
    first_muted = messages(CONVERSATIONS["two turns"])
    first_muted[1] = ChatMessage("assistant", ANSWER["content"], False)
    targets = [token for token in ours.encode(first_muted) if token > 0]
    assert theirs.decode(targets) == "12345\n<|im_end|>\n"


def test_history_that_the_template_rewrites_is_no_target(tmp_path: Path) -> None:
    build, settings, template = FOLDERS["qwen3"]
    build(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    ours = JinjaTemplate(load_tokenizer(tmp_path))
    thought = ChatMessage("assistant", "<think>\nhm\n</think>\n\nthe cat", True)
    turns = [*messages([USER]), thought, *messages([MARKS, LAST])]
    with pytest.raises(UserError, match=r"message 2 of 4"):
        ours.encode(turns)
    turns[1] = ChatMessage("assistant", thought.text, False)
    assert (
        ours.tokenizer.decode([token for token in ours.encode(turns) if token > 0])
        == "12345\n<|im_end|>\n"
    )
    assert "hm" in ours.tokenizer.decode(
        [abs(token) for token in ours.encode(turns[:2])]
    )


def test_tools_and_message_keys_reach_the_template(tmp_path: Path) -> None:
    build, settings, _ = FOLDERS["qwen2"]
    build(tmp_path)
    calls = CHATML.replace(
        "m.content", "(m.tool_calls | tojson if m.tool_calls else m.content)"
    )
    named = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": TOOLS.replace(CHATML, calls)},
    ]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": named})
    )
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    ours = JinjaTemplate(load_tokenizer(tmp_path))
    tools = [{"type": "function", "function": {"name": "f", "description": "<a> & 春"}}]
    call = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": call}]
    mine = [*messages([USER]), ChatMessage("assistant", "", True, {"tool_calls": call})]
    for given in (tools, None):
        wanted = theirs.apply_chat_template(turns, tools=given, return_dict=True)[
            "input_ids"
        ]
        assert [abs(token) for token in ours.encode(mine, given)] == wanted


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("{{ 'a' * 10000000000 }}", "longer than"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "steps",
        ),
        (
            "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            "nested too deeply",
        ),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "longer",
        ),
        ("{{ 'a'.center(10 ** 9) }}", "width"),
        ("{{ '{:999999999}'.format(1) }}", "width"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no\nway') }}", "rejects the conversation: no way"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% if", "not a chat template: line 1"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("a" * (1 << 21), "characters"),
    ],
)
def test_templates_that_fail_are_one_line(source: str, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        TemplateRenderer(source, "here").render([USER])
    assert "\n" not in caught.value.found
