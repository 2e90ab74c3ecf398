"""What clients get: OpenAI's objects, made from what the engine reports. Knows nothing of HTTP."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvferry.engine.outputs import CompletionOutput, RequestOutput
from kvferry.engine.request import Logprob
from kvferry.server.protocol import REMOTE_CACHED

logger = logging.getLogger(__name__)

_LOWEST_LOGPROB = -9999.0  # JSON has no -Infinity


@dataclass(slots=True)
class Choice:
    """One choice as it grows from deltas."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    last: RequestOutput | None = None

    def add(self, output: RequestOutput) -> CompletionOutput:
        """Take one delta in, and return it."""
        delta = output.outputs[0]
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.last = output
        return delta


class Dialect(Protocol):
    """How one endpoint puts the same things."""

    id_prefix: str
    prompt_field: str
    """What the prompt comes in."""
    whole: str
    """`object` of a whole reply."""
    chunk: str
    """`object` of a chunk of a stream."""

    def opening(self) -> dict[str, Any] | None:
        """What each choice's stream begins with; None: nothing."""

    def content(self, text: str, is_delta: bool) -> dict[str, Any]:
        """The text in a choice."""

    def logprobs(self, entries: list[dict[int, Logprob]], token_ids: list[int], text_offset: int) -> dict[str, Any]:
        """Log-probabilities of the tokens in a choice; `text_offset` is where their text begins."""


class CompletionDialect:
    """/v1/completions."""

    id_prefix = "cmpl"
    prompt_field = "prompt"
    whole = chunk = "text_completion"

    def opening(self) -> None:
        """Nothing."""

    def content(self, text: str, is_delta: bool) -> dict[str, Any]:
        """Plain."""
        return {"text": text}

    def logprobs(self, entries: list[dict[int, Logprob]], token_ids: list[int], text_offset: int) -> dict[str, Any]:
        """Parallel lists."""
        tokens = [_token_text(token, entry) for token, entry in zip(token_ids, entries, strict=True)]
        offsets = [text_offset + len("".join(tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry[token]) for token, entry in zip(token_ids, entries, strict=True)],
            "top_logprobs": [{_token_text(t, entry): _finite(entry[t]) for t in entry} for entry in entries],
            "text_offset": offsets,
        }


