"""The proxy's routes."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvferry.clock import Clock, SystemClock
from kvferry.config import shown
from kvferry.http import (
    ERROR_HANDLERS,
    AccessRules,
    ApiError,
    ConnectionLimits,
    EventStream,
    Server,
    read_body,
    unless_gone,
)
from kvferry.proxy.bodies import ClientCall, SignPeer
from kvferry.proxy.config import ProxyConfig
from kvferry.proxy.fleet import Fleet
from kvferry.proxy.legs import EngineFull, LegReply
from kvferry.proxy.metrics import ProxyMetrics
from kvferry.proxy.probes import probe_for_ever
from kvferry.proxy.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_MAX_NAME = 1000
_PASSED_ON = ("authorization", "traceparent", "tracestate")
_DESCRIPTORS_EACH = 4  # a client's connection, those of its legs, and idle ones that are kept for the next


@dataclass(slots=True)
class Proxy:
    """One proxy: its engines, its routes, its probes."""

    config: ProxyConfig
    clock: Clock = field(default_factory=SystemClock)
    sign_peer: SignPeer | None = None
    probe_headers: Mapping[str, str] = field(default_factory=dict)
    access: AccessRules = AccessRules()  # noqa: RUF009 - frozen
    engine_headers: Mapping[str, str] | None = None
    """What engines get in place of a client's Authorization. None: that, unless it is a key of this proxy."""
    metrics: ProxyMetrics = field(init=False, default_factory=ProxyMetrics)
    fleet: Fleet = field(init=False)
    relay: Relay = field(init=False)
    prober: Relay = field(init=False)
    """Carries probes, which are not counted as clients' requests."""
    refusal: str | None = field(init=False, default=None)
    _num_held_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.config, self.clock, self.metrics)
        self.relay, self.prober = (
            Relay(self.config, self.fleet, metrics, self.clock, self.sign_peer, is_prober=is_prober)
            for metrics, is_prober in ((self.metrics, False), (ProxyMetrics(), True))
        )

    def refuse_new(self, reason: str) -> None:
        """From now on new requests get 503; those under way go on."""
        self.refusal = self.refusal or reason

    def app(self) -> Starlette:
        """The ASGI application; probes run while it does."""
        routes = [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.show_metrics),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=dict(ERROR_HANDLERS))

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        probing = None
        if self.config.probe_interval_s:
            probing = asyncio.ensure_future(probe_for_ever(self.config, self.fleet, self.prober, self.probe_headers))
        try:
            yield
        finally:
            if probing is not None:
                probing.cancel()
                await asyncio.wait({probing})
            await self.relay.aclose()
            await self.prober.aclose()

    # ---- routes -----------------------------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions and /v1/chat/completions."""
        self._check_open()
        headers = self._headers(request)
        self.metrics.in_flight.inc()
        num_bytes = 0
        try:
            data = await read_body(request, self.config.max_body_bytes)
            self._check_room(len(data))
            num_bytes = len(data)
            self._num_held_bytes += num_bytes
            call = ClientCall.parse(request.scope["path"], data, headers, self.config.max_stops)
            reply = await unless_gone(request, self.relay.open(call))
        except BaseException as err:
            self._ended(_outcome(err), num_bytes)
            raise
        shown = {"X-Request-Id": headers["X-Request-Id"]}
        if reply.events is not None:
            return EventStream(reply.events, lambda: self._close(reply, num_bytes), shown)
        await self._close(reply, num_bytes)
        return Response(reply.content, reply.status, shown, reply.content_type)

    def _check_room(self, num_bytes: int) -> None:
        """ApiError (503) where the bodies of all requests under way would take too much; one alone is always taken."""
        limit_bytes = self.config.max_held_body_bytes
        if self._num_held_bytes and self._num_held_bytes + num_bytes > limit_bytes:
            raise ApiError(
                503, f"the bodies of requests under way have more than {limit_bytes} bytes (--max-held-body-bytes)",
                code="overloaded", headers={"Retry-After": "1"},
            )  # fmt: skip

    async def _close(self, reply: LegReply, num_bytes: int) -> None:
        await reply.aclose()
        self._ended(reply.outcome, num_bytes)

    def _ended(self, outcome: str, num_bytes: int) -> None:
        self._num_held_bytes -= num_bytes
        self.metrics.in_flight.dec()
        self.metrics.requests.labels(outcome).inc()

    def _headers(self, request: Request) -> dict[str, str]:
        """For both legs: who asks, and one id for all of it. A client's id is taken when it is harmless.

        ApiError for a header that could not be sent on.
        """
        passed = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        for name, value in passed.items():
            if not (value.isascii() and value.replace("\t", " ").isprintable()):
                raise ApiError(400, f"header {name} has characters that are not printable ASCII: send it without them")
        if self.engine_headers is not None or self.access.api_keys:
            passed.pop("authorization", None)
            passed |= self.engine_headers or {}
        own = request.headers.get("x-request-id", "")
        return {**passed, "X-Request-Id": own if _REQUEST_ID.fullmatch(own) else uuid.uuid4().hex}

    def _check_open(self) -> None:
        if self.refusal is not None:
            raise ApiError(503, self.refusal, code="unavailable", headers={"Retry-After": "1"})

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/NAME, as a decode engine answers."""
        path = "/v1/models"
        if "name" in request.path_params:
            path += f"/{_one_segment(request.path_params['name'])}"
        reply = await self.relay.ask(ClientCall(path, {}, self._headers(request)))
        return Response(reply.content, reply.status, media_type=reply.content_type)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the process lives."""
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 when transfers work, 503 when not, with the state of all engines."""
        is_ready = self.refusal is None and self.fleet.is_ready
        return JSONResponse({"ready": is_ready, **self.fleet.describe()}, 200 if is_ready else 503)

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics, in Prometheus' text format."""
        self.fleet.enter_metrics()
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _one_segment(name: str) -> str:
    """A model's name for an engine's path. ApiError for one that could lead out of /v1/models there or on the way."""
    if name in ("", ".") or ".." in name.split("/") or len(name) > _MAX_NAME:
        raise ApiError(404, f"no model has the name {shown(name)}: GET /v1/models lists all")
    return quote(name, safe="")


def _outcome(error: BaseException) -> str:
    if isinstance(error, ApiError):
        if isinstance(error.__cause__, EngineFull) or error.code == "overloaded":
            return "full"
        return "refused" if error.status < 500 else "failed"
    return "client_gone" if isinstance(error, ClientDisconnect | asyncio.CancelledError) else "failed"


def make_server(proxy: Proxy, on_listening: Callable[[], None] = lambda: None) -> Server:
    """A server of it. `run` it once, with a bound socket."""
    config = proxy.config
    limits = ConnectionLimits(
        config.max_connections, _DESCRIPTORS_EACH, config.header_timeout_s, config.body_timeout_s, config.max_body_bytes
    )
    return Server(
        proxy.app(), config.drain_timeout_s, proxy.refuse_new, on_listening, limits=limits, access=proxy.access
    )
