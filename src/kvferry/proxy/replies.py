"""What engines answer, parsed into bounded types: unknown fields are skipped without being built.

A wrong shape is a ValueError, which is to count as a failure of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from kvferry.proxy.fleet import Engine

T = TypeVar("T")
Params = dict[str, Any]

_MAX_LINE_CHARS = 1000
_MAX_CODE_CHARS = 64
_MAX_PARAMS_BYTES = 4 << 20  # a million tokens are 64,000 block ids of 16 tokens, 0.5 MB in each group
_MAX_PARAMS_DEPTH = 8
_MAX_SMALL_BYTES = 4096
_REPLIES_PER_ENGINE = 4
_NULL = Raw(b"null")
_NOTHING = (b"null", b'""', b"[]", b"{}", b"false", b"0")
NO_TOKEN = "no_token"  # kvferry serve's code, where the model's logits name no token (NaN, infinity)
_VLLM_ENGINE_DEAD = "EngineCore encountered an issue"  # the text of its EngineDeadError, which has no code of its own
_ENDED_BY_ERROR = 'it ended the request with finish_reason="error", as for KV that failed to load'

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)] | None
_Name = Annotated[str, Meta(max_length=256)] | None


class _Object(Struct, gc=False):
    """Any."""


class _Message(Struct, gc=False):
    content: str | None = None


class _Choice(Struct, gc=False):
    index: int
    finish_reason: str | None = None
    text: str | None = None
    message: _Message | None = None
    delta: Raw = _NULL
    logprobs: Raw = _NULL
    token_ids: Raw = _NULL
    stop_reason: Raw = _NULL


class _PromptDetails(Struct, gc=False):
    cached_tokens: _Count = None


class _Usage(Struct, gc=False):
    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    total_tokens: _Count = None
    prompt_tokens_details: _PromptDetails | None = None


class _Reply(Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Raw = _NULL
    kv_transfer_params: Raw = _NULL


class _ErrorFields(Struct, gc=False):
    message: str | None = None
    code: str | int | None = None
    type: str | None = None
    param: str | None = None


class _Params(Struct, gc=False):
    """Of `kv_transfer_params` what the proxy looks at; all else is between the engines."""

    do_remote_prefill: bool | None = None
    transfer_id: _Name = None
    remote_lease_id: _Name = None
    remote_host: _Name = None
    remote_port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    num_recomputed_tokens: _Count = None
    load_error: str | None = None
    not_handed_over: str | None = None


@dataclass(frozen=True, slots=True)
class ReplyVerdict:
    """What a reply, or an event of a stream, says about the work behind it."""

    error: str | None = None
    """Why the engine could not answer."""
    num_recomputed_tokens: int = 0
    has_content: bool = True
    """False for an event that only opens a stream."""
    hand_over: Params | None = None
    """Where the KV is, of a prefill engine's reply."""
    not_handed_over: str = ""
    """Why there is none, where that is because of the request itself: every engine would say the same."""
    load_error: str = ""
    """Why KV was not loaded, where the engine says so."""
    is_death: bool = False
    """The error is that the engine itself has ended."""
    is_requests_own: bool = False
    """The error is the request's own, in an engine that works."""


@dataclass(frozen=True, slots=True)
class EngineError:
    """What the body of an error reply says."""

    message: str
    code: str = ""
    is_full: bool = False
    """With status 503: there is no room now, for an engine that works."""
    is_death: bool = False
    """The engine itself has ended."""
    blames_hand_over: bool = False
    """`kv_transfer_params` are to blame, which are the proxy's: clients may send none."""
    is_requests_own: bool = False
    """The error is the request's own, in an engine that works: it would be the same elsewhere."""


def one_line(text: str) -> str:
    """An engine's words for a log or a message: printable, on one line, cut where they are long."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * _MAX_LINE_CHARS])
    return " ".join(printable.split())[:_MAX_LINE_CHARS]


def judge_reply(data: bytes) -> ReplyVerdict:
    """Read a whole reply; ValueError unless it answers, or says why not."""
    reply = parse(data, _Reply)
    verdict = _verdict(reply)
    if verdict.error is None:
        if not reply.choices:
            raise ValueError("it has no choices")
        if any(choice.text is None and choice.message is None for choice in reply.choices):
            raise ValueError("a choice has neither a text nor a message")
    return verdict


def judge_event(data: bytes) -> ReplyVerdict:
    """Read the JSON of a stream's event; ValueError where that is of a wrong shape."""
    return _verdict(parse(data, _Reply))


def is_object(data: bytes) -> bool:
    """Whether it is one JSON object, whatever that holds."""
    try:
        parse(data, _Object)
    except ValueError:
        return False
    return True


