"""Routes: from bytes to jobs for the engine, and from what it reports to replies. Every error is OpenAI-shaped."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvferry.engine.outputs import RequestOutput
from kvferry.engine.prompts import render_messages
from kvferry.engine.sampler import NO_TOKEN
from kvferry.errors import ConfigError
from kvferry.http import ERROR_HANDLERS, ApiError, EventStream, api_error, read_body, unless_gone
from kvferry.metrics import Metrics
from kvferry.server.protocol import (
    BodyLimits,
    ChatBody,
    CompletionBody,
    GenerationBody,
    TokenIds,
    parse_body,
)
from kvferry.server.replies import ChatDialect, Choice, CompletionDialect, CompletionReply, Dialect
from kvferry.server.service import EngineFailed, EngineJob, EngineService, EngineStopped, Generation, Overloaded

if TYPE_CHECKING:
    from starlette.requests import Request

_RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the routes must know of the model."""

    names: tuple[str, ...]
    """What clients may call it; replies bear the first."""
    root: str
    limits: BodyLimits
    tokenizer: Any
    """For the routes alone: the engine's thread uses another. None: token ids in, token ids out."""


class Routes:
    """The endpoints' handlers."""

    def __init__(self, service: EngineService, model: ModelInfo, metrics: Metrics, max_body_bytes: int) -> None:
        self._service = service
        self._model = model
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())
        # Tokenizing a long prompt takes a while and would hold up every stream.
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="kvferry-text")

    def table(self) -> list[Route]:
        """All of them."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/debug/requests", self.live_requests),
            Route("/debug/requests/{name}", self.explain_request),
            Route("/reset_prefix_cache", self.reset_prefix_cache, methods=["POST"]),
        ]

    # ---- completions ------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = parse_body(CompletionBody, await read_body(request, self._max_body_bytes), self._model.limits)
        prompts = body.prompts()
        self._model.limits.check_choices(len(prompts) * body.num_choices)
        return await self._complete(request, body, [await self._token_ids(p) for p in prompts], CompletionDialect())

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = parse_body(ChatBody, await read_body(request, self._max_body_bytes), self._model.limits)
        self._model.limits.check_choices(body.num_choices)
        self._model.limits.check_text(body.num_chars, "messages")
        return await self._complete(request, body, [await self._in_text_thread(self._render, body)], ChatDialect())

    async def _complete(
        self, request: Request, body: GenerationBody, prompts: list[TokenIds], dialect: Dialect
    ) -> Response:
        self._check_model(body.model)
        limits = self._model.limits
        for prompt in prompts:
            limits.check_length(len(prompt), dialect.prompt_field)
        params = body.sampling_params(limits.max_model_len)
        jobs = [EngineJob(prompt, choice, body.cache_salt) for prompt in prompts for choice in params]
        self._metrics.observe("vllm:request_params_n", body.num_choices)
        self._metrics.observe("vllm:request_params_max_tokens", params[0].max_tokens)
        reply = CompletionReply(
            f"{dialect.id_prefix}-{secrets.token_hex(12)}",
            self._model.names[0],
            dialect,
            body.num_choices,
            body.cache_salt,
            bool(body.return_token_ids),
            body.num_promised_tokens,
            body.num_remote_cached_tokens,
            choices=[Choice(index) for index in range(len(jobs))],
        )
        try:
            generation = await self._service.submit(jobs, reply.reply_id)
        except ConfigError as error:
            raise ApiError.of(error, dialect.prompt_field) from error
        if body.stream:
            return EventStream(_events(generation, reply, body.wants_stream_usage), self._closer(generation))
        return await self._whole(request, generation, reply)

    async def _whole(self, request: Request, generation: Generation, reply: CompletionReply) -> Response:
        try:
            await unless_gone(request, _collect(generation, reply))
            return JSONResponse(reply.whole())
        finally:
            await self._closer(generation)()

    def _closer(self, generation: Generation) -> Callable[[], Awaitable[None]]:
        async def close() -> None:
            if not generation.is_done:
                self._metrics.add("kvferry:client_disconnects")
            generation.close()

        return close

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._model.names:
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {', '.join(self._model.names)}",
                param="model", code="model_not_found",
            )  # fmt: skip

    # ---- text -------------------------------------------------------------------------------------------------

    async def _token_ids(self, prompt: str | TokenIds) -> TokenIds:
        if not isinstance(prompt, str):
            return prompt
        self._model.limits.check_text(len(prompt), "prompt")
        return await self._in_text_thread(self._tokenize, prompt, True)

    async def _in_text_thread(self, work: Callable[..., TokenIds], *arguments: Any) -> TokenIds:
        if self._model.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer: give token ids as the prompt", param="prompt")
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, work, *arguments)

    def _tokenize(self, text: str, add_special_tokens: bool) -> TokenIds:
        ids: TokenIds = self._model.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _render(self, body: ChatBody) -> TokenIds:
        turns = [message.for_template() for message in body.messages]
        try:
            return render_messages(self._model.tokenizer, turns, add_generation_prompt=body.add_generation_prompt)
        except ConfigError as err:
            raise ApiError(400, str(err), param="messages") from err

    # ---- the rest ---------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self._model.names]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._describe(request.path_params["name"]))

    def _describe(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "kvferry",
            "root": self._model.root,
            "max_model_len": self._model.limits.max_model_len,
        }

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the engine's thread runs."""
        if self._service.has_ended:
            raise EngineStopped(self._service.refusal)
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 while a request would be taken; tiers that are down are named, for they only cost hits."""
        if self._service.refusal is not None:
            raise EngineStopped(self._service.refusal)
        if self._service.num_unfinished >= self._service.max_unfinished:
            raise Overloaded("the server has as many unfinished requests as it may have")
        return JSONResponse({"degraded_tiers": self._service.degraded_tiers})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, in Prometheus' text format."""
        return Response(self._metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def live_requests(self, request: Request) -> Response:
        """GET /debug/requests: those that have not ended."""
        return JSONResponse({"requests": await self._service.live_requests()})

    async def explain_request(self, request: Request) -> Response:
        """GET /debug/requests/ID: what it waits for, and why its prefix was a hit or not. No tokens, no text."""
        name = request.path_params["name"]
        found = await self._service.explain(name)
        if not found:
            raise ApiError(
                404, f"no request {name!r}: the server knows requests that run, and the last 256 that ended",
                param="id", code="request_not_found",
            )  # fmt: skip
        return JSONResponse({"id": name, "requests": found})

    async def reset_prefix_cache(self, request: Request) -> Response:
        """POST /reset_prefix_cache?reset_external=true: forget cached KV, and with the parameter the connector's."""
        external = request.query_params.get("reset_external", "false").lower()
        if external not in ("true", "false"):
            raise ApiError(400, f"reset_external={external!r} must be true or false", param="reset_external")
        return JSONResponse({"success": await self._service.reset_prefix_cache(external == "true")})

    def close(self) -> None:
        """End the thread for text."""
        self._text_thread.shutdown(wait=False, cancel_futures=True)


# ---- replies that take a while ------------------------------------------------------------------------------------


async def _collect(generation: Generation, reply: CompletionReply) -> None:
    async for index, output in generation:
        _check(output)
        reply.choices[index].add(output)


def _check(output: RequestOutput) -> None:
    if output.error is None:
        return
    code = "no_token" if output.error.startswith(NO_TOKEN) else None
    raise ApiError(400 if output.error_param else 500, output.error, param=output.error_param, code=code)


async def _events(generation: Generation, reply: CompletionReply, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events of a stream; an error after its start is an event too."""
    try:
        for chunk in reply.opening_chunks():
            yield _event(chunk)
        async for index, output in generation:
            _check(output)
            news = reply.chunk(reply.choices[index], output)
            if news is not None:
                yield _event(news)
        if with_usage:
            yield _event(reply.usage_chunk())
    except ApiError as error:
        yield _event(error.body())
    except EngineStopped as error:
        yield _event(ApiError(503, str(error), code=_code(error)).body())
    yield b"data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _unavailable(request: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(_RETRY_AFTER_S)}
    if isinstance(error, EngineFailed):  # OpenAI's clients would send it again by themselves, and perhaps end the next
        headers["x-should-retry"] = "false"
    return api_error(request, ApiError(503, str(error), code=_code(error), headers=headers))


def _code(error: Exception) -> str:
    """For clients and routers: is it full, does it stop, or has it ended, perhaps by this request."""
    if isinstance(error, Overloaded):
        return "overloaded"
    return "engine_ended" if isinstance(error, EngineFailed) else "unavailable"


_HANDLERS = {**ERROR_HANDLERS, Overloaded: _unavailable, EngineStopped: _unavailable}


def create_app(service: EngineService, model: ModelInfo, metrics: Metrics, max_body_bytes: int) -> Starlette:
    """The ASGI application; its life cycle starts the service's thread and closes the service."""
    routes = Routes(service, model, metrics, max_body_bytes)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()
            routes.close()

    return Starlette(routes=routes.table(), lifespan=lifespan, exception_handlers=_HANDLERS)
