"""Requests of the OpenAI API, as far as they apply to a text model.

https://platform.openai.com/docs/api-reference/completions and .../chat. Beyond those:
top_k, min_p, repetition_penalty and rotary_type.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    field_validator,
    model_validator,
)

from evomesh.config.schema import RotaryType
from evomesh.generate.options import SamplingParams
from evomesh.serve.requests import MAX_OBJECT_KEYS, ApiError, check_structure

INT64 = 2**63 - 1
# The real limit is the model's context length, which has its own error.
MAX_TOKENS = 2**31 - 1
# Pydantic lists these among the keys.
UNION_MEMBER = re.compile(r"(str|int|list\[.*|constrained-.*)$")
MAX_STOPS = 4  # as in OpenAI's API
MAX_STOP_CHARACTERS = 256

NOT_SUPPORTED = "not supported by this server"
# Keys of OpenAI's API that are accepted only with what happens anyway.
NEUTRAL_VALUES = {
    "presence_penalty": "0",
    "frequency_penalty": "0",
    "logit_bias": "{}",
    "suffix": '""',
    "response_format": '{"type": "text"}',
    "tools": "[]",
    "functions": "[]",
    "tool_choice": '"none" or "auto"',
    "function_call": '"none" or "auto"',
    "modalities": '["text"]',
}

UnitInterval = Annotated[float, Field(ge=0, le=1)]
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyDict = Annotated[dict[str, Any], Field(max_length=0)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    # Accepted and ignored: it pads events to hide their length, which nothing here
    # requires.
    include_obfuscation: bool = False


class ApiRequest(BaseModel):
    """The keys that both kinds of requests share. Unknown keys are rejected; null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=MAX_TOKENS)
    min_p: UnitInterval = 0.0
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-INT64, le=INT64)
    stop: SkipValidation[str | list[str]] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rotary_type: RotaryType | None = None
    # These describe the client, not the answer.
    user: str | None = None
    metadata: SkipValidation[dict[str, Any]] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Accepted if they ask for what happens anyway.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: EmptyDict | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _accept_float_zero(cls, value: object) -> object:
        return 0 if value == 0 and type(value) in (int, float) else value

    @field_validator("metadata", mode="before")
    @classmethod
    def _check_metadata(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError("expected an object")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: object) -> object:
        stops = value if isinstance(value, list) else [value]
        if len(stops) > MAX_STOPS:
            raise ValueError(
                f"{len(stops)} stop strings; at most {MAX_STOPS} are allowed, as in OpenAI's API"
            )
        for stop in stops:
            if not isinstance(stop, str):
                raise ValueError("expected a string, or a list of strings")
            if not stop:
                raise ValueError("a stop string is empty")
            if len(stop) > MAX_STOP_CHARACTERS:
                raise ValueError(
                    f"a stop string has {len(stop)} characters; at most {MAX_STOP_CHARACTERS} are allowed"
                )
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def logprob_count(self) -> int:
        """As ``SamplingParams.logprobs``."""
        raise NotImplementedError

    def sampling_params(self, eos_ids: tuple[int, ...]) -> SamplingParams:
        """Return the sampling parameters; without a seed in the request, a random one."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**64
        # A request for the prompt alone still reads it, and gets its scores with the
        # first token.
        max_new_tokens = 1 if self.max_new_tokens == 0 else self.max_new_tokens
        return SamplingParams.from_settings(
            self,
            seed=seed,
            logprobs=self.logprob_count,
            eos_ids=eos_ids,
            max_new_tokens=max_new_tokens,
            score_prompt=self.repeats_prompt and self.logprob_count >= 0,
        )

    @property
    def repeats_prompt(self) -> bool:
        """Return whether answers begin with the prompt."""
        return False


class CompletionRequest(ApiRequest):
    # Checked by `_check_form`; pydantic would collect an error for each of a million
    # items.
    prompt: SkipValidation[str | list[str] | list[int] | list[list[int]]]
    max_tokens: int | None = Field(16, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_form(cls, value: object) -> object:
        """Raise one clear message where each of the four members of the union would raise its own."""
        if isinstance(value, str) or _is_ids(value):
            return value
        items = value if isinstance(value, list) else []
        all_texts = set(map(type, items)) == {str}
        all_ids = all(_is_ids(item) for item in items)
        if items and (all_texts or all_ids):
            return value
        raise ValueError(
            "expected a string, a list of strings, a list of token ids or a list of such lists; not empty"
        )

    @model_validator(mode="after")
    def _check_length(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is for requests with echo: true")
        return self

    @property
    def repeats_prompt(self) -> bool:
        return self.echo

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if _is_ids(self.prompt) else self.prompt  # type: ignore[return-value]

    @property
    def logprob_count(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


class RequestMessage(BaseModel):
    """A message of a conversation, as clients write it or send the server's own answer back.

    Null means absent, as do the empty values of ``EMPTY_KEYS``.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: SkipValidation[str | list[dict[str, Any]]]
    name: str | None = None
    # What a reasoning model thought before an earlier answer is no part of the next
    # prompt.
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        given = {key: item for key, item in value.items() if item is not None}
        for key in EMPTY_KEYS:
            if key in given and not given[key]:
                del given[key]
        return given

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: object) -> object:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("expected a string, or a list of parts of type text")
        for number, part in enumerate(value):
            _check_part(number, part)
        return value

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content)


