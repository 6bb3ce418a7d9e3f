"""Facts of the built-in chat templates: the marks and special tokens around each role's messages."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TurnStyle:
    """The rendering of one role's messages.

    Attributes:
        opening: fragments before the text; never targets.
        closing: fragments after the text; targets if the message is one.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]


@dataclass(frozen=True)
class ChatStyle:
    """A built-in chat template, made of fragments.

    A fragment that is the exact name of a special token becomes that token's id; other
    fragments are text.

    Attributes:
        turns: by role.
        special: fragments that must be single tokens of the tokenizer.
        eos: whether the conversation ends with eos (a target).
        separator: fragments after every message; never targets.
        strips: whether the published template of the style strips spaces off messages.
    """

    turns: dict[str, TurnStyle]
    special: tuple[str, ...]
    eos: bool
    separator: tuple[str, ...] = ()
    strips: bool = False


# InternLM: <|User|>:text<eoh>\n<|Bot|>:answer<eoa>\n and one eos at the end of the conversation
INTERNLM = ChatStyle(
    {
        "system": TurnStyle(("<|System|>:",), ("\n",)),
        "user": TurnStyle(("<|User|>:",), ("<eoh>", "\n")),
        "assistant": TurnStyle(("<|Bot|>:",), ("<eoa>", "\n")),
    },
    ("<eoh>", "<eoa>"),
    eos=True,
)


# ChatML in InternLM2's version
CHATML = ChatStyle(
    {role: TurnStyle(("<|im_start|>", f"{role}\n"), ("<|im_end|>",)) for role in ROLES},
    ("<|im_start|>", "<|im_end|>"),
    eos=False,
    separator=("\n",),
)


LLAMA3 = ChatStyle(
    {
        role: TurnStyle(
            ("<|start_header_id|>", role, "<|end_header_id|>", "\n\n"), ("<|eot_id|>",)
        )
        for role in ROLES
    },
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    eos=False,
    strips=True,
)


STYLES = {"internlm": INTERNLM, "chatml": CHATML, "llama3": LLAMA3}
# Those that a Jinja template gives the same ids: InternLM's fragments are encoded apart.
TEMPLATED_STYLES = ("chatml", "llama3")


def style_source(style: ChatStyle) -> str:
    """Return a Jinja template that renders conversations in a style.

    Every role of a style has the same fragments, but for its name.
    """
    turn = style.turns["assistant"]
    opening = _role_from_message(turn.opening)
    content = "message.content | trim" if style.strips else "message.content"
    closing = _quote("".join((*turn.closing, *style.separator)))
    prompt = _quote("".join(turn.opening))
    # SmolLM2's tokenizer names the opening mark itself as bos: it is not doubled.
    return (
        f"{{% if bos_token != {_quote(turn.opening[0])} %}}{{{{ bos_token }}}}{{% endif %}}"
        "{% for message in messages %}"
        f"{{{{ {opening} ~ ({content}) ~ {closing} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )


def _role_from_message(opening: tuple[str, ...]) -> str:
    """Return the Jinja expression of an opening, with the message's role for "assistant"."""
    before, _, after = "".join(opening).partition("assistant")
    return f"{_quote(before)} ~ message.role ~ {_quote(after)}"


def _quote(text: str) -> str:
    """Return a text as Jinja's string."""
    return "'" + text.replace("\n", "\\n") + "'"


# Text to InternEvo's tokenizer, special tokens of others.
ROLE_MARKS = ("<|System|>", "<|User|>", "<|Bot|>")


# Names of the same special tokens in published InternLM2 tokenizers.
TOKEN_ALIASES = {
    "<|im_start|>": ("[UNUSED_TOKEN_146]",),
    "<|im_end|>": ("[UNUSED_TOKEN_145]",),
}


# InternEvo's tokenizer does not name these tokens; alpaca_tokenizer.py writes their
# ids. It is known by its size.
INTERNEVO_TOKEN_IDS = {103168: {"<eoh>": 103167, "<eoa>": 103166}}


# Tokens with which published chat models end an answer.
TURN_ENDS = (
    "<|im_end|>",
    *TOKEN_ALIASES["<|im_end|>"],
    "<eoa>",
    "<|eot_id|>",
    "<|end|>",
    "<|eom_id|>",
)
