"""What a client may ask for: the OpenAI API's requests, as far as they mean something to a model of text.

https://platform.openai.com/docs/api-reference/completions and .../chat. Beyond those: top_k, min_p,
repetition_penalty and rotary_type.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from evomesh.serve.errors import ApiError

INT64 = 2**63 - 1
MOST_TOKENS = 2**31 - 1  # the real limit is the model's context, and says so
FORM = re.compile(
    r"(str|int|list\[.*|constrained-.*)$"
)  # pydantic names the member of a union among the keys

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = (
        False  # accepted: pads events against traffic analysis, which nobody needs here
    )


class ApiRequest(BaseModel):
    """What both kinds of requests share. Unknown keys are refused; null is the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=MOST_TOKENS)
    min_p: UnitInterval = 0.0
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-INT64, le=INT64)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rotary_type: Literal["origin", "dynamic"] | None = None
    # They say something about the client, nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # Taken where they ask for what happens anyway.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _zero(cls, value: object) -> object:
        return 0 if value == 0 and type(value) in (int, float) else value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(ApiRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, le=MOST_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        """One clear message, where the four forms of the union would each give one."""
        one = isinstance(value, str) or _ids(value)
        if one or (isinstance(value, list) and value and all(isinstance(x, str) for x in value)):
            return value
        if isinstance(value, list) and value and all(_ids(x) for x in value):
            return value
        raise ValueError(
            "expected a text, a list of texts, a list of token ids or a list of such lists, not empty"
        )

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if _ids(self.prompt) else self.prompt  # type: ignore[return-value]


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class RequestMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatRequest(ApiRequest):
    messages: list[RequestMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: bool = False


A = TypeVar("A", bound=ApiRequest)


def read(kind: type[A], body: bytes) -> A:
    """Raises: ApiError: not JSON, or not what ``kind`` describes; it names the key."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    given = {key: item for key, item in value.items() if item is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not FORM.match(str(part)))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this server does not know it"
        code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}
        raise ApiError(
            400, f"{place}: {message}", param=place, code=code.get(first["type"], "invalid_value")
        ) from None


def _ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
