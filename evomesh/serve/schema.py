"""Requests of the OpenAI API, as far as they apply to a text model.

https://platform.openai.com/docs/api-reference/completions and .../chat. Beyond those: top_k, min_p,
repetition_penalty and rotary_type.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from evomesh.config.schema import RotaryType
from evomesh.generate.options import SamplingParams
from evomesh.serve.requests import ApiError

INT64 = 2**63 - 1
MAX_TOKENS = 2**31 - 1  # the real limit is the model's context length, which has its own error
UNION_MEMBER = re.compile(r"(str|int|list\[.*|constrained-.*)$")  # pydantic lists these among the keys

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    # Accepted and ignored: it pads events to hide their length, which nothing here requires.
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
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rotary_type: RotaryType | None = None
    # These describe the client, not the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # Accepted if they ask for what happens anyway.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _accept_float_zero(cls, value: object) -> object:
        return 0 if value == 0 and type(value) in (int, float) else value

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
        return SamplingParams.from_settings(self, seed=seed, logprobs=self.logprob_count, eos_ids=eos_ids)


class CompletionRequest(ApiRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_form(cls, value: object) -> object:
        """Raise one clear message where each of the four members of the union would raise its own."""
        if isinstance(value, str) or _is_ids(value):
            return value
        items = value if isinstance(value, list) else []
        all_texts = all(isinstance(item, str) for item in items)
        all_ids = all(_is_ids(item) for item in items)
        if items and (all_texts or all_ids):
            return value
        raise ValueError(
            "expected a string, a list of strings, a list of token ids or a list of such lists; not empty"
        )

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if _is_ids(self.prompt) else self.prompt  # type: ignore[return-value]

    @property
    def logprob_count(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


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
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: bool = False

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1


RequestType = TypeVar("RequestType", bound=ApiRequest)


def parse_request(kind: type[RequestType], body: bytes) -> RequestType:
    """Parse a body.

    Raises:
        ApiError: not JSON, or not what ``kind`` describes; it names the key.
    """
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
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(part for part in parts if not UNION_MEMBER.match(part))
    message = first["msg"].removeprefix("Value error, ")
    code = "invalid_value"
    if first["type"] == "extra_forbidden":
        message = "not supported by this server"
        code = "unknown_parameter"
    elif first["type"] == "missing":
        code = "missing_parameter"
    return ApiError(400, f"{key}: {message}", param=key, code=code)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
