"""What clients may send: OpenAI's fields, vLLM's additions, and what they mean to the engine.

A field that would change the answer but is not supported is refused by name, not ignored. Fields that only concern
the caller's account are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kvferry.engine.config import MAX_COMPLETIONS, RequestOutputKind, SamplingParams
from kvferry.errors import ConfigError, did_you_mean
from kvferry.http import ApiError, check_stops, load_object

TokenIds = list[int]
_Ids = Annotated[list[int], Field(fail_fast=True)]  # else a list of a million mistakes makes a million errors
Body = TypeVar("Body", bound="GenerationBody")
REMOTE_CACHED = "remote_prefill_cached_tokens"  # vLLM's name
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_MAX_SALT_CHARS = 1024  # it is hashed for each choice


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What is checked of a body before anything is made of it: the work for it must not depend on what it asks for."""

    max_model_len: int
    max_choices: int
    """Of all prompts together."""
    max_stops: int
    """Stop strings, and stop token ids."""
    longest_token_chars: int = 1
    """Characters of the longest token: a longer text than `max_model_len` of those is not tokenized."""

    def check(self, body: dict[str, Any]) -> None:
        """ApiError for lists that are too long, whatever is in them."""
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) > max(self.max_choices, self.max_model_len):
            if type(prompt[0]) is int:
                self.check_length(len(prompt))
            raise ApiError(
                400, f"prompt has {len(prompt)} entries; this server takes {self.max_choices} choices at once",
                param="prompt",
            )  # fmt: skip
        for name, value in (("messages", body.get("messages")), *_contents(body)):
            if isinstance(value, list) and len(value) > self.max_model_len:
                raise ApiError(
                    400, f"{name} has {len(value)} entries, more than max_model_len={self.max_model_len}",
                    param="messages", code="context_length_exceeded",
                )  # fmt: skip
        check_stops(body, self.max_stops)

    def check_choices(self, num_choices: int) -> None:
        """ApiError when these are too many."""
        if num_choices > self.max_choices:
            raise ApiError(400, f"{num_choices} choices at once; this server takes {self.max_choices}")

    def check_length(self, num_tokens: int, param: str = "prompt") -> None:
        """The engine checks it too, but hashing a prompt of megabytes would hold up everybody's next step."""
        if num_tokens >= self.max_model_len:
            raise ApiError(
                400, f"the prompt has {num_tokens} tokens, which with one to generate is above "
                f"max_model_len={self.max_model_len}", param=param, code="context_length_exceeded",
            )  # fmt: skip

    def check_text(self, num_chars: int, param: str) -> None:
        """Before it is tokenized."""
        if num_chars > self.max_model_len * self.longest_token_chars:
            raise ApiError(
                400, f"{param}: the prompt has {num_chars} characters, more than max_model_len={self.max_model_len} "
                f"tokens of {self.longest_token_chars} characters, the longest that this model has",
                param=param, code="context_length_exceeded",
            )  # fmt: skip


def _contents(body: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the messages say, by a name for errors."""
    messages = body.get("messages")
    listed = messages if isinstance(messages, list) else []
    return [
        (f"messages.{index}.content", message.get("content"))
        for index, message in enumerate(listed)
        if isinstance(message, dict)
    ]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, content: Any) -> Any:
        """Name the first unknown field; pydantic's own `extra="forbid"` would list all of them."""
        for name in content if isinstance(content, dict) else ():
            if name not in cls.model_fields:
                raise PydanticCustomError("unknown_field", "not supported", {"name": name})
        return content


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool = False


class GenerationBody(_Strict):
    """What both kinds of completion take. None means the default, as OpenAI's clients send it."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: _Ids | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=_MAX_SALT_CHARS)] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    # only the value that means nothing
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # ignored
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        return 1 if self.n is None else self.n

    @property
    def wants_stream_usage(self) -> bool:
        """Whether a last chunk is to report usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_promised_tokens(self) -> int | None:
        """Prompt tokens whose KV another engine is said to have for this one; None: no word of it."""
        params = self.kv_transfer_params or {}
        num_tokens = params.get("remote_num_tokens") if params.get("do_remote_prefill") is True else None
        return num_tokens if type(num_tokens) is int else None

    @property
    def num_remote_cached_tokens(self) -> int | None:
        """Prompt tokens that the prefill engine took from a cache; None: nothing was handed over, or no word of it."""
        params = self.kv_transfer_params or {}
        num_tokens = params.get(REMOTE_CACHED) if params.get("do_remote_prefill") is True else None
        return num_tokens if type(num_tokens) is int and num_tokens >= 0 else None

    def limit_tokens(self, longest: int) -> int:
        """The most tokens to generate; `longest` when the client leaves it open."""
        raise NotImplementedError

    def num_logprobs(self) -> int | None:
        """`SamplingParams.logprobs`."""
        raise NotImplementedError

    def sampling_params(self, longest_tokens: int) -> list[SamplingParams]:
        """One per choice of a prompt: a seed makes each choice repeatable, not all the same. ConfigError by field."""
        names = (
            "temperature", "top_p", "presence_penalty", "frequency_penalty", "stop", "top_k", "min_p",
            "repetition_penalty", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            n=self.num_choices,
            max_tokens=self.limit_tokens(longest_tokens),
            seed=self.seed,
            logprobs=self.num_logprobs(),
            extra_args={"kv_transfer_params": self.kv_transfer_params} if self.kv_transfer_params else None,
            output_kind=RequestOutputKind.DELTA,
            **given,
        ).per_completion()


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(fail_fast=True)] | _Ids | Annotated[list[_Ids], Field(fail_fast=True)]
    logprobs: int | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | TokenIds]:
        """One or more; ConfigError when there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ConfigError("prompt=[] must not be empty")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def limit_tokens(self, longest: int) -> int:
        return _DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a chat."""

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ResponseFormat(_Strict):
    """`response_format`."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Any = None

    @property
    def num_chars(self) -> int:
        """Of all that the messages say."""
        return sum(len(message.role) + len(message.for_template()["content"]) for message in self.messages)

    def limit_tokens(self, longest: int) -> int:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return longest if limit is None else limit

    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise ConfigError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
            return None
        return self.top_logprobs or 0


def parse_body(kind: type[Body], data: bytes, limits: BodyLimits) -> Body:
    """Check a request body. Raises ApiError (400) naming the first field that is wrong."""
    content = load_object(data)
    limits.check(content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # Of a field that may be one of several things, the reading that got furthest is meant.
        wrong = max(error.errors(include_url=False, include_input=False), key=lambda each: _depth(each["loc"]))
    path = [str(step) for step in wrong["loc"] if isinstance(step, int) or (step.isidentifier() and step != "str")]
    message = wrong["msg"]
    if wrong["type"] == "unknown_field":
        name = wrong["ctx"]["name"]
        near = did_you_mean(name, kind.model_fields).partition(" (known")[0] if not path else ""
        path, message = [*path, name], f"{message}{near}"
    raise ApiError(400, f"{'.'.join(path)}: {message}", param=path[0])


def _depth(place: tuple[int | str, ...]) -> tuple[int, list[int]]:
    return len(place), [step for step in place if isinstance(step, int)]
