"""`kvferry explain` against a server that is not there, or is another, and what it prints."""

from __future__ import annotations

import http.server
import io
import threading
import urllib.error
from collections.abc import Iterator
from email.message import Message

import pytest
from rich.console import Console

from kvferry.cli.explain import ask, print_request
from kvferry.errors import ConfigError, HostError


@pytest.fixture
def other_server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_debug = self.path == "/debug/requests/a%2Fb"
            self.send_response(200 if is_debug else 404)
            self.end_headers()
            self.wfile.write(b'{"id": "a/b", "requests": []}' if is_debug else b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_id_is_quoted_and_an_answer_that_is_no_error_object_is_told(other_server: str) -> None:
    assert ask(other_server, "a/b") == {"id": "a/b", "requests": []}
    with pytest.raises(HostError, match="404 Not Found: give --url the `kvferry serve` that answered"):
        ask(other_server, "x")


HINT = ": give --url the `kvferry serve` that answered the request; what is at http://a cannot explain any"


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (404, '{"error": {"message": "no request", "code": "request_not_found"}}', "no request"),
        (404, '{"error": {"message": "no route"}}', f"no route{HINT}"),
        (404, '["error"]', f"the server answers 404 why{HINT}"),
        (404, '{"error": ["x"]}', f"the server answers 404 why{HINT}"),
        (500, '{"error": {"message": "it failed"}}', "it failed"),
    ],
)
def test_errors_of_servers(status: int, content: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, timeout: float) -> None:
        raise urllib.error.HTTPError(address, status, "why", Message(), io.BytesIO(content.encode()))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(HostError) as caught:
        ask("http://a", "x")
    assert str(caught.value) == message


def test_bad_addresses() -> None:
    with pytest.raises(ConfigError, match="must begin with http"):
        ask("file:///etc", "x")
    with pytest.raises(ConfigError, match=r"no kvferry server answers at --url=http://127\.0\.0\.1:1"):
        ask("http://127.0.0.1:1", "x")


def test_table_of_a_waiting_request() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    request = {
        "request_id": "cmpl-1", "state": "loading", "finish_reason": None, "error": None, "age_s": 1.5,
        "waits_for": {"what": "load", "gives_up_in_s": 3},
        "tokens": {"prompt": 99, "from_device": 16, "from_connector": {"host": 64}, "to_compute": 19},
        "ranges": [
            {"tokens": [0, 16], "place": "device", "reason": "r1", "loaded": False},
            {"tokens": [16, 80], "place": "host", "reason": "r2", "loaded": True, "group": 1, "connector": "Multi/A"},
        ],
        "asked": "at admission",
    }  # fmt: skip
    print_request(request, console)
    text = console.export_text()
    for part in (
        "cmpl-1: loading, 1.500 s",
        "waits for: load (gives_up_in_s 3)",
        "prompt 99 tokens: 16 in the engine's cache, loaded 64 from host, 19 to compute",
        "host (group 1)",
        "Multi/A: r2",
    ):
        assert part in text