def error_of(data: bytes) -> EngineError:
    """Read an error reply, as JSON of OpenAI's or as the text it is."""
    try:
        error = parse(data, _Reply).error
    except ValueError:
        error = _NULL
    if bytes(error) in _NOTHING:
        return EngineError(one_line(data[: 16 * _MAX_LINE_CHARS].decode(errors="replace")))
    fields = _error_fields(error)
    code = fields.code if isinstance(fields.code, str) and len(fields.code) <= _MAX_CODE_CHARS else ""
    # `kvferry serve` says it with a code, vLLM (max_num_queued_reqs, max_num_queued_tokens) with a type.
    is_full = code == "overloaded" or fields.type == "Service Unavailable"
    blames_hand_over = fields.param == "kv_transfer_params"
    return EngineError(
        str(fields.message), one_line(code), is_full, _is_death(fields), blames_hand_over, fields.code == NO_TOKEN
    )


@contextmanager
def holding(engine: Engine, limit_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many bytes of one reply are held now.

    ValueError above the limit, or when all replies of this engine together hold more than four times as much.
    """
    held = 0

    def hold(num_bytes: int) -> None:
        nonlocal held
        engine.held_bytes += num_bytes - held
        held = num_bytes
        if held > limit_bytes:
            raise ValueError(f"it has more than {limit_bytes} bytes (the proxy's --max-reply-bytes)")
        if engine.held_bytes > _REPLIES_PER_ENGINE * limit_bytes:
            raise ValueError(
                f"this engine's replies under way have more than {_REPLIES_PER_ENGINE} times {limit_bytes} bytes "
                "together (the proxy's --max-reply-bytes)"
            )

    try:
        yield hold
    finally:
        engine.held_bytes -= held


def parse(data: bytes | Raw, kind: type[T]) -> T:
    """JSON of this type. ValueError for anything else, also for JSON too deep, NaN, and bytes that are no UTF-8."""
    try:
        bytes(data).decode()
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _verdict(reply: _Reply) -> ReplyVerdict:
    params, raw_params = _params(reply.kv_transfer_params)
    load_error = one_line(params.load_error or "")
    message, is_death, is_requests_own = None, False, False
    if bytes(reply.error) != b"null":
        fields = _error_fields(reply.error)
        message, is_death = str(fields.message), _is_death(fields)
        is_requests_own = fields.code == NO_TOKEN
    choices = reply.choices or []
    if any(choice.finish_reason == "error" for choice in choices):
        message = message or load_error or _ENDED_BY_ERROR
    says = [_says_something(choice) for choice in choices]  # each is checked
    return ReplyVerdict(
        error=message,
        num_recomputed_tokens=params.num_recomputed_tokens or 0,
        has_content=not choices or any(says),
        hand_over=raw_params if params.do_remote_prefill else None,
        not_handed_over=one_line(params.not_handed_over or ""),
        load_error=load_error,
        is_death=is_death,
        is_requests_own=is_requests_own,
    )


def _params(raw: Raw) -> tuple[_Params, Params]:
    if bytes(raw) == b"null":
        return _Params(), {}
    if len(bytes(raw)) > _MAX_PARAMS_BYTES:
        raise ValueError(f"its kv_transfer_params have more than {_MAX_PARAMS_BYTES} bytes")
    try:
        params, all_of_them = parse(raw, _Params), parse(raw, Params)
    except ValueError as err:
        raise ValueError(f"its kv_transfer_params are wrong: {err}") from None
    if not _is_flat(all_of_them, _MAX_PARAMS_DEPTH):
        raise ValueError(f"its kv_transfer_params are nested more than {_MAX_PARAMS_DEPTH} deep")
    return params, all_of_them


def _is_flat(value: Any, depth: int) -> bool:
    inner = [item for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, dict | list)]
    return not inner or (depth > 1 and all(_is_flat(item, depth - 1) for item in inner))


def _error_fields(raw: Raw) -> _ErrorFields:
    """With a message in any case."""
    text = bytes(raw)[: 16 * _MAX_LINE_CHARS].decode(errors="replace")
    try:
        parsed = parse(raw, str | _ErrorFields)  # type: ignore[arg-type]
    except ValueError:
        parsed = text
    fields = parsed if isinstance(parsed, _ErrorFields) else _ErrorFields(str(parsed))
    return _ErrorFields(one_line(fields.message or text), fields.code, fields.type, fields.param)


def _is_death(error: _ErrorFields) -> bool:
    return error.code == "engine_ended" or _VLLM_ENGINE_DEAD in str(error.message)


def _says_something(choice: _Choice) -> bool:
    """Whether an event's choice has more than who speaks. ValueError for a `delta` of a wrong shape."""
    delta = bytes(choice.delta)
    if delta != b"null":
        parse(choice.delta, _Message)
        if len(delta) > _MAX_SMALL_BYTES:
            return True
        fields = parse(choice.delta, dict[str, Raw])
        if any(bytes(value) not in _NOTHING for name, value in fields.items() if name != "role"):
            return True
    told = (choice.logprobs, choice.token_ids, choice.stop_reason)
    return bool(choice.text or choice.finish_reason) or any(bytes(value) not in _NOTHING for value in told)
