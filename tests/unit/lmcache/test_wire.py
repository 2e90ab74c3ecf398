"""The wire client against stand-ins: deadlines, late answers, lost connections, wrong versions."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest
from tests.fake_lmcache import CHUNK_TOKENS, SILENT, FakeServer

from kvferry.errors import HostError, TransferError
from kvferry.lmcache.wire import ServerConnection, ServerKey, shared_tensor


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.close()


@pytest.fixture
def connection(server: FakeServer) -> Iterator[ServerConnection]:
    made = ServerConnection(server.url)
    yield made
    made.close()


def test_a_key_has_the_fields_that_a_server_of_0_5_6_reads() -> None:
    key = ServerKey("m", 2, None, (1, 2, 3, 4), 0, 4, "r", "s")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(key.part(2, 4, 1))) == {
        "model_name": "m",
        "world_size": 2,
        "worker_id": 1,
        "token_ids": [1, 2, 3, 4],
        "start": 2,
        "end": 4,
        "request_id": "r",
        "cache_salt": "s",
        "request_configs": None,
        "num_kv_readers": 1,
    }


def test_a_tensor_is_described_without_gaps() -> None:
    extension = shared_tensor("/dev/shm/some-name", 9000, 4096, (4, 16, 64))
    assert extension.code == 1
    assert msgspec.msgpack.decode(extension.data) == {
        "type": "cpu_shm",
        "version": 1,
        "metadata": {
            "dtype": "uint8",
            "shape": [4, 16, 64],
            "stride": [1024, 64, 1],
            "storage_offset": 4096,
            "device_uuid": "cpu",
        },
        "shm_name": "/some-name",
        "nbytes": 9000,
    }


def test_a_probe_tells_the_chunk_size(connection: ServerConnection) -> None:
    assert connection.probe() == CHUNK_TOKENS


def test_operations_are_named_by_text(server: FakeServer, connection: ServerConnection) -> None:
    connection.probe()
    assert server.calls == ["get_chunk_size", "ping"], "numbers have moved between releases"


def test_silence_costs_the_deadline(connection: ServerConnection) -> None:
    started = time.monotonic()
    with pytest.raises(TransferError, match=r"has not answered 'no_such' within 0.2 s"):
        connection.call("no_such", returns=bool, timeout_s=0.2)
    assert time.monotonic() - started >= 0.2
    assert connection.probe() == CHUNK_TOKENS


def test_a_late_answer_is_nobodys(server: FakeServer, connection: ServerConnection) -> None:
    server.faults["ping"] = lambda _: time.sleep(0.4) or False
    with pytest.raises(TransferError, match=r"has not answered"):
        connection.call("ping", None, returns=bool, timeout_s=0.1)
    del server.faults["ping"]
    assert connection.call("ping", None, returns=bool, timeout_s=5) is True


@pytest.mark.parametrize("answer", ["text", [1, 2], {"a": 1}, 7])
def test_an_answer_of_another_type_is_an_error(server: FakeServer, connection: ServerConnection, answer: Any) -> None:
    server.faults["ping"] = lambda _: answer
    with pytest.raises(TransferError, match=r"'ping' at .* failed"):
        connection.call("ping", None, returns=bool, timeout_s=5)


def test_a_server_that_went_away_between_calls_fails_the_next(server: FakeServer) -> None:
    connection = ServerConnection(server.url)
    connection.probe()
    server.close()
    again = FakeServer(port=server.port)
    assert connection._monitor is not None
    assert connection._monitor.poll(10_000), "the news of the lost connection has not come"
    with pytest.raises(TransferError, match=r"the server has closed the connection"):
        connection.call("ping", None, returns=bool, timeout_s=5)
    assert connection.probe() == CHUNK_TOKENS
    connection.close()
    again.close()
    server.__init__()  # type: ignore[misc]  # for the fixture to close


def test_no_server_is_an_error_that_says_what_to_do() -> None:
    connection = ServerConnection("tcp://127.0.0.1:9")
    with pytest.raises(HostError, match=r"start `lmcache server` 0.5.6 or later .* correct lmcache.mp.host"):
        connection.probe(timeout_s=0.2)
    connection.close()


def test_a_server_that_knows_no_names_is_an_error_that_says_so(server: FakeServer) -> None:
    server.faults["get_chunk_size"] = lambda _: SILENT  # as a server before 0.5.6, which only logs an error
    connection = ServerConnection(server.url)
    with pytest.raises(HostError, match=r"earlier ones do not know operations by name"):
        connection.probe(timeout_s=0.2)
    connection.close()


@pytest.fixture
def version_server() -> Iterator[Any]:
    class Handler(BaseHTTPRequestHandler):
        version: Any = "0.5.6"

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/lmc_version" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(self.version).encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield http, Handler
    http.shutdown()
    thread.join()
    http.server_close()


def test_an_old_version_is_refused_by_name(version_server: Any, connection: ServerConnection) -> None:
    http, handler = version_server
    for version in ("0.5.6", "0.5.7.post1", "1.0"):
        handler.version = version
        assert connection.probe(http_port=http.server_port) == CHUNK_TOKENS
    for version in ("0.5.5", "0.4.7", "0.5"):
        handler.version = version
        with pytest.raises(HostError, match=f"is {version}; kvferry's client needs 0.5.6 or later"):
            connection.probe(http_port=http.server_port)


def test_a_wrong_http_port_is_told(connection: ServerConnection) -> None:
    with pytest.raises(HostError, match=r"http_port: .* does not report its version"):
        connection.probe(http_port=9, timeout_s=0.5)
