"""Connections that nobody honest makes, against both servers: others are served meanwhile, and neither memory nor
descriptors nor the log grow beyond what is written down. Also who may ask: keys, web pages, names."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.fake_engine import serving
from tests.e2e.test_proxy import ASK
from tests.e2e.test_proxy import Running as Proxied
from tests.e2e.test_proxy import running as proxied
from tests.e2e.test_serve import KVFERRY, model_folder
from tests.patience import PATIENCE_S, wait_until

from kvferry.http import AccessRules, bind_socket
from kvferry.http.access import AccessGuard
from kvferry.proxy.app import Proxy

__all__ = ["model_folder"]  # a fixture

NUM_DESCRIPTORS = 512
NUM_STRANGERS = 600  # more than the server may have descriptors
BODY_BYTES = 1 << 20
LIMITS = ("--max-body-bytes", str(BODY_BYTES), "--header-timeout-s", "3", "--body-timeout-s", "3")
HONEST_S = 20.0  # two busy cores; without limits nobody was answered at all
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@dataclass
class Attacked:
    """A server in a process of its own."""

    pid: int
    port: int
    log: Path

    def ask(self, method: str = "GET", path: str = "/health", body: bytes | None = None, **headers: str) -> int:
        """The status of an honest client's request, on a connection of its own."""
        return self.answer(method, path, body, **headers)[0]

    def answer(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def raw(self, request: bytes) -> bytes:
        """What the server answers before it closes the connection."""
        with self.connect() as stranger:
            stranger.sendall(request)
            return read_all(stranger)

    @property
    def rss_bytes(self) -> int:
        (pages,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        return int(pages) * 1024

    def start_peak(self) -> None:
        """`peak_bytes` is measured from now on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @property
    def peak_bytes(self) -> int:
        (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        return int(kib) * 1024

    @property
    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def read_all(stranger: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionResetError):
        while piece := stranger.recv(65536):
            answer += piece
    return answer


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[Attacked]:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (NUM_DESCRIPTORS, NUM_DESCRIPTORS))

    with log.open("wb") as errors:
        process = subprocess.Popen(
            [KVFERRY, *arguments, "--port", "0"], stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=lower
        )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], PATIENCE_S)[0], "it did not start"
        found = re.search(r" on http://127\.0\.0\.1:(\d+)$", process.stdout.readline().strip())
        assert found, log.read_text()
        yield Attacked(process.pid, int(found[1]), log)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


PROXY = ["proxy", "--prefill", "http://127.0.0.1:9", "--decode", "http://127.0.0.1:10", "--probe-interval-s", "0"]


@pytest.fixture(scope="module", params=["proxy", "serve"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    if request.param == "proxy":
        command = PROXY
    else:
        command = ["serve", str(request.getfixturevalue("model_folder")), "--num-threads", "1"]
    with started([*command, *LIMITS], tmp_path_factory.mktemp("log") / "log") as attacked:
        yield attacked


def worst_s(server: Attacked, attack: Callable[[], None]) -> float:
    """The longest that an honest client waited, while the attack stands."""
    attack()
    times_s = []
    for _ in range(5):
        begun_s = time.monotonic()
        assert server.ask() == 200
        assert server.ask("POST", "/v1/completions", b"no JSON") == 400
        times_s.append(time.monotonic() - begun_s)
    return max(times_s)


@contextmanager
def strangers(server: Attacked, num: int, send: bytes) -> Iterator[list[socket.socket]]:
    """Clients that have sent only so much."""
    with ExitStack() as stack:
        them = []
        for _ in range(num):
            them.append(stack.enter_context(server.connect()))
            with suppress(ConnectionResetError, BrokenPipeError):  # the server has closed it, as it may
                them[-1].sendall(send)
        yield them


@pytest.mark.parametrize(
    "half",
    [b"", b"POST /v1/completions HT", HEAD + b"X-Half: ", HEAD + b"Content-Length: 9\r\n\r\n{"],
    ids=["nothing", "half a line", "half headers", "half a body"],
)
def test_strangers_that_hold_connections_keep_nobody_out(server: Attacked, half: bytes) -> None:
    with strangers(server, NUM_STRANGERS, half) as them:
        assert worst_s(server, lambda: None) < HONEST_S
        assert server.num_descriptors < NUM_DESCRIPTORS - 50, "there is room for what else it opens"
        answer = read_all(them[-1])  # one of the last ones, which was not closed to make room
        wait_until("all are late", lambda: server.num_descriptors < 100)
    assert (b"408 Request Timeout" in answer and b"did not arrive completely within 3 s" in answer) or half == b""
    assert server.log.stat().st_size < 200_000


def test_unfinished_bodies_have_a_budget(server: Attacked) -> None:
    head = HEAD + b"Content-Length: %d\r\n\r\n" % BODY_BYTES
    assert server.ask("POST", "/v1/completions", b" " * BODY_BYTES) == 400
    before_bytes = server.rss_bytes
    with strangers(server, 100, head + b" " * (BODY_BYTES - 1)):
        assert worst_s(server, lambda: None) < HONEST_S
        assert server.ask("POST", "/v1/completions", b" " * BODY_BYTES) == 400, "a whole one is taken"
        assert server.rss_bytes - before_bytes < 50 << 20, "of 100 MiB"


NULLS = b"[" + b"null," * 200_000 + b"null]"
GREEDY = {
    "nulls in prompt": ("completions", b'{"prompt": ' + NULLS + b"}"),
    "nulls in stop": ("completions", b'{"prompt": [1], "stop": ' + NULLS + b"}"),
    "nulls in messages": ("chat/completions", b'{"messages": ' + NULLS + b"}"),
    "lists": ("completions", b'{"prompt": [' + b"[]," * 300_000 + b"[]]}"),
    "stop token ids": ("completions", b'{"prompt": [1], "stop_token_ids": [' + b"5," * 500_000 + b"5]}"),
    "stops": ("completions", b'{"prompt": [1], "n": 64, "stop": [' + b'"abc",' * 160_000 + b'"abc"]}'),
    "deep": ("completions", b'{"prompt": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
}


@pytest.mark.parametrize(("path", "body"), GREEDY.values(), ids=GREEDY)
def test_bodies_that_would_grow_take_little_memory(server: Attacked, path: str, body: bytes) -> None:
    """A MiB of nulls took 640 MiB while every one had an error of its own."""
    assert len(body) <= BODY_BYTES
    assert server.ask("POST", f"/v1/{path}", body) == 400, "what it takes for good it has taken"
    before_bytes = server.rss_bytes
    server.start_peak()
    with ThreadPoolExecutor(8) as pool:
        statuses = set(pool.map(lambda _: server.ask("POST", f"/v1/{path}", body), range(8)))
        assert worst_s(server, lambda: None) < HONEST_S
    assert statuses == {400}
    assert server.peak_bytes - before_bytes < 256 << 20, "of 8 at once"


def test_a_body_in_tiny_pieces_is_refused(server: Attacked) -> None:
    answer = server.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 100_000)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


SMUGGLED = [
    b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"Content-Length: +2\r\n\r\n{}",
    b"Host: other\r\nContent-Length: 2\r\n\r\n{}",
    b"X-Long: " + b"x" * 40_000 + b"\r\n\r\n",
]


@pytest.mark.parametrize("rest", [*SMUGGLED, b""])
def test_what_two_servers_could_read_differently_is_refused_and_the_connection_closed(
    server: Attacked, rest: bytes
) -> None:
    if not rest:
        request = b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    else:
        request = HEAD + rest
    answer = server.raw(request + b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1, "what followed was not read as a request"
    assert answer.startswith(b"HTTP/1.1 400 "), answer


def test_what_strangers_make_the_log_say_is_limited(server: Attacked) -> None:
    begun_bytes = server.log.stat().st_size
    for _ in range(300):
        server.raw(b"\0\r\n\r\n")
    assert server.log.stat().st_size - begun_bytes < 20_000


# ---- who may ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_web_pages_may_not_ask(server: Attacked, origin: str) -> None:
    for method, path in [("POST", "/reset_prefix_cache"), ("POST", "/v1/completions"), ("GET", "/metrics")]:
        status, body = server.answer(method, path, b"{}" if method == "POST" else None, Origin=origin)
        assert status == 403
        assert json.loads(body)["error"]["code"] == "origin_not_allowed"
        assert "--allowed-origins" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("a.localhost:1", 200), ("127.0.0.1:80", 200),
        ("127.9.9.9", 200), ("[::1]:8000", 200), ("evil.example:8000", 403), ("0.0.0.0:8000", 403), ("10.0.0.1", 403),
        ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("notlocalhost", 403),
    ],
)  # fmt: skip
def test_on_a_loopback_address_only_local_names_are_taken(server: Attacked, host: str, status: int) -> None:
    assert server.ask(Host=host) == status


@pytest.mark.parametrize("engine_key", ["engines", None])
def test_keys_of_the_proxy_are_not_passed_on_to_engines(engine_key: str | None) -> None:
    engine_headers = {"Authorization": f"Bearer {engine_key}"} if engine_key else None
    with proxied() as r:
        bound = bind_socket("127.0.0.1", 0)
        proxy = Proxy(r.proxy.config, access=AccessRules(api_keys=("clients",)), engine_headers=engine_headers)
        with serving(AccessGuard(proxy.app(), proxy.access), bound):
            two = Proxied(r.prefill, r.decode, proxy, bound.getsockname()[1])
            assert two.http("POST", "/v1/completions", ASK)[0] == 401
            assert two.num_asked() == ([0], [0])
            assert two.http("POST", "/v1/completions", ASK, {"Authorization": "Bearer clients"})[0] == 200
            for headers in (r.prefill[0].headers[0], r.decode[0].headers[0]):
                assert headers.get("authorization") == (engine_headers or {}).get("Authorization")
