"""Render the Jinja chat templates of tokenizer folders as ``transformers``' ``apply_chat_template`` does.

Templates are programs of strangers. They run in Jinja's immutable sandbox, with bounds
on loops and texts, and whatever fails in them is a ``UserError`` of one line.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum

from evomesh.errors import UserError

MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 26  # characters of a string that a template makes
MAX_LOOP_STEPS = 1 << 22  # of one rendering, over all loops
MAX_WIDTH = 10_000  # columns that a template pads or indents to
PADDING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs")
PADDING_FILTERS = ("center", "indent", "wordwrap", "truncate")
# Names under which messages give the reasoning before an answer; templates read the
# first one.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
OPEN_END = "EVOMESH-OPEN-END "  # marks the place where a message to be continued ends

Span = tuple[int, int]  # start and end of characters


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        text: the whole of it.
        generated: spans inside ``{% generation %}`` tags, in order.
    """

    text: str
    generated: list[Span] = field(default_factory=list)


@dataclass
class _Rendering:
    """The state of one rendering: its output up to now, and how much of its budget is left."""

    blocks: list[str] = field(default_factory=list)
    generated: list[Span] = field(default_factory=list)
    loop_steps: int = MAX_LOOP_STEPS


class _GenerationTags(Extension):
    """The tag ``{% generation %}...{% endgeneration %}``, which marks what a model writes."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = self.call_method("_mark")
        block = nodes.CallBlock(mark, [], [], body)
        return block.set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        text = str(caller())
        environment = self.environment
        assert isinstance(environment, _TemplateEnvironment)
        rendering = environment.rendering
        start = sum(map(len, rendering.blocks))
        rendering.generated.append((start, start + len(text)))
        return text


class _TemplateNamespace(Namespace):
    """Jinja's ``namespace`` without names that begin with an underscore."""

    def __init__(self, *args: Any, **values: Any) -> None:
        attributes = dict(*args, **values)
        for name in attributes:
            _check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _TemplateDict:
    """Python's ``dict`` as a function: templates cannot reach the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, tags, filters and functions of chat templates, with bounds."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTags, loopcontrols],
        )
        self._threads = threading.local()
        self.concat = self._concat  # type: ignore[method-assign]  # an attribute, by jinja2's documentation
        self.filters["tojson"] = _to_json
        for name in PADDING_FILTERS:
            self.filters[name] = _bound_widths(FILTERS[name])
        self.globals |= {
            "raise_exception": _raise_template_error,
            "strftime_now": _format_now,
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
            "lipsum": _bound_widths(generate_lorem_ipsum),
            "_evomesh_loop": self._count_steps,
            "_evomesh_join": self._join,
        }

    @property
    def rendering(self) -> _Rendering:
        """The rendering of this thread."""
        rendering: _Rendering = self._threads.rendering
        return rendering

    def start_rendering(self) -> _Rendering:
        """Begin a rendering in this thread."""
        self._threads.rendering = _Rendering()
        return self.rendering

    def _parse(
        self, source: str, name: str | None, filename: str | None
    ) -> nodes.Template:
        """Parse a template so that its loops count their steps and ``~`` checks what it joins."""
        # ``for x in items`` becomes ``for x in _evomesh_loop(items)``, and ``a ~ b``
        # becomes ``_evomesh_join(a, b)``: the sandbox intercepts neither.
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            items = loop.iter
            loop.iter = _call("_evomesh_loop", [items], loop.lineno)
        _replace_joins(template)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **values: Any) -> Any:
        self._spend(1)  # macros that call themselves are loops too
        name = getattr(function, "__name__", "")
        if name in PADDING_METHODS:
            _check_widths(*args, *values.values())
        return super().call(context, function, *args, **values)

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            _check_widths(*map(int, _digits(str(getattr(value, "__self__", "")))))
        return super().wrap_str_format(value)

    def _count_steps(self, items: Iterable[Any]) -> Any:
        """Return the items of a loop, which are taken off the rendering's budget."""
        if not isinstance(items, (Sequence, Mapping)):
            items = list(items)
        self._spend(len(items))
        return items

    def _spend(self, steps: int) -> None:
        """Take steps off the rendering's budget."""
        rendering = self.rendering
        rendering.loop_steps -= steps
        if rendering.loop_steps < 0:
            raise SecurityError(f"its loops take more than {MAX_LOOP_STEPS} steps")

    def _concat(self, parts: Iterable[str]) -> str:
        found = list(parts)
        _check_length(sum(map(len, found)))
        return "".join(found)

    def _join(self, *values: Any) -> str:
        return self._concat(map(str, values))


