"""An engine that answers with whatever bytes a test wants, and the table of attacks by engines on the proxy."""

from __future__ import annotations

import gzip
import itertools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

LIMIT_BYTES = 1 << 20
"""The proxy's `max_reply_bytes` in these tests."""
HELD_BY_KERNEL_BYTES = 64 << 20
"""More than the sockets of one connection hold."""

Answer = Callable[[bytes], Iterable[bytes]]
"""From a request's body to the bytes of the answer, piece by piece."""
OK_CHOICE = b'{"index": 0, "text": "hostile"}'


class HostileEngine:
    """Answers each POST with `answer` of its body, a thread per connection, and then hangs up, or not with `stays`."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.answer: Answer = lambda body: ()
        self.stays = False
        self.num_asked = 0
        self.num_sent_bytes = 0
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader, suppress(OSError):
            num_bytes = 0
            while (line := reader.readline()).strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    num_bytes = int(value)
            body = reader.read(num_bytes)
            if b"do_release" in body:
                connection.sendall(reply(b"{}"))
                return
            self.num_asked += 1
            for piece in self.answer(body):
                connection.sendall(piece)
                self.num_sent_bytes += len(piece)
            if self.stays:
                reader.read(1)  # until the proxy leaves
        self._open.discard(connection)

    def close(self) -> None:
        for one in (self._listener, *tuple(self._open)):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextmanager
def hostile_engine() -> Iterator[HostileEngine]:
    one = HostileEngine()
    try:
        yield one
    finally:
        one.close()


def reply(body: bytes, status: str = "200 OK", headers: str = "", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
EVENT = b'data: {"choices": [' + OK_CHOICE + b"]}\n\n"


def _with(fields: str) -> bytes:
    return b'{"choices": [' + OK_CHOICE + b"], " + fields.encode() + b"}"


def _deep(depth: int) -> str:
    return "[" * depth + "]" * depth


WRONG_JSON: dict[str, bytes] = {
    "choices: 5": b'{"choices": 5}',
    "choices of numbers": b'{"choices": [5]}',
    "choices of choices": b'{"choices": [[' + OK_CHOICE + b"]]}",
    "no index": b'{"choices": [{"text": "a"}]}',
    "text is a list": b'{"choices": [{"index": 0, "text": ["a"]}]}',
    "finish_reason is a number": b'{"choices": [{"index": 0, "text": "", "finish_reason": 1}]}',
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "a text": b'"choices"',
    "empty": b"",
    "half": b'{"choices": [' + OK_CHOICE,
    "two": b'{"choices": []}{"choices": []}',
    "not UTF-8": b'{"id": "\xff", "choices": [' + OK_CHOICE + b"]}",
    "half a surrogate pair": _with('"id": "\\ud800"'),
    "NaN": _with('"n": NaN'),
    "-Infinity": _with('"n": [-Infinity]'),
    "deep": _with(f'"x": {_deep(100_000)}'),
    "usage is text": _with('"usage": "5"'),
    "usage is a list": _with('"usage": [1]'),
    "usage is negative": _with('"usage": {"prompt_tokens": -1}'),
    "usage is true": _with('"usage": {"completion_tokens": true}'),
    "usage of 5,000 digits": _with(f'"usage": {{"total_tokens": {"9" * 5000}}}'),
    "cached tokens are text": _with('"usage": {"prompt_tokens_details": {"cached_tokens": "x"}}'),
    "params are a list": _with('"kv_transfer_params": [1]'),
    "params are text": _with('"kv_transfer_params": "x"'),
    "recomputed tokens are text": _with('"kv_transfer_params": {"num_recomputed_tokens": "5"}'),
    "recomputed tokens are negative": _with('"kv_transfer_params": {"num_recomputed_tokens": -5}'),
    "load_error is an object": _with('"kv_transfer_params": {"load_error": {}}'),
    "port is text": _with('"kv_transfer_params": {"do_remote_prefill": true, "remote_port": "5"}'),
    "host is huge": _with(f'"kv_transfer_params": {{"do_remote_prefill": true, "remote_host": "{"h" * 300}"}}'),
    "lease is a list": _with('"kv_transfer_params": {"do_remote_prefill": true, "remote_lease_id": [1]}'),
    "params are deep": _with(f'"kv_transfer_params": {{"do_remote_prefill": true, "x": {_deep(900)}}}'),
}
"""Of whole replies and of events."""

WRONG_WHOLE: dict[str, bytes] = {
    "no choices": b"{}",
    "empty choices": b'{"choices": []}',
    "neither text nor message": b'{"choices": [{"index": 0}]}',
    "message is text": b'{"choices": [{"index": 0, "message": "a"}]}',
}
WRONG_EVENT: dict[str, bytes] = {
    "delta is a list": b'{"choices": [{"index": 0, "delta": [1]}]}',
    "delta's content is a number": b'{"choices": [{"index": 0, "delta": {"content": 5}}]}',
    "an error that is a number": b'{"error": 5}',
    "an error without words": b'{"error": {}}',
    "an error in half characters": b'{"error": {"message": "\\ud800"}}',
}

WRONG_HTTP: dict[str, bytes] = {
    "hangs up": b"",
    "no HTTP": b"\x00\xff" * 300 + b"\r\n\r\n",
    "a status line of nonsense": b"HTTP/1.1 OK\r\n\r\n",
    "status 999": reply(b"{}", "999 X"),
    "status 204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a protocol switched": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc",
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}}",
    "a body shorter than its length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{}",
    "a chunk's size that is none": CHUNKED + b"\r\nxyz\r\n{}",
    "gzip that is none": reply(b"no gzip", headers="Content-Encoding: gzip\r\n"),
    "a gzip bomb": reply(
        gzip.compress(_with(f'"x": "{"a" * (64 * LIMIT_BYTES)}"')), headers="Content-Encoding: gzip\r\n"
    ),
    "an error as a gzip bomb": reply(
        gzip.compress(b"a" * (64 * LIMIT_BYTES)), "500 X", headers="Content-Encoding: gzip\r\n"
    ),
    "a compression nobody knows": reply(_with('"a": 1'), headers="Content-Encoding: nonsense\r\n"),
    "an error in half characters": reply(b'{"error": {"message": "\\ud800\\udfff\\u001b[31m"}}', "500 X"),
    "an error that is a list": reply(b'{"error": [[[5]]]}', "500 X"),
    "an error that is deep": reply(b'{"error": ' + _deep(100_000).encode() + b"}", "500 X"),
    "an error of another type": reply(b'{"error": {"message": 5, "code": [1], "type": {}}}', "503 X"),
}


def _endless(start: bytes, piece: bytes) -> Answer:
    return lambda body: itertools.chain((start,), itertools.repeat(piece))


MEGABYTE = b"x" * (1 << 20)
ENDLESS: dict[str, Answer] = {
    "endless text": _endless(CHUNKED + b"\r\n" + chunk(b'{"x": "'), chunk(MEGABYTE)),
    "endless lists": _endless(CHUNKED + b"\r\n" + chunk(b'{"x": ['), chunk(b"[]," * 50_000)),
    "endless choices": _endless(CHUNKED + b"\r\n" + chunk(b'{"choices": ['), chunk(b'{"index":0},' * 10_000)),
    "endless until it hangs up": _endless(b"HTTP/1.1 200 OK\r\n\r\n{", MEGABYTE),
    "endless error": _endless(b"HTTP/1.1 500 X\r\n\r\n", MEGABYTE),
    "endless refusal": _endless(b"HTTP/1.1 400 X\r\n\r\n", MEGABYTE),
    "an endless status line": _endless(b"HTTP/1.1 200 ", MEGABYTE),
    "an endless header": _endless(b"HTTP/1.1 200 OK\r\nX: ", MEGABYTE),
    "endless headers": _endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 50_000),
    "an endless chunk extension": _endless(CHUNKED + b"\r\n5;", MEGABYTE),
    "an endless trailer": _endless(CHUNKED + b"\r\n" + chunk(_with('"a": 1')) + b"0\r\nX: ", MEGABYTE),
    "endless events": _endless(SSE, b'data: {"id": "x"}\n' * 10_000),
}
"""What ends at the proxy's limits, as whole replies."""

ENDLESS_STREAMS: dict[str, Answer] = {
    "an event without end": _endless(SSE + b"data: ", MEGABYTE),
    "an event of lines without end": _endless(SSE, b"x\n" * 100_000),
    "openings without end": _endless(SSE, b'data: {"choices": [{"index": 0, "text": ""}]}\n\n' * 1000),
    "comments without end": _endless(SSE, b": ping\n\n" * 10_000),
}
"""As streams, before their first token."""
