"""Who may ask a server: keys, web pages, names. Requests go through the whole guard to an application that says 200."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from kvferry.clock import FakeClock
from kvferry.errors import ConfigError
from kvferry.http import AccessRules, ConnectionLimits
from kvferry.http.access import AccessGuard
from kvferry.http.connections import Connections

KEYS = ("first-key", "second-key")
OPEN, GUARDED = (
    ("/health", "/ready", "/metrics"),
    ("/v1/models", "/reset_prefix_cache", "/debug/requests", "/health/", "/"),
)


def ask(rules: AccessRules, path: str = "/v1/models", *, is_local: bool = False, **headers: str) -> tuple[int, Any]:
    """Status, headers and error of the answer."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> Any:
        raise AssertionError("nothing is read before it is clear who asks")

    async def send(message: Any) -> None:
        sent.append(message)

    guard = AccessGuard(app, rules)
    guard.is_local = is_local
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": raw}
    asyncio.run(rules.with_cors(guard)(scope, receive, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], {**json.loads(sent[1]["body"]).get("error", {}), **answered}


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "authorization",
    ["", "first-key", "Bearer", "Bearer ", "Basic first-key", "Bearer first-ke", "Bearer first-keyy",
     "Bearer FIRST-KEY", "Bearer \xfc", "Bearer first-key,second-key"],
)  # fmt: skip
def test_without_a_right_key_nothing_but_the_open_paths(path: str, authorization: str) -> None:
    rules = AccessRules(api_keys=KEYS)
    headers = {"Authorization": authorization} if authorization else {}
    status, error = ask(rules, path, **headers)
    assert (status, error["code"], error["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert not any(key in error["message"] for key in KEYS)
    assert [ask(rules, path, **headers)[0] for path in OPEN] == [200, 200, 200]
    assert not any(key in repr(rules) for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_of_the_keys_will_do(key: str, scheme: str) -> None:
    assert [ask(AccessRules(api_keys=KEYS), path, Authorization=f"{scheme} {key}")[0] for path in GUARDED] == [200] * 5


def test_without_keys_nobody_is_asked_for_one() -> None:
    assert ask(AccessRules())[0] == ask(AccessRules(), Authorization="Bearer any")[0] == 200


def test_pages_of_allowed_origins_may_ask_and_read() -> None:
    rules = AccessRules.parse(["k"], '["https://chat.example.com", "http://localhost:3000"]', None)
    for origin in ("https://chat.example.com", "http://localhost:3000"):
        status, told = ask(rules, Origin=origin, Authorization="Bearer k")
        assert (status, told["access-control-allow-origin"]) == (200, origin)
        assert ask(rules, Origin=origin)[0] == 401
    for origin in ("http://chat.example.com", "https://chat.example.com:8443", "null", "http://localhost"):
        status, told = ask(rules, Origin=origin, Authorization="Bearer k")
        assert (status, told["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in told
    assert ask(AccessRules.parse(None, '["*"]', None), Origin="http://any")[0] == 200


@pytest.mark.parametrize(
    ("allowed", "is_local", "host", "status"),
    [
        (None, False, "node7:8000", 200), (None, True, "node7:8000", 403), (None, True, "localhost:8000", 200),
        ('["node7"]', True, "NODE7:8000", 200), ('["node7"]', False, "node8", 403),
        ('["node7"]', False, "127.0.0.1", 200),
        ('["*.example.com"]', True, "a.b.example.com", 200), ('["*.example.com"]', True, "example.com", 403),
        ('["*.example.com"]', True, "evilexample.com", 403), ('["*"]', True, "evil", 200), (None, True, "", 200),
        ('["10.0.0.1"]', True, "10.0.0.1:8000", 200), (None, True, "evil:80:127.0.0.1", 403),
    ],
)  # fmt: skip
def test_names_that_a_server_may_be_called(allowed: str | None, is_local: bool, host: str, status: int) -> None:
    assert ask(AccessRules.parse(None, None, allowed), is_local=is_local, Host=host)[0] == status


@pytest.mark.parametrize(
    ("key", "origins", "hosts", "message"),
    [
        ([""], None, None, "a key is empty"), ([" "], None, None, "a key is empty"),
        (["schl\xfcssel"], None, None, "not printable ASCII"), (["a\nb"], None, None, "not printable ASCII"),
        (None, "https://a", None, '--allowed-origins='), (None, '["https://a/"]', None, "must be a JSON list"),
        (None, '["chat.example.com"]', None, "--allowed-origins="), (None, '"*"', None, "--allowed-origins="),
        (None, None, '["http://a"]', "--allowed-hosts="), (None, None, "[1]", "--allowed-hosts="),
        (None, None, '["a:80"]', "--allowed-hosts="), (None, None, '[""]', "--allowed-hosts="),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused(
    key: list[str] | None, origins: str | None, hosts: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        AccessRules.parse(key, origins, hosts)
    assert message in str(caught.value)
    assert "schl" not in str(caught.value)


def test_the_environment_has_a_key_where_the_command_line_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "vllms")
    assert AccessRules.parse(None, None, None).api_keys == ("vllms",)
    monkeypatch.setenv("KVFERRY_API_KEY", "ours")
    assert AccessRules.parse(None, None, None).api_keys == ("ours",)
    assert AccessRules.parse(["a", "b"], None, None).api_keys == ("a", "b")
    monkeypatch.setenv("KVFERRY_API_KEY", "")
    monkeypatch.delenv("VLLM_API_KEY")
    assert AccessRules.parse(None, None, None).api_keys == ()


def test_more_connections_than_descriptors_are_refused_at_the_start() -> None:
    assert 16 <= ConnectionLimits().num_connections() <= 2048
    assert ConnectionLimits(max_connections=17).num_connections() == 17
    with pytest.raises(ConfigError, match=r"max_connections=1000000000: .* file descriptors, .*`ulimit -n`"):
        ConnectionLimits(max_connections=10**9).num_connections()


class StuckTransport:
    """Of a client that takes nothing of what it is sent."""

    is_aborted = False
    has_been_closed = False

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 1 << 20

    def is_closing(self) -> bool:
        return self.has_been_closed

    def close(self) -> None:
        self.has_been_closed = True

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize(("is_closed", "patience_s"), [(False, 60), (True, 10)])
def test_a_client_that_takes_nothing_is_cut_off(is_closed: bool, patience_s: float) -> None:
    clock, transport = FakeClock(), StuckTransport()
    # Its request is under way for as long as it likes: header and body deadlines are not what ends it.
    connections = Connections(ConnectionLimits(header_timeout_s=1e6), clock)
    loop = asyncio.new_event_loop()
    connection = connections.protocol(
        config=uvicorn.Config(AccessGuard(None, AccessRules())),
        server_state=ServerState(),
        app_state={},
        _loop=loop,  # type: ignore[arg-type]
    )
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.pause_writing()
    if is_closed:
        transport.close()
        connections.sweep()
    clock.advance(patience_s - 1)
    connections.sweep()
    assert not transport.is_aborted
    clock.advance(2)
    connections.sweep()
    assert transport.is_aborted
    loop.close()
