"""Who may ask: API keys, and what web pages of other sites may do in a user's browser.

A browser lets any page send requests to a server on the user's machine, and tells by `Origin` which page it was. So a
request with an `Origin` is refused unless that is allowed. A page whose name suddenly means 127.0.0.1 (DNS rebinding)
may send some requests without it, but not without its own name as `Host`: a server that listens on a loopback address
takes names of this machine only.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from kvferry.config import api_key_environment, shown
from kvferry.errors import ConfigError
from kvferry.http.requests import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_OPEN_PATHS = ("/health", "/ready", "/metrics")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")
_HOST = re.compile(r"(?:\*|\*\.)?[^\s/:*\[\]]*|[0-9a-f]*:[0-9a-f:.]*:[0-9a-f:.]*")


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Who may ask. `parse` checks everything."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """One of them must come with each request, but for /health, /ready and /metrics. None: nobody is asked for one."""
    allowed_origins: tuple[str, ...] = ()
    """Of web pages that may ask; `*`: any."""
    allowed_hosts: tuple[str, ...] = ()
    """Names this server may be called by, beside those of this machine; `*`: any, `*.name`: all below it."""

    @classmethod
    def parse(
        cls, api_key: Sequence[str] | None, allowed_origins: str | None, allowed_hosts: str | None
    ) -> AccessRules:
        """From the command line; a key may also be in the environment. ConfigError says what is wrong, never a key."""
        keys = list(api_key or ()) or list(filter(None, [api_key_environment()]))
        for key in keys:
            if not key.strip() or not (key.isascii() and key.isprintable()):
                raise ConfigError("--api-key: a key is empty, or has characters that are not printable ASCII")
        return cls(
            tuple(keys),
            _texts(allowed_origins, "--allowed-origins", _ORIGIN, "https://chat.example.com"),
            _texts(allowed_hosts, "--allowed-hosts", _HOST, "llm.example.com"),
        )

    def with_cors(self, app: ASGIApp) -> ASGIApp:
        """The application, with the headers that let pages of allowed origins read its answers."""
        if not self.allowed_origins:
            return app
        return CORSMiddleware(app, self.allowed_origins, allow_methods=["*"], allow_headers=["*"])


def _texts(given: str | None, option: str, form: re.Pattern[str], example: str) -> tuple[str, ...]:
    if given is None:
        return ()
    try:
        values = json.loads(given)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(v, str) and v and form.fullmatch(v.lower()) for v in values):
        raise ConfigError(f"{option}={shown(given)} must be a JSON list such as {json.dumps([example])}")
    return tuple(value.lower() for value in values)


class AccessGuard:
    """An ASGI application before another one: refuses those that may not ask."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules
        self._digests = [sha256(key.encode()).digest() for key in rules.api_keys]
        self.is_local = False
        """Whether the server listens on loopback addresses only."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401 or 403."""
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        rules = self._rules
        origins = {origin.lower() for origin in headers.getlist("origin")}
        if not ("*" in rules.allowed_origins or origins <= set(rules.allowed_origins)):
            raise ApiError(
                403, f"web pages of {shown(', '.join(origins))} may not use this server: --allowed-origins names those "
                "that may", code="origin_not_allowed",
            )  # fmt: skip
        host = _without_port(headers.get("host", ""))
        if not self._may_be_called(host):
            raise ApiError(
                403, f"this server is not called {shown(host)}: --allowed-hosts names what it may be called, beside "
                "localhost and loopback addresses", code="host_not_allowed",
            )  # fmt: skip
        if self._digests and path not in _OPEN_PATHS and not self._is_key(headers.get("authorization", "")):
            raise ApiError(
                401, "this server wants an API key: send the header `Authorization: Bearer KEY` with the one that it "
                "was started with (--api-key)", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _may_be_called(self, host: str) -> bool:
        allowed = self._rules.allowed_hosts
        if not host or "*" in allowed or not (self.is_local or allowed):
            return True
        if host in allowed or any(name.startswith("*.") and host.endswith(name[1:]) for name in allowed):
            return True
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    def _is_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode("latin-1")).digest()
        found = [hmac.compare_digest(digest, one) for one in self._digests]  # all of them: time tells nothing
        return scheme.lower() == "bearer" and any(found)


def _without_port(host: str) -> str:
    """Of a Host header, in lower case."""
    return re.sub(r":\d*$", "", host.strip().lower()).strip("[]").removesuffix(".")
