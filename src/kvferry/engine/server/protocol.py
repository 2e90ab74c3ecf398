"""What clients may send: OpenAI's fields, vLLM's additions, and what they mean to the engine.

A field that would change the answer but is not supported is refused by name, not ignored. Fields that only concern
the caller's account are ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvferry.engine.config import MAX_COMPLETIONS, RequestOutputKind, SamplingParams
from kvferry.errors import ConfigError, did_you_mean
from kvferry.http import ApiError

TokenIds = list[int]
Body = TypeVar("Body", bound="GenerationBody")
REMOTE_CACHED = "remote_prefill_cached_tokens"  # vLLM's name
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


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
    stop: str | list[str] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    # only the value that means nothing
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
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

    prompt: str | list[str] | TokenIds | list[TokenIds]
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


class Message(_Strict):
    """One turn of a chat."""

    role: str
    content: str | list[TextPart]
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

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Any = None

    def limit_tokens(self, longest: int) -> int:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return longest if limit is None else limit

    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise ConfigError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
            return None
        return self.top_logprobs or 0


def parse_body(kind: type[Body], data: bytes) -> Body:
    """Check a request body. Raises ApiError (400) naming the first field that is wrong."""
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
        if rb"\ud" in data.lower():  # half of a surrogate pair is no text, and could be neither hashed nor sent back
            json.dumps(content, ensure_ascii=False).encode()
        return kind.model_validate(content)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise ApiError(400, f"the body is not valid JSON: {error}") from None
        first = error.errors(include_url=False, include_context=False)[0]
    path = [str(step) for step in first["loc"]]
    if not path:
        raise ApiError(400, f"the body must be a JSON object: {first['msg']}")
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        near = did_you_mean(path[-1], kind.model_fields).partition(" (known")[0] if len(path) == 1 else ""
        message = f"not supported{near}"
    raise ApiError(400, f"{'.'.join(path)}: {message}", param=path[0])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
