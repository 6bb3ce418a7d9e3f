"""Read what the files of a tokenizer's folder say beside its vocabulary: added tokens, special tokens, chat templates.

The files and their precedence are those of ``transformers``: with
``added_tokens_decoder`` in tokenizer_config.json the older special_tokens_map.json and
added_tokens.json do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomesh import user_files
from evomesh.errors import UserError

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# The special tokens of tokenizer classes, where a folder does not name them; of any
# other class: none.
CLASS_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    },
    "Qwen2Tokenizer": {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
}
FLAGS = ("single_word", "lstrip", "rstrip")
MEMBERS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class AddedTokenSpec:
    """A token that a folder adds to the vocabulary.

    Attributes:
        id: the id that the folder gives it; None: the next one.
        flags: further arguments of ``tokenizers.AddedToken``.
    """

    content: str
    id: int | None
    special: bool
    normalized: bool
    flags: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class TokenizerFolder:
    """The tokens, settings and templates that the files beside a vocabulary define.

    Attributes:
        path: the folder.
        exists: whether there is any such file.
        settings: tokenizer_config.json, with special_tokens_map.json where that counts.
        added: tokens to add, in order.
        special: the text of each special token by its name ("bos_token").
        templates: chat templates by name; the usual one is "default".
    """

    path: Path
    exists: bool
    settings: dict[str, Any]
    added: list[AddedTokenSpec]
    special: dict[str, str]
    templates: dict[str, str]

    @property
    def class_name(self) -> str:
        """The tokenizer class without its suffix; "" if the folder names none."""
        return str(self.settings.get("tokenizer_class") or "").removesuffix("Fast")

    def names(self, special: str) -> bool:
        """Return whether the folder says which token a special one is, or that there is none."""
        return special in self.settings or bool(self.class_name)


def read_tokenizer_folder(path: Path) -> TokenizerFolder:
    """Read the files of a folder; all of them are optional.

    Raises:
        UserError: a file is not JSON, or has another form than expected.
    """
    # 1. Tokens with ids: from the newer setting, else from the two older files.
    settings = read_json(path / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        added = _tokens_of_setting(settings, path)
    else:
        settings |= read_json(path / "special_tokens_map.json")
        added = _tokens_of_files(settings, path)

    # 2. Special tokens that these lack: each gets the next free id.
    special = _special_tokens(settings)
    mentioned = [
        *map(settings.get, SPECIAL_NAMES),
        *special.values(),
        *_extra_tokens(settings),
    ]
    for token in mentioned:
        if token and _content(token) not in added:
            spec = _added_token(token, None, special=True)
            added[spec.content] = spec
    return TokenizerFolder(
        path,
        any((path / name).is_file() for name in MEMBERS),
        settings,
        list(added.values()),
        special,
        _chat_templates(path, settings),
    )


def _tokens_of_setting(
    settings: dict[str, Any], path: Path
) -> dict[str, AddedTokenSpec]:
    """Return the tokens of ``added_tokens_decoder`` by their content: {"7": {"content": "<x>", ...}}."""
    added = {}
    tokens = _object(settings, "added_tokens_decoder", path)
    for token_id, token in tokens.items():
        spec = _added_token(token, int(token_id), special=False)
        added[spec.content] = spec
    return added


def _tokens_of_files(settings: dict[str, Any], path: Path) -> dict[str, AddedTokenSpec]:
    """Return the tokens of added_tokens.json by their content, in the order of their ids: {"<x>": 7}."""
    named = _special_tokens(settings)
    extra = map(_content, _extra_tokens(settings))
    special_contents = {*named.values(), *extra}
    added = {}
    id_of = read_json(path / "added_tokens.json")
    for content in sorted(id_of, key=lambda content: int(id_of[content])):
        is_special = content in special_contents
        added[content] = AddedTokenSpec(
            content, id_of[content], is_special, normalized=not is_special
        )
    return added


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file.

    Raises:
        UserError: it is not JSON.
    """
    if not path.is_file():
        return {}
    record = user_files.read_json(path)
    return record if isinstance(record, dict) else {}


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    class_name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    named = CLASS_DEFAULTS.get(class_name, {}) | {
        name: settings[name] for name in SPECIAL_NAMES if name in settings
    }
    return {name: _content(token) for name, token in named.items() if token}


def _extra_tokens(settings: dict[str, Any]) -> list[Any]:
    extra = (
        settings.get("extra_special_tokens")
        or settings.get("additional_special_tokens")
        or []
    )
    return list(extra.values()) if isinstance(extra, dict) else list(extra)


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _added_token(token: Any, token_id: int | None, *, special: bool) -> AddedTokenSpec:
    """Return an added token of a string or an object."""
    if not isinstance(token, dict):
        return AddedTokenSpec(str(token), token_id, special, normalized=False)
    flags = tuple((name, bool(token.get(name, False))) for name in FLAGS)
    is_special = bool(token.get("special", special))
    # A special token is looked for in the text as it was written, others in the
    # normalized text.
    is_normalized = bool(token.get("normalized", not is_special))
    content = _content(token)
    return AddedTokenSpec(content, token_id, is_special, is_normalized, flags)


def _object(settings: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = settings[key] or {}
    if not isinstance(value, dict):
        raise UserError(
            f"{key} is a {type(value).__name__}",
            where=str(path / "tokenizer_config.json"),
            expected="an object of ids and tokens",
        )
    return value


def _chat_templates(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; files replace the setting."""
    templates = {}
    default = path / "chat_template.jinja"
    if default.is_file():
        templates["default"] = user_files.read_text(default)
    named_folder = path / "additional_chat_templates"
    for file in sorted(named_folder.glob("*.jinja")):
        templates[file.stem] = user_files.read_text(file)
    return templates or _templates_of_setting(settings)


def _templates_of_setting(settings: dict[str, Any]) -> dict[str, str]:
    # The setting is one template, a mapping of names, or a list of objects with
    # ``name`` and ``template``.
    given = settings.get("chat_template") or {}
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    if not isinstance(given, dict):
        given = {"default": given}
    return {str(name): str(template) for name, template in given.items()}
