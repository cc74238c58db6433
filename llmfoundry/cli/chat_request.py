"""A request to `/v1/chat/completions`: the supported fields of OpenAI's API. Every other field is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmfoundry.config import ConfigError
from llmfoundry.data.conversations import Message
from llmfoundry.eval.generate import Sampling
from llmfoundry.strict_json import parse_json


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A message; images, tool calls and speakers' names are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]


class StreamOptions(_Strict):
    """What a stream contains besides the text."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of a request."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = None  # the name of the served model
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)  # newer name of max_tokens
    seed: int | None = None
    stop: str | list[str] = []
    n: Literal[1] = 1

    @property
    def conversation(self) -> list[Message]:
        """The messages in the form that a chat template takes."""
        return [
            {"role": one.role, "content": one.content if isinstance(one.content, str) else "".join(
                part.text for part in one.content)}
            for one in self.messages
        ]  # fmt: skip

    @property
    def endings(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, default: Sampling) -> Sampling:
        """Return the sampling settings; `default` fills in what the request leaves out."""
        given = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens, "temperature": self.temperature,
            "top_p": self.top_p, "seed": self.seed,
        }  # fmt: skip
        return Sampling(**default._asdict() | {key: value for key, value in given.items() if value is not None})


def parse_request(body: bytes) -> ChatRequest:
    """Parse a request; fields that are null count as left out.

    Raises:
        ConfigError: if the body is not valid JSON, or a field is wrong or not supported; the message names it.
    """
    try:
        data = parse_json(body)
    except ValueError:
        raise ConfigError("body: is not valid JSON") from None
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if value is not None}
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(_said(one["loc"], one["type"], one["msg"]) for one in error.errors())) from None


def _said(where: tuple[int | str, ...], kind: str, message: str) -> str:
    name = ".".join(map(str, where)) or "body"
    if kind == "extra_forbidden":
        return f"{name}: is not supported; supported are {', '.join(ChatRequest.model_fields)}"
    return f"{name}: {message}"