class ChatDialect:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl"
    prompt_field = "messages"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def opening(self) -> dict[str, Any]:
        """Who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def content(self, text: str, is_delta: bool) -> dict[str, Any]:
        """A message, or a part of it."""
        return {"delta": {"content": text}} if is_delta else {"message": {"role": "assistant", "content": text}}

    def logprobs(self, entries: list[dict[int, Logprob]], token_ids: list[int], text_offset: int) -> dict[str, Any]:
        """One object per token."""
        return {
            "content": [
                {**_chat_token(token, entry), "top_logprobs": [_chat_token(t, entry) for t in entry]}
                for token, entry in zip(token_ids, entries, strict=True)
            ]
        }


def _token_text(token: int, entry: dict[int, Logprob]) -> str:
    text = entry[token].decoded_token
    return f"token_id:{token}" if text is None else text


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, _LOWEST_LOGPROB)


def _chat_token(token: int, entry: dict[int, Logprob]) -> dict[str, Any]:
    text = _token_text(token, entry)
    return {"token": text, "logprob": _finite(entry[token]), "bytes": list(text.encode())}


@dataclass(slots=True)
class CompletionReply:
    """One client's reply while it comes together."""

    reply_id: str
    model: str
    dialect: Dialect
    num_choices: int
    """Per prompt; choices of one prompt follow each other."""
    cache_salt: str | None = None
    returns_token_ids: bool = False
    num_promised_tokens: int | None = None
    """Prompt tokens whose KV was to come from another engine."""
    num_remote_cached_tokens: int | None = None
    """Prompt tokens that the engine which prefilled took from a cache; a hand-over is none."""
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        """The reply, once every choice has ended."""
        shown = [
            self._choice(choice, choice.text, choice.token_ids, choice.logprobs, 0, is_delta=False)
            for choice in self.choices
        ]
        return self._object(self.dialect.whole, shown) | {"usage": self.usage()} | self._extras()

    def opening_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        opening = self.dialect.opening()
        if opening is None:
            return []
        return [
            self._object(self.dialect.chunk, [{"index": choice.index, **opening, "finish_reason": None}])
            for choice in self.choices
        ]

    def chunk(self, choice: Choice, output: RequestOutput) -> dict[str, Any] | None:
        """Take a delta in; what the client is to hear of it, or None when there is nothing to say yet."""
        offset, is_first = len(choice.text), not choice.token_ids
        delta = choice.add(output)
        news = self._news(is_first, output.finished)
        if not (delta.text or output.finished or self.returns_token_ids or delta.logprobs or news):
            return None
        shown = self._choice(choice, delta.text, delta.token_ids, delta.logprobs or [], offset, is_delta=True)
        return self._object(self.dialect.chunk, [shown]) | news

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for clients that asked for usage."""
        return self._object(self.dialect.chunk, []) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once, however many choices it has."""
        ends = [choice.last for choice in self.choices if choice.last is not None]
        num_prompt = sum(len(end.prompt_token_ids) for end in ends[:: self.num_choices])
        num_completion = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": min(num_prompt, self._num_cached(ends[:: self.num_choices]))},
        }

    def _num_cached(self, ends: list[RequestOutput]) -> int:
        """What nobody computed for this request: behind another engine's prefill, that engine knows."""
        if self.num_remote_cached_tokens is not None:
            return self.num_remote_cached_tokens
        return sum(end.num_cached_tokens for end in ends)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(
        self,
        choice: Choice,
        text: str,
        token_ids: list[int],
        logprobs: list[dict[int, Logprob]],
        text_offset: int,
        *,
        is_delta: bool,
    ) -> dict[str, Any]:
        assert choice.last is not None
        end = choice.last.outputs[0]
        shown = {
            "index": choice.index,
            **self.dialect.content(text, is_delta),
            "logprobs": self.dialect.logprobs(logprobs, token_ids, text_offset) if logprobs else None,
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }
        return shown | ({"token_ids": token_ids} if self.returns_token_ids else {})

    def _news(self, is_first: bool, is_last: bool) -> dict[str, Any]:
        """What a chunk says beside its choice. That the prompt was computed again is told before anything else."""
        if is_last:
            return self._extras()
        return {"kv_transfer_params": self._recomputed()} if is_first and self._recomputed() else {}

    def _extras(self) -> dict[str, Any]:
        """kvferry's and vLLM's additions to a reply."""
        params = [c.last.kv_transfer_params for c in self.choices if c.last is not None and c.last.kv_transfer_params]
        sent = dict((_sendable(params[0]) if params else None) or {})
        if sent.get("do_remote_prefill"):  # the engine that decodes reports it, as in vLLM
            sent[REMOTE_CACHED] = sum(c.last.num_cached_tokens for c in self.choices[:1] if c.last is not None)
        extras: dict[str, Any] = {"kv_transfer_params": {**sent, **self._recomputed()} or None}
        return extras | ({} if self.cache_salt is None else {"cache_salt": self.cache_salt})

    def _recomputed(self) -> dict[str, int]:
        """How many of the promised prompt tokens were computed here after all; {} when none were promised.

        The last token of a prompt is always computed where decoding goes on, unless that engine has its successor.
        """
        last = next((choice.last for choice in self.choices if choice.last is not None), None)
        if self.num_promised_tokens is None or last is None:
            return {}
        num_expected = min(self.num_promised_tokens, len(last.prompt_token_ids) - 1)
        return {"num_recomputed_tokens": max(0, num_expected - last.num_cached_tokens)}


def _sendable(params: dict[str, Any]) -> dict[str, Any] | None:
    """The connector's answer, or None (logged) when it is no JSON: a plugin's fault costs the field, not the reply."""
    try:
        json.dumps(params, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as err:
        logger.error("the connector's kv_transfer_params are no JSON and are left out: %s", err)
        return None
    return params
