"""From a client's request to the bodies of its two legs.

The prefill engine samples the first token, so all that shapes it stays in its body. Where the decode engine needs more
of that token than its id (log-probabilities), it is not handed over: the decode engine samples it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvferry.http import ApiError, check_stops, load_object

Params = dict[str, Any]
SignPeer = Callable[[Params, Collection[str]], str | None]
"""Makes the token that proves to the decode engine that the proxy named this peer; None: the params name none, or none
that the engine behind these hosts may name."""

_ENTRIES: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str, int, list, dict), "text, a token id or a list of token ids"),
    "messages": ((dict,), "a message"),
    "stop": ((str,), "text"),
    "stop_token_ids": ((int,), "a token id"),
}
_KINDS: dict[str, tuple[type, str]] = {
    "stream": (bool, "true or false"),
    "n": (int, "a whole number"),
    "best_of": (int, "a whole number"),
    "min_tokens": (int, "a whole number"),
}
"""Fields that decide how a request is split. Some engines also take 1 or "true" for true, and "2" or 2.0 for 2."""
_REMOTE_FIELDS = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port", "remote_request_id")
# Only for the answer, which the prefill engine does not give; min_tokens stays as far as it shapes the first token.
_ANSWER_FIELDS = (
    "stream_options", "stop", "logprobs", "top_logprobs", "logprob_token_ids", "return_token_ids", "best_of", "echo",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClientCall:
    """One client's request."""

    path: str
    """`/v1/completions` or `/v1/chat/completions`."""
    body: Params
    headers: Mapping[str, str] = field(default_factory=dict)
    """For both legs."""

    @property
    def is_stream(self) -> bool:
        """Whether the client wants events."""
        return self.body.get("stream") is True

    @property
    def whole_because(self) -> str | None:
        """Why it cannot be split into a prefill and a decode leg; None when it can.

        A hand-over is for one engine request; and log-probabilities of a prompt need its forward where they are told.
        """
        body = self.body
        if body.get("prompt_embeds") is not None:  # no engine can prove that KV is theirs
            return "prompt_embeds"
        for name in ("n", "best_of"):
            if isinstance(body.get(name), int) and body[name] > 1:
                return f"{name}={body[name]}"
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            return f"prompt has {len(prompt)} prompts"
        # In chats vLLM's `echo` alone asks for them: it counts `top_logprobs`, which is 0 where it is not set, or null.
        is_scored = self.path.endswith("/chat/completions") or body.get("logprobs") is not None
        if body.get("prompt_logprobs") is not None or (body.get("echo") and is_scored):
            return "log-probabilities of the prompt"
        return "use_beam_search" if body.get("use_beam_search") else None

    @classmethod
    def parse(cls, path: str, data: bytes, headers: Mapping[str, str], max_stops: int) -> ClientCall:
        """ApiError (400) unless it is a JSON object that leaves `kv_transfer_params` to the proxy, with lists of what
        belongs into them, few enough stops, and fields of their own type where engines and the proxy must read alike:
        what every engine refuses is not passed on to two of them."""
        body = load_object(data)
        check_stops(body, max_stops)
        for name, (kinds, what) in _ENTRIES.items():
            value = body.get(name)
            for index, entry in enumerate(value if isinstance(value, list) else ()):
                if not isinstance(entry, kinds):
                    raise ApiError(400, f"{name}.{index} is of type {type(entry).__name__}, not {what}", param=name)
        for name, (kind, what) in _KINDS.items():
            value = body.get(name)
            if value is not None and type(value) is not kind:
                raise ApiError(400, f"{name} is of type {type(value).__name__}, not {what}", param=name)
        more = body.get("vllm_xargs")
        if body.get("kv_transfer_params") is not None or (isinstance(more, dict) and "kv_transfer_params" in more):
            raise ApiError(
                400, "only the proxy sets kv_transfer_params, also in vllm_xargs: leave them out, or ask an engine "
                "directly", param="kv_transfer_params",
            )  # fmt: skip
        return cls(path, {name: value for name, value in body.items() if name != "kv_transfer_params"}, headers)


def prefill_body(call: ClientCall, transfer_id: str) -> bytes:
    """One token, no stream, and the KV kept for another engine."""
    body = {name: value for name, value in call.body.items() if name not in _ANSWER_FIELDS}
    body |= {"max_tokens": 1, "stream": False}
    if "max_completion_tokens" in body:
        body["max_completion_tokens"] = 1
    if isinstance(body.get("min_tokens"), int):  # it keeps the first token from being the last
        body["min_tokens"] = min(1, body["min_tokens"])
    if "n" in body:
        body["n"] = 1
    params = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    return _json({**body, "kv_transfer_params": {**params, **dict.fromkeys(_REMOTE_FIELDS)}})


def decode_body(
    call: ClientCall, params: Params | None, transfer_id: str, sign_peer: SignPeer | None, hosts: Collection[str] = ()
) -> bytes:
    """The client's own body, with what the prefill engine answered that is reached at `hosts`."""
    if params is None:
        return _json(call.body)
    params = {**params, "transfer_id": params.get("transfer_id") or transfer_id}
    params.pop("peer_token", None)
    logprobs = call.body.get("logprobs")
    if logprobs is not None and logprobs is not False:  # 0 asks for them in completions
        params.pop("remote_first_token_ids", None)
    if sign_peer is not None and (token := sign_peer(params, hosts)) is not None:
        params["peer_token"] = token
    return _json({**call.body, "kv_transfer_params": params})


def release_body(call: ClientCall, params: Params | None, transfer_id: str) -> bytes:
    """For the prefill engine's connector: the KV may go. Any host passes `kv_transfer_params` of a request on to it."""
    ids = {"transfer_id": transfer_id, "remote_lease_id": (params or {}).get("remote_lease_id")}
    model = {"model": call.body["model"]} if "model" in call.body else {}
    asked = {"prompt": [1], "max_tokens": 1, "temperature": 0}
    return _json({**model, **asked, "kv_transfer_params": {"do_release": True, **ids}})


def _json(body: Params) -> bytes:
    """As short as JSON can be, and text as UTF-8: else a body grew on its way, above the limit of engines."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