# What the clients of OpenAI's API write into a message that has none of these.
EMPTY_KEYS = ("tool_calls", "annotations", "refusal")


def _check_part(number: int, part: object) -> None:
    """Check one part of a content.

    Raises:
        ValueError: it is not a part of type text, or has more than a text.
    """
    if not isinstance(part, dict) or part.get("type") != "text":
        raise ValueError(
            f"part {number} is not of type text, the only one that this server supports"
        )
    if not isinstance(part.get("text"), str):
        raise ValueError(f"part {number} has no text")
    for key, item in part.items():
        if key not in ("type", "text") and item is not None:
            raise ValueError(
                f"part {number} has {key!r}, which this server does not support"
            )


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatRequest(ApiRequest):
    messages: list[RequestMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: EmptyList | None = None
    functions: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: bool = False

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self

    @property
    def logprob_count(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1


RequestType = TypeVar("RequestType", bound=ApiRequest)


def parse_request(kind: type[RequestType], body: bytes) -> RequestType:
    """Parse a body.

    Raises:
        ApiError: not JSON, or not what ``kind`` describes; it names the key.
    """
    check_structure(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            400, f"the body is not JSON: {error}", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    _check_objects(value)
    given = {key: item for key, item in value.items() if item is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _first_error(error) from None


def _check_objects(value: dict[str, Any]) -> None:
    """Reject a body with an object of very many keys, at any depth: pydantic would list each that it does not know.

    Raises:
        ApiError: 400.
    """
    containers: list[Any] = [value]
    while containers:
        container = containers.pop()
        items = container
        if isinstance(container, dict):
            if len(container) > MAX_OBJECT_KEYS:
                message = f"an object has {len(container)} keys; at most {MAX_OBJECT_KEYS} are allowed"
                raise ApiError(400, message, code="invalid_value")
            items = container.values()
        containers += [item for item in items if isinstance(item, dict | list)]


def _first_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    parts = map(str, first["loc"])
    names = [part for part in parts if not UNION_MEMBER.match(part)]
    key = ".".join(names)
    message = first["msg"].removeprefix("Value error, ")
    if not key:  # a check of several keys names the one that it is about
        key, _, message = message.partition(": ")
    code = "invalid_value"
    if first["type"] == "extra_forbidden":
        message = NOT_SUPPORTED
        code = "unknown_parameter"
    elif first["type"] == "missing":
        code = "missing_parameter"
    elif names and names[0] in NEUTRAL_VALUES:
        key = names[0]
        accepted = NEUTRAL_VALUES[key]
        message = f"{NOT_SUPPORTED}; leave it out, or set it to {accepted}"
    else:
        message = _in_plain_words(first["type"], message)
    return ApiError(400, f"{key}: {message}", param=key, code=code)


def _in_plain_words(kind: str, message: str) -> str:
    """Return a message of pydantic without its classes and its inner workings."""
    if kind == "model_type":
        return "expected an object"
    return message.replace(" after validation", "").replace("Input should", "it should")


def _is_ids(value: object) -> bool:
    # Without a loop of the interpreter, which would slow down the event loop's thread
    # while it runs.
    return isinstance(value, list) and set(map(type, value)) == {int}
