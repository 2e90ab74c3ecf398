"""An engine for tests of the proxy: speaks as vLLM and `kvferry serve` do in either role, and fails on demand."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kvferry.http import Server, bind_socket, unless_gone, url_of

WORDS = ["one ", "two ", "three ", "four"]
RECOMPUTED = {"num_recomputed_tokens": 3, "load_error": "the lease is over"}
REFUSED = {"not_handed_over": "its media are numbered"}
NO_TOKEN = {"error": {"message": "no token can be chosen: nan", "type": "server_error", "code": "no_token"}}
USAGE = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


class FakeEngine:
    """Answers `WORDS`. `mode` says how it behaves from now on; `seen` is what it was asked, `num_left` who left it,
    `given_back` the transfer ids of what need not be kept."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.mode = "ok"
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_left = 0
        self.given_back: list[str] = []
        self.retry_after = "1"
        self.release = asyncio.Event()

    def app(self) -> Starlette:
        paths = ("/v1/completions", "/v1/chat/completions")
        routes = [Route(path, self.complete, methods=["POST"]) for path in paths]
        return Starlette(routes=[*routes, Route("/v1/models", self.models)])

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.url, "object": "model"}]})

    async def complete(self, request: Request) -> Response:
        body = json.loads(await request.body())
        params = body.get("kv_transfer_params") or {}
        if params.get("do_release"):
            self.given_back.append(params["transfer_id"])
            return JSONResponse(self._whole(body, False))
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        if self.mode in ("hang", "slow"):
            try:
                await unless_gone(request, self.release.wait())
            except BaseException:
                self.num_left += 1
                raise
        if self.mode == "full":  # as `kvferry serve` says it
            error = {"message": "64 unfinished requests of at most 64", "type": "server_error", "code": "overloaded"}
            return JSONResponse({"error": error}, 503, {"Retry-After": self.retry_after})
        if self.mode == "vllm_full":
            error = {"message": "The engine is currently busy", "type": "Service Unavailable", "code": 503}
            return JSONResponse({"error": error}, 503)
        if self.mode in ("engine_ended", "vllm_dead"):
            told = (
                "EngineCore encountered an issue. See stack trace" if self.mode == "vllm_dead" else "the engine failed"
            )
            error = {"message": told, "code": 500 if self.mode == "vllm_dead" else self.mode}
            return JSONResponse({"error": error}, 500 if self.mode == "vllm_dead" else 503)
        if self.mode == "no_token" and not body.get("stream"):
            return JSONResponse(NO_TOKEN, 500)
        if self.mode == "drop":  # the connection breaks in the middle of the reply
            return StreamingResponse(self._broken(), media_type="application/json")
        if self.mode == "500 at times" and body.get("prompt") == "Bad":  # as vLLM says that one request failed in it
            return JSONResponse({"error": {"message": "Internal server error", "code": 500}}, 500)
        if self.mode.isdigit():
            return JSONResponse({"error": {"message": f"it is {self.mode}", "code": "c"}}, int(self.mode))
        if body.get("stream"):
            return StreamingResponse(self._stream(body, "chat" in request.url.path), media_type="text/event-stream")
        is_prefill = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
        content = self._prefill(body) if is_prefill else self._whole(body, "chat" in request.url.path)
        return JSONResponse(content, headers={"Set-Cookie": "session=1"})

    async def _broken(self) -> AsyncIterator[bytes]:
        yield b"{"
        raise ConnectionResetError

    def _prefill(self, body: dict[str, Any]) -> dict[str, Any]:
        params = {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": self.url,
            "transfer_id": body["kv_transfer_params"]["transfer_id"], "remote_first_token_ids": [11],
        }  # fmt: skip
        instead = {"no_params": None, "other_params": {"hidden_states_path": "/x"}, "refused": REFUSED}
        told = instead.get(self.mode, params)
        return {"choices": [{"index": 0, "text": WORDS[0]}], "usage": USAGE, "kv_transfer_params": told}

    def _whole(self, body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
        text = "".join(WORDS)
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        reason = "error" if self.mode == "error" else "stop"
        choices = [{"index": i, **said, "finish_reason": reason} for i in range(body.get("n") or 1)]
        return self._told({"id": "x", "object": "text_completion", "choices": choices, "usage": USAGE})

    def _told(self, content: dict[str, Any]) -> dict[str, Any]:
        return content | ({"kv_transfer_params": RECOMPUTED} if self.mode == "recomputed" else {})

    async def _stream(self, body: dict[str, Any], is_chat: bool) -> AsyncIterator[bytes]:
        def event(delta: dict[str, Any], reason: str | None = None) -> bytes:
            said = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
            choice = {"index": 0, **said, "finish_reason": reason}
            return b"data: " + json.dumps(self._told({"id": "x", "choices": [choice]})).encode() + b"\n\n"

        try:
            yield event({"role": "assistant", "content": ""})
            if self.mode == "cut_at_start":
                raise ConnectionResetError
            if self.mode == "no_token":
                yield b"data: " + json.dumps(NO_TOKEN).encode() + b"\n\ndata: [DONE]\n\n"
            if self.mode == "error":
                yield event({"content": ""}, "error")
            for number, word in enumerate(WORDS):
                yield event({"content": word})
                if number == 1 and self.mode == "cut":
                    raise ConnectionResetError
                if number == 1 and self.mode == "quiet_end":
                    return
                if number == 1 and self.mode == "pause":
                    await self.release.wait()
            yield event({}, "stop")
            if (body.get("stream_options") or {}).get("include_usage"):
                yield b"data: " + json.dumps({"id": "x", "choices": [], "usage": USAGE}).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_left += 1
            raise


@contextmanager
def serving(app: Any, bound: Any, drain_timeout_s: float = 1) -> Iterator[Server]:
    """A server in a thread."""
    listening = threading.Event()
    server = Server(app, drain_timeout_s, lambda reason: None, listening.set)
    server.config.log_level = "critical"
    server.config.lifespan = "auto"
    server.config.configure_logging()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert listening.wait(120)
        yield server
    finally:
        server.should_exit = server.force_exit = True
        thread.join(120)
        bound.close()
        assert not thread.is_alive()


@contextmanager
def engine() -> Iterator[FakeEngine]:
    """One in a thread of this process, on a port of its own."""
    bound = bind_socket("127.0.0.1", 0)
    fake = FakeEngine(url_of(bound))
    with serving(fake.app(), bound):
        yield fake
