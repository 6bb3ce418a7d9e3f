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
        special: whether it is left out where special tokens are skipped.
        normalized: whether it is found in normalized text only.
        flags: further arguments of ``tokenizers.AddedToken``.
    """

    content: str
    special: bool
    normalized: bool
    flags: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def of(cls, token: Any, *, special: bool) -> AddedTokenSpec:
        """Return the token that a file describes by a string or an object.

        Args:
            special: whether it is special if an object does not say.
        """
        if not isinstance(token, dict):
            return cls(str(token), special, False)
        flags = tuple((name, bool(token.get(name, False))) for name in FLAGS)
        is_special = bool(token.get("special", special))
        normalized = bool(token.get("normalized", not is_special))
        return cls(str(token.get("content", "")), is_special, normalized, flags)

    def build(self) -> Any:
        """Build the library's own object."""
        from tokenizers import AddedToken

        return AddedToken(
            self.content,
            special=self.special,
            normalized=self.normalized,
            **dict(self.flags),
        )


@dataclass(frozen=True)
class TokenizerFolder:
    """The tokens, settings and templates that the files beside a vocabulary define.

    Attributes:
        path: the folder.
        exists: whether there is any such file.
        settings: tokenizer_config.json, with special_tokens_map.json where that counts.
        model_config: the config.json of a model; empty if there is none.
        added: tokens to add, by id.
        lists_added: whether these are all: then a tokenizer.json's own do not count.
        named: the special tokens by name ("bos_token"); None where a file says that there is none.
        extra: further special tokens; None if tokenizer_config.json lists none.
        fallback_extra: those that count where it lists none and the model defines no symbols.
        templates: chat templates by name; the usual one is "default".
    """

    path: Path
    exists: bool
    settings: dict[str, Any]
    model_config: dict[str, Any]
    added: dict[int, AddedTokenSpec]
    lists_added: bool
    named: dict[str, AddedTokenSpec | None]
    extra: list[AddedTokenSpec] | None
    fallback_extra: list[AddedTokenSpec]
    templates: dict[str, str]


def read_tokenizer_folder(path: Path) -> TokenizerFolder:
    """Read the files of a folder; all of them are optional.

    Raises:
        UserError: a file is not JSON, or has another form than expected.
    """
    # 1. Settings. Older folders keep the names of special tokens in a file of their
    #    own.
    settings = read_json(path / "tokenizer_config.json")
    lists_added = "added_tokens_decoder" in settings
    older = {} if lists_added else read_json(path / "special_tokens_map.json")
    extra, fallback = _extra_tokens(settings, older)
    settings |= older
    named = _named_tokens(settings)

    # 2. Tokens beside the vocabulary: in the settings with all their properties, in
    #    older folders by content alone, so that what is special must be found among the
    #    names.
    added: dict[int, AddedTokenSpec] = {}
    if lists_added:
        for token_id, token in _object(settings, "added_tokens_decoder", path).items():
            added[int(token_id)] = AddedTokenSpec.of(token, special=False)
    else:
        special = {token.content for token in named.values() if token is not None}
        special |= {token.content for token in extra or []}
        for content, number in read_json(path / "added_tokens.json").items():
            is_special = content in special
            added[int(number)] = AddedTokenSpec(content, is_special, not is_special)
    return TokenizerFolder(
        path,
        any((path / name).is_file() for name in MEMBERS),
        settings,
        read_json(path / "config.json"),
        added,
        lists_added,
        named,
        extra,
        fallback,
        _chat_templates(path, settings),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file.

    Raises:
        UserError: it is not JSON.
    """
    if not path.is_file():
        return {}
    record = user_files.read_json(path)
    return record if isinstance(record, dict) else {}


def _named_tokens(settings: dict[str, Any]) -> dict[str, AddedTokenSpec | None]:
    """Return the special tokens that have a name: bos_token and the like, image_token and others of a model."""
    named: dict[str, Any] = {}
    for name, token in settings.items():
        # null says that there is no such token; add_bos_token and the like are no names.
        is_usual = name in SPECIAL_NAMES
        is_of_model = name.endswith("_token") and isinstance(token, (str, dict))
        if is_usual or is_of_model:
            named[name] = token
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        tokens_of_model = settings.get(key)
        if isinstance(tokens_of_model, dict):
            named |= tokens_of_model
    specs = {}
    for name, token in named.items():
        specs[name] = _named_token(token)
    return specs


def _named_token(token: Any) -> AddedTokenSpec | None:
    return AddedTokenSpec.of(token, special=True) if token else None


def _extra_tokens(
    settings: dict[str, Any], older: dict[str, Any]
) -> tuple[list[AddedTokenSpec] | None, list[AddedTokenSpec]]:
    """Return the special tokens without names, and those that are listed under the older key alone.

    Args:
        settings: tokenizer_config.json; its older key counts as the newer one if that has nothing.
        older: special_tokens_map.json.
    """
    extra = settings.get("extra_special_tokens")
    additional = settings.get("additional_special_tokens")
    if not extra and additional is not None:
        extra = additional
        additional = None
    if isinstance(older.get("extra_special_tokens"), list):
        more = [
            token
            for token in older["extra_special_tokens"]
            if token not in (extra or [])
        ]
        extra = [*(extra or []), *more]
    fallback = older.get("additional_special_tokens", additional)
    listed = _specs(extra) if isinstance(extra, list) else None
    return listed, _specs(fallback or [])


def _specs(tokens: list[Any]) -> list[AddedTokenSpec]:
    return [AddedTokenSpec.of(token, special=True) for token in tokens]


def _object(settings: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = settings[key] or {}
    if not isinstance(value, dict):
        raise UserError(
            f"{key} is a {type(value).__name__}",
            where=str(path / "tokenizer_config.json"),
            expected="an object of ids and tokens",
            code="EVO-TOKEN-003",
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
    if not templates:
        return _templates_of_setting(settings)
    return templates


def _templates_of_setting(settings: dict[str, Any]) -> dict[str, str]:
    # The setting is one template, a mapping of names, or a list of objects with
    # ``name`` and ``template``.
    given = settings.get("chat_template") or {}
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    if not isinstance(given, dict):
        given = {"default": given}
    return {str(name): str(template) for name, template in given.items()}
