"""Requests as our servers see them: errors in OpenAI's shape, bodies with a limit, clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")
_MAX_MESSAGE_CHARS = 1000
_MAX_STOP_CHARS = 256
_MAX_CONTAINERS = 500_000  # each costs Python far more memory and time than the two bytes it has in JSON
_HALF_CHARACTER = re.compile(rb"\\[uU][dD][89a-fA-F]|\xed[\xa0-\xbf]")  # of a surrogate pair: escaped, or as bytes


class ApiError(Exception):
    """An error that the client is told in OpenAI's shape. A long text is cut: it may repeat what the client sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if len(message) > _MAX_MESSAGE_CHARS:
            message = message[:_MAX_MESSAGE_CHARS] + "..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @classmethod
    def of(cls, error: ConfigError, param: str | None = None) -> ApiError:
        """400; our texts begin with the name of the field where one is to blame, else it is `param`."""
        name = re.match(r"(\w+)=", str(error))
        return cls(400, str(error), param=name[1] if name else param)

    def body(self) -> dict[str, Any]:
        """The reply's body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ---- requests -----------------------------------------------------------------------------------------------------


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body; ApiError (413) above the limit, ClientDisconnect when the client leaves."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit_bytes:
            raise ApiError(413, f"the body is larger than {limit_bytes} bytes", headers={"Connection": "close"})
    return bytes(data)


def load_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a body is; ApiError (400) for anything else, which names the field where one is to blame.

    Takes time in proportion to the body, also for a hostile one. Of a name that comes twice the last value counts.
    """
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {_MAX_CONTAINERS} brackets that open a list or an object")
    try:
        content = json.loads(data.decode(errors="surrogatepass"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the body must be a JSON object, not a {type(content).__name__}")
    if _HALF_CHARACTER.search(data):  # half of a surrogate pair is no text, and could be neither hashed nor sent back
        for name, value in content.items():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                shown = name.encode(errors="replace").decode()
                raise ApiError(
                    400, f"{shown}: has half of a character (U+D800 to U+DFFF): surrogates not allowed",
                    param=shown,
                ) from None  # fmt: skip
    return content


def check_stops(body: dict[str, Any], max_stops: int) -> None:
    """ApiError for more stop strings or stop token ids than `max_stops`, or longer ones than 256 characters.

    Each token that is generated is compared with all of them, for every choice.
    """
    for name in ("stop", "stop_token_ids"):
        value = body.get(name)
        if isinstance(value, list) and len(value) > max_stops:
            raise ApiError(
                400, f"{name} has {len(value)} entries; this server takes at most {max_stops} (--max-stops)", param=name
            )
        for text in value if isinstance(value, list) else (value,):
            if isinstance(text, str) and len(text) > _MAX_STOP_CHARS:
                raise ApiError(
                    400, f"{name} has a text of {len(text)} characters; at most {_MAX_STOP_CHARS} are taken", param=name
                )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled, and ClientDisconnect raised, when the client leaves first.

    The request's body must have been read. When this returns or raises, `work` has ended.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A stream of server-sent events that frees what feeds it however it ends, even before it began."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], Awaitable[None]],
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", **(headers or {})}
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


# ---- errors -------------------------------------------------------------------------------------------------------


def api_error(request: Request, error: Exception) -> Response:
    """The reply to an ApiError."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wrapped = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(wrapped.body(), error.status_code, error.headers)


def _config_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ConfigError)
    return api_error(request, ApiError.of(error))


def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _our_fault(request: Request, error: Exception) -> Response:
    return api_error(request, ApiError(500, f"the server failed: {type(error).__name__}"))


ERROR_HANDLERS: dict[Any, Callable[[Request, Exception], Response | Awaitable[Response]]] = {
    ApiError: api_error,
    ConfigError: _config_error,
    HTTPException: _http_error,
    ClientDisconnect: _client_gone,
    Exception: _our_fault,
}
"""For a Starlette application."""