class TemplateRenderer:
    """A compiled chat template; threads may share it.

    Args:
        source: Jinja text.
        where: file or folder it comes from, for messages.

    Raises:
        UserError: it is not a Jinja template, or too large or too deeply nested.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source = source
        self.where = where
        if len(source) > MAX_SOURCE:
            raise UserError(
                f"the chat template has {len(source)} characters",
                where=where,
                expected=f"at most {MAX_SOURCE}",
                code="EVO-TOKEN-008",
            )
        self._environment = _TemplateEnvironment()
        try:
            self._template = self._environment.from_string(source)
        # Deep nesting ends in errors of Python's own compiler.
        except (
            TemplateError,
            RecursionError,
            MemoryError,
            SyntaxError,
            ValueError,
        ) as error:
            raise UserError(
                f"not a chat template: {_describe(error)}",
                where=where,
                code="EVO-TOKEN-008",
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Render a conversation.

        Args:
            messages: objects with a role and a content.
            add_generation_prompt: end where the assistant's answer starts.
            continue_final_message: end with the content of the last message, so that a model can continue it.
            variables: special tokens, ``tools``, ``documents`` and whatever else the template reads.

        Raises:
            UserError: the template refuses the conversation or fails.
        """
        chat = [_prepare_message(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] = str(chat[-1]["content"]) + OPEN_END
        known = {"tools": None, "documents": None} | dict(variables or {})
        known |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
        rendering = self._environment.start_rendering()
        size = 0
        try:
            for block in self._template.generate(known):
                size += len(block)
                _check_length(size)
                rendering.blocks.append(block)
        except UserError:
            raise
        # Templates are programs: they can raise anything on input that they do not
        # expect.
        except Exception as error:
            raise UserError(
                f"the chat template rejects the conversation: {_describe(error)}",
                where=self.where,
                code="EVO-TOKEN-009",
            ) from None
        text = "".join(rendering.blocks)
        if continue_final_message:
            text = self._cut_open_end(text)
        return RenderedChat(text, rendering.generated)

    def _cut_open_end(self, text: str) -> str:
        """Return the text before the mark of an open end; spaces go if the template strips contents."""
        place = text.rfind(OPEN_END.strip())
        if place < 0:
            raise UserError(
                "the chat template leaves out the message that is to be continued",
                where=self.where,
                code="EVO-TOKEN-009",
            )
        is_kept = text[place:].startswith(OPEN_END)
        return text[:place] if is_kept else text[:place].rstrip()


def _prepare_message(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without keys that are null, whose reasoning has every name that templates read."""
    message = {key: value for key, value in given.items() if value is not None}
    found = [message[key] for key in REASONING_KEYS if key in message]
    if not found:
        return message
    return {"thinking": found[0]} | message | {"reasoning_content": found[0]}


def _replace_joins(parent: nodes.Node) -> None:
    """Make ``a ~ b`` a call, below a node."""
    for name, value in list(parent.iter_fields()):
        if isinstance(value, list):
            setattr(parent, name, [_replace_join(child) for child in value])
        else:
            setattr(parent, name, _replace_join(value))


def _replace_join(value: Any) -> Any:
    """Return the field of a node with ``a ~ b``, and every one below it, as a call."""
    if isinstance(value, nodes.Concat):
        environment = value.environment
        assert environment is not None
        value = _call("_evomesh_join", value.nodes, value.lineno)
        value.set_environment(environment)
    if isinstance(value, nodes.Node):
        _replace_joins(value)
    return value


def _call(function: str, arguments: Sequence[nodes.Node], line: int) -> nodes.Call:
    """Return the node of a call of a global function."""
    name = nodes.Name(function, "load", lineno=line)
    return nodes.Call(name, list(arguments), [], None, None, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as it is, where Jinja's own filter writes it for HTML."""
    _check_widths(indent)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _format_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result is too large to be held."""
    # Of two numbers, only a power can be too large.
    if operator == "**":
        if abs(left) > MAX_TEXT or abs(right) > 64:
            raise SecurityError("a power is too large")
    elif operator == "*":
        # A text or list times a number; numbers alone have no size.
        if _is_sized(left) or _is_sized(right):
            size = _size(left) * _size(right)
            _check_length(size)
    elif operator == "+":
        if _is_sized(left):
            _check_length(_size(left) + _size(right))
    elif isinstance(left, str):
        # The widths of "%9d %20s" % values.
        widths = map(int, _digits(left))
        _check_widths(*widths)


def _is_sized(value: Any) -> bool:
    return isinstance(value, (str, list, tuple))


def _size(value: Any) -> int:
    """Return what a value multiplies a length by: its own length, or the number that it is."""
    if _is_sized(value):
        return len(value)
    return max(0, value) if isinstance(value, int) else 0


def _digits(text: str) -> list[str]:
    """Return the numbers in a text."""
    return "".join(
        character if character.isdecimal() else " " for character in text
    ).split()


def _bound_widths(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses numbers beyond ``MAX_WIDTH``."""

    def bounded(*args: Any, **values: Any) -> Any:
        _check_widths(*args, *values.values())
        return function(*args, **values)

    # Jinja recognizes filters that need the environment by an attribute.
    bounded.__dict__ |= function.__dict__
    return bounded


def _check_widths(*values: Any) -> None:
    if any(isinstance(value, int) and value > MAX_WIDTH for value in values):
        raise SecurityError(f"a width is larger than {MAX_WIDTH}")


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise SecurityError(f"a text is longer than {MAX_TEXT} characters")


def _describe(error: BaseException) -> str:
    """Return an error in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return (
        f"line {line}: {text}" if line and not isinstance(error, SyntaxError) else text
    )
