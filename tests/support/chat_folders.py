"""Tokenizer folders in the shapes of published chat models, and conversations to render with them.

Tokenizers and templates are made here; they have the features of the published ones: the kind of the tokenizer, the
files that name its tokens, and what its template does. In templates, ``@[`` and ``]@`` surround what the model writes:
they become ``{% generation %}`` tags, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "what is the answer to the question",
    "the cat sat on the mat 12345",
    "be brief, please\n\n",
    "user\n\nassistant\n\n\nsystem\n  the",
    "春眠不觉晓",
]
IM = ["<|im_start|>", "<|im_end|>"]
UNUSED = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "@[{{ m.content + '<|im_end|>\n' }}]@{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS_CHATML = "{{ bos_token }}" + CHATML
UNUSED_CHATML = BOS_CHATML.replace("<|im_start|>", UNUSED[1]).replace(
    "<|im_end|>", UNUSED[0]
)
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set rules = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set rules = false %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and rules %}{{ '<<SYS>>\n' + rules + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}@[{{ ' ' + m.content.strip() + ' ' + eos_token }}]@{% endif %}{% endfor %}"
)
HEADERS = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}"
    "@[{{ m['content'] | trim + '<|eot_id|>' }}]@{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    "@[{{ m.content | trim + '<end_of_turn>\n' }}]@{% else %}"
    "{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ENDS_WITH_EOS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "@[{{ m.content + '<|end|>\n' }}{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}]@"
    "{% else %}{{ m.content + '<|end|>\n' }}{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}"
    "{{- messages[0].content + '\n\n' }}{%- endif %}{{- '<tools>' }}{%- for t in tools %}{{- '\n' }}{{- t | tojson }}"
    "{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'system' and loop.first and tools %}{%- continue %}{%- endif %}"
    "{%- if m.role == 'tool' %}{%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}{{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{%- if loop.nextitem is not defined or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}@[{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}{%- set call = call.function or call %}"
    '{{- \'\n<tool_call>\n{"name": "\' ~ call.name ~ \'", "arguments": \' }}'
    "{{- call.arguments | tojson ~ '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}]@{%- else %}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1] | trim('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}@["
    "{% if loop.index0 > ns.last and thought %}{{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' }}{% endif %}"
    "{{ text ~ '<|im_end|>\n' }}]@{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ text ~ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% continue %}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' }}@[{{ m.content + eos_token }}]@"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def added(content: str, **flags: bool) -> dict[str, Any]:
    """Return a token as tokenizer_config.json describes it."""
    common = {"lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "single_word": False, "special": True} | common | flags


def byte_level(folder: Path, special: list[str], *, bos: str = "") -> None:
    """Write the tokenizer.json of Llama 3, Qwen, SmolLM and DeepSeek: bytes, and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    # Line ends are separate pieces, as with Llama 3 and Qwen: the end of a prompt is cut
    # alike with and without an answer after it.
    lines_and_words = pre_tokenizers.Split(
        Regex(r"\s*[\r\n]+|\s+(?!\S)| ?\S+"), behavior="isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            lines_and_words,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    if bos:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=pair
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def spaced(folder: Path, special: list[str], rstrip: tuple[str, ...] = ()) -> None:
    """Write a tokenizer.json with a mark for spaces and byte fallback, as Mistral's, Gemma's and Phi-3's.

    Args:
        rstrip: special tokens that take the spaces after them.
    """
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
    kept = [token for token in record["added_tokens"] if token["content"] in special]
    for token in kept:
        token["rstrip"] = token["content"] in rstrip
    record["added_tokens"] = kept
    (folder / "tokenizer.json").write_text(json.dumps(record))


def sentencepiece(folder: Path, symbols: list[str], *, prefix: bool) -> None:
    """Write the tokenizer.model of Llama 2 (with a space in front of a text) and InternLM (without)."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 9), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=330, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, user_defined_symbols=symbols, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


def spaced_internlm2(folder: Path) -> None:
    """Write InternLM2's tokenizer.json, whose last two tokens are the marks of ChatML."""
    spaced(folder, ["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = [AddedToken(mark, special=True, normalized=False) for mark in IM]
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(folder / "tokenizer.json"))


@dataclass(frozen=True)
class ChatFolder:
    """A row of the table.

    Attributes:
        build: writes the tokenizer's file.
        settings: tokenizer_config.json but for the template.
        template: with marks around what the model writes.
        style: the built-in template that gives the same ids; "" if there is none.
        files: further files of the folder, by name.
    """

    build: Callable[[Path], None]
    settings: dict[str, Any]
    template: str
    style: str = ""
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, *, tagged: bool = False) -> Path:
        """Write the folder and return it.

        Args:
            tagged: mark what the model writes with generation tags.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.build(path)
        opening = "{% generation %}" if tagged else ""
        closing = "{% endgeneration %}" if tagged else ""
        template = self.template.replace("@[", opening).replace("]@", closing)
        files = {"tokenizer_config.json": self.settings | {"chat_template": template}}
        for name, content in (files | self.files).items():
            (path / name).write_text(json.dumps(content))
        return path


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
INTERNLM2 = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}
FOLDERS = {
    "llama2": ChatFolder(
        lambda path: sentencepiece(path, [], prefix=True),
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>"},
        BRACKETS,
    ),
    "llama2 legacy": ChatFolder(
        lambda path: sentencepiece(path, [], prefix=True),
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>"},
        BRACKETS,
    ),
    "llama2 extended": ChatFolder(
        lambda path: sentencepiece(path, [], prefix=True),
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "<|im_end|>"},
        BOS_CHATML,
        "chatml",
        {"added_tokens.json": {"<|im_end|>": 330, "<|im_start|>": 331}},
    ),
    "llama3": ChatFolder(
        lambda path: byte_level(
            path,
            ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
            bos="<|begin_of_text|>",
        ),
        FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        HEADERS,
        "llama3",
    ),
    "internlm": ChatFolder(
        lambda path: sentencepiece(path, [], prefix=False),
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "additional_special_tokens": IM},
        BOS_CHATML,
        "chatml",
    ),
    "internlm2": ChatFolder(
        lambda path: sentencepiece(path, UNUSED, prefix=False),
        INTERNLM2
        | {
            "tokenizer_class": "InternLM2Tokenizer",
            "additional_special_tokens": IM,
            "added_tokens_decoder": {"0": added("<unk>"), "1": added("<s>"), "2": added("</s>"),
                                     "3": added("<|im_end|>"), "4": added("<|im_start|>")},
        },
        BOS_CHATML,
        "chatml",
    ),
    "internlm2 unused": ChatFolder(
        lambda path: sentencepiece(path, UNUSED, prefix=False),
        INTERNLM2 | {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False},
        UNUSED_CHATML,
        "chatml",
    ),
    "internlm2 fast": ChatFolder(
        spaced_internlm2,
        INTERNLM2 | {"tokenizer_class": "InternLM2Tokenizer", "additional_special_tokens": IM},
        BOS_CHATML,
        "chatml",
    ),
    "qwen2": ChatFolder(
        lambda path: byte_level(path, ["<|endoftext|>"]),
        FAST
        | {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": IM,
        },
        TOOLS,
        "chatml",
    ),
    "qwen3": ChatFolder(
        lambda path: byte_level(path, ["<|endoftext|>", *IM]),
        FAST | {"bos_token": None, "eos_token": "<|im_end|>"},
        THINKING,
        "chatml",
    ),
    "mistral": ChatFolder(
        lambda path: spaced(path, ["<unk>", "<s>", "</s>"]),
        FAST | {"bos_token": "<s>", "eos_token": "</s>"},
        BRACKETS,
    ),
    "gemma": ChatFolder(
        lambda path: spaced(path, ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]),
        FAST | {"bos_token": "<bos>", "eos_token": "<eos>"},
        TURNS,
    ),
    "phi3": ChatFolder(
        lambda path: spaced(
            path,
            ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>", "<|assistant|>", "<|user|>", "<|system|>"],
            rstrip=("</s>", "<|end|>", "<|assistant|>", "<|user|>", "<|system|>"),
        ),
        FAST | {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        ENDS_WITH_EOS,
    ),
    "smollm2": ChatFolder(
        lambda path: byte_level(path, ["<|endoftext|>", *IM]),
        FAST | {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        CHATML,
        "chatml",
    ),
    "smollm3": ChatFolder(
        lambda path: byte_level(path, ["<|begin_of_text|>", *IM]),
        FAST | {"bos_token": None, "eos_token": "<|im_end|>"},
        TAGGED,
        "chatml",
    ),
    "deepseek": ChatFolder(
        lambda path: byte_level(
            path, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
        ),
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "bos_token": {"__type": "AddedToken"} | added("<｜begin▁of▁sentence｜>", normalized=True),
            "eos_token": "<｜end▁of▁sentence｜>",
            "unk_token": None,
        },
        ROLES,
    ),
}  # fmt: skip

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "what is <the> answer? "}
ANSWER = {"role": "assistant", "content": " the cat 春眠 é🙂"}
MARKS = {
    "role": "user",
    "content": "write <|im_end|> and </s> and <end_of_turn>, <|eot_id|>, [UNUSED_TOKEN_145] \n<|end|>  <s>[/INST]",
}
LAST = {"role": "assistant", "content": "12345\n"}
UNICODE = "e\u0301 ﬁ 👩‍👩‍👧 שלום\u200b\u00a0\r\n\tСлава \ufeff𝔘 ½"
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "<a> & 春 'q'",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
}
CALL = {
    "type": "function",
    "function": {"name": "f", "arguments": {"x": 1, "é": "<b>"}},
}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
RESULT = {"role": "tool", "content": '{"x": "春"}'}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe cat"}
REASONED = {"role": "assistant", "content": "12345", "reasoning_content": "so\nso"}


def user(content: str) -> dict[str, Any]:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """Return an answer."""
    return {"role": "assistant", "content": content}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "two turns": [USER, ANSWER, MARKS, LAST],
    "five turns": [SYSTEM, *([user("what"), assistant("the cat")] * 5)],
    "empty turns": [user(""), assistant(""), USER, LAST],
    "empty system": [{"role": "system", "content": ""}, USER, LAST],
    "spaces": [user("\n\n  the \n"), assistant("  \n\nthe  cat \t\n\n"), user("   "), assistant("\n")],
    "unicode": [user(UNICODE), assistant(UNICODE)],
    "marks": [MARKS, assistant(MARKS["content"])],
    "tools": [SYSTEM, USER, CALLING, RESULT, RESULT, ANSWER, user("what"), LAST],
    "history rewritten": [USER, THOUGHT, MARKS, REASONED],
    "reasoning": [USER, REASONED],
    "ends with the user": [USER, ANSWER, user("the")],
    "wrong order": [USER, USER, ANSWER],
    "begins with an answer": [LAST, USER, ANSWER],
}  # fmt: skip
