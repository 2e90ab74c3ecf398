"""Engines that answer what no engine should: it is that engine's failure, another one answers, and little is held."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from tests.e2e.fake_engine import WORDS, FakeEngine, engine, serving
from tests.e2e.hostile_engine import (
    CHUNKED,
    ENDLESS,
    ENDLESS_STREAMS,
    EVENT,
    HELD_BY_KERNEL_BYTES,
    LIMIT_BYTES,
    MEGABYTE,
    SSE,
    WRONG_EVENT,
    WRONG_HTTP,
    WRONG_JSON,
    WRONG_WHOLE,
    Answer,
    HostileEngine,
    chunk,
    hostile_engine,
    reply,
)
from tests.e2e.test_proxy import ASK, QUICK, TEXT, Running
from tests.patience import PATIENCE_S

from kvferry.http import bind_socket
from kvferry.proxy import relay
from kvferry.proxy.app import Proxy
from kvferry.proxy.bodies import SignPeer
from kvferry.proxy.config import ProxyConfig
from kvferry.proxy.replies import judge_reply
from kvferry.proxy.tokens import peer_signer

STREAM = ASK | {"stream": True}
ROLES = ("prefill", "decode")


class Attacked:
    """A proxy whose first engine of one role is hostile, beside honest ones."""

    def __init__(self, running: Running, role: str, bad: HostileEngine) -> None:
        self.running = running
        self.bad = bad
        self.engine = getattr(running.proxy.fleet, role)[0]

    def ask(
        self, answer: Answer, body: dict[str, Any] | None = None, path: str = "/v1/completions"
    ) -> tuple[int, bytes]:
        """A request whose first engine of that role is the hostile one."""
        self.bad.answer, self.bad.num_asked, self.bad.num_sent_bytes = answer, 0, 0
        self.engine.num_begun, self.engine.last_failure = -1_000_000, ""
        self.engine.breaker.succeeded()
        status, _, content = self.running.http("GET" if body is None else "POST", path, body)
        assert self.bad.num_asked == 1
        assert self.bad.num_sent_bytes < LIMIT_BYTES + HELD_BY_KERNEL_BYTES
        assert self.engine.held_bytes == 0
        return status, content

    def ask_after_an_event(self, rest: Answer) -> bytes:
        """What comes through of a stream whose first event is good, and was passed on before the rest came."""
        is_passed_on = threading.Event()

        def answer(body: bytes) -> Iterable[bytes]:
            yield SSE + EVENT
            assert is_passed_on.wait(PATIENCE_S)
            yield from rest(body)

        self.bad.answer, self.bad.num_sent_bytes, self.engine.num_begun = answer, 0, -1_000_000
        connection = http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(STREAM))
            coming = connection.getresponse()
            begun = coming.read(len(EVENT))
            is_passed_on.set()
            content = begun + coming.read()
        finally:
            connection.close()
        assert self.bad.num_sent_bytes < LIMIT_BYTES + HELD_BY_KERNEL_BYTES
        assert self.engine.held_bytes == 0
        return content

    @property
    def blamed(self) -> str:
        """Why that engine, or a transfer to it, failed the last time."""
        pairs = (pair for (_, d), pair in self.running.proxy.fleet.pairs.items() if d is self.engine)
        return self.engine.last_failure or next((pair.last_failure for pair in pairs), "")

    def check_blamed(self) -> None:
        """The failure is that engine's, and told on one printable line."""
        assert self.blamed not in ("", "not tried yet")
        assert self.blamed.isprintable()
        assert len(self.blamed) <= 1100
        assert self.blamed in self.running.http("GET", "/ready")[2].decode().replace('\\"', '"').replace("\\\\", "\\")


@contextmanager
def attacked(
    role: str, *, num_honest: int = 1, sign_peer: SignPeer | None = None, **settings: Any
) -> Iterator[Attacked]:
    with ExitStack() as stack:
        bad = stack.enter_context(hostile_engine())
        engines: dict[str, list[FakeEngine]] = {
            one: [stack.enter_context(engine()) for _ in range(num_honest if one == role else 1)] for one in ROLES
        }
        urls = {one: [e.url for e in engines[one]] for one in ROLES}
        urls[role].insert(0, bad.url)
        limits = {"failure_threshold": 1_000_000, "max_reply_bytes": LIMIT_BYTES}
        proxy = Proxy(ProxyConfig.parse({**urls, **QUICK, **limits, **settings}), sign_peer=sign_peer)
        bound = bind_socket("127.0.0.1", 0)
        port = bound.getsockname()[1]
        stack.enter_context(serving(proxy.app(), bound))
        yield Attacked(Running(engines["prefill"], engines["decode"], proxy, port), role, bad)


@pytest.fixture(scope="module", params=ROLES)
def either(request: pytest.FixtureRequest) -> Iterator[Attacked]:
    with attacked(request.param) as one:
        yield one


@pytest.fixture(scope="module")
def decode() -> Iterator[Attacked]:
    with attacked("decode") as one:
        yield one


def always(data: bytes) -> Answer:
    return lambda body: (data,)


# ---- whole replies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WRONG_JSON, *WRONG_WHOLE])
def test_reply_of_a_wrong_shape_is_that_engines_failure_and_another_one_answers(either: Attacked, name: str) -> None:
    status, content = either.ask(always(reply({**WRONG_JSON, **WRONG_WHOLE}[name])), ASK)
    assert (status, json.loads(content)["choices"][0]["text"]) == (200, TEXT)
    either.check_blamed()


@pytest.mark.parametrize("name", WRONG_HTTP)
def test_reply_that_is_no_http_or_not_what_was_asked_for(either: Attacked, name: str) -> None:
    status, content = either.ask(always(WRONG_HTTP[name]), STREAM)
    assert status == 200
    assert all(word.encode() in content for word in WORDS)
    if name != "an error of another type":
        either.check_blamed()


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_reply_is_cut_at_the_limit(either: Attacked, name: str) -> None:
    status, content = either.ask(ENDLESS[name], ASK)
    assert (status, json.loads(content)["choices"][0]["text"]) == (200, TEXT)
    either.check_blamed()


def test_redirects_are_not_followed(either: Attacked) -> None:
    with hostile_engine() as elsewhere:
        for status in ("301 X", "302 X", "303 X", "307 X", "308 X"):
            moved = reply(b"{}", status, f"Location: {elsewhere.url}/v1/completions\r\n")
            assert either.ask(always(moved), ASK)[0] == 200
            either.check_blamed()
        assert elsewhere.num_asked == 0


def test_refusal_that_is_no_json_is_told_in_openais_shape(either: Attacked) -> None:
    page = reply("<script>\x1b é漢</script>".encode(), "404 X", kind="text/html; é漢")
    status, content = either.ask(always(page), ASK)
    assert status == 404
    assert json.loads(content)["error"]["message"].endswith(f"engine {either.bad.url}: <script> é漢</script>")


@pytest.mark.parametrize(("host", "is_signed"), [("127.0.0.1", True), ("169.254.169.254", False)])
def test_prefill_engine_cannot_have_other_machines_signed(host: str, is_signed: bool) -> None:
    def answer(body: bytes) -> Iterable[bytes]:
        asked = json.loads(body)["kv_transfer_params"]
        params = {"do_remote_prefill": True, "transfer_id": asked["transfer_id"], "remote_host": host, "remote_port": 5}
        told = {"choices": [{"index": 0, "text": "a"}], "kv_transfer_params": params | {"peer_token": "its own"}}
        return (reply(json.dumps(told).encode()),)

    with attacked("prefill", sign_peer=peer_signer("k" * 32)) as one:
        assert one.ask(answer, ASK)[0] == 200
        (handed,) = (body["kv_transfer_params"] for body in one.running.decode[0].seen)
        assert handed.get("peer_token", "").startswith("v1.") == is_signed
        assert handed.get("peer_token") != "its own"


def test_hand_over_of_another_request_is_a_failure() -> None:
    params = b'{"do_remote_prefill": true, "transfer_id": "x"}'
    told = b'{"choices": [{"index": 0, "text": "a"}], "kv_transfer_params": ' + params + b"}"
    with attacked("prefill") as one:
        assert one.ask(always(reply(told)), ASK)[0] == 200
        one.check_blamed()
        assert "transfer_id" in one.blamed


# ---- streams --------------------------------------------------------------------------------------------------------


WRONG_EVENTS = {name: b"data: " + data + b"\n\n" for name, data in {**WRONG_JSON, **WRONG_EVENT}.items()}


@pytest.mark.parametrize("name", WRONG_EVENTS)
def test_event_of_a_wrong_shape_before_the_first_token_lets_another_engine_answer(decode: Attacked, name: str) -> None:
    status, content = decode.ask(always(SSE + WRONG_EVENTS[name] + EVENT), STREAM)
    assert (status, b"hostile" in content) == (200, False)
    assert all(word.encode() in content for word in WORDS)
    decode.check_blamed()


@pytest.mark.parametrize("name", WRONG_EVENTS)
def test_event_of_a_wrong_shape_after_the_first_token_ends_the_stream(decode: Attacked, name: str) -> None:
    check_cut(decode, decode.ask_after_an_event(always(WRONG_EVENTS[name] + EVENT)))


def check_cut(decode: Attacked, content: bytes) -> None:
    """What was good came through, then one error that names the engine, then the end, and nothing else."""
    begun, told, done, nothing = content.split(b"\n\n")
    assert begun + b"\n\n" == EVENT
    error = json.loads(told.removeprefix(b"data: "))["error"]
    assert f"decode engine {decode.bad.url}" in error["message"]
    assert error["message"].isprintable()
    assert (done, nothing) == (b"data: [DONE]", b"")


@pytest.mark.parametrize("name", ENDLESS_STREAMS)
def test_endless_stream_is_cut_at_the_limit(decode: Attacked, name: str) -> None:
    status, content = decode.ask(ENDLESS_STREAMS[name], STREAM)
    assert status == 200
    assert all(word.encode() in content for word in WORDS)
    decode.check_blamed()


@pytest.mark.parametrize("piece", [b"data: " + MEGABYTE, b"x\n" * 100_000], ids=["one line", "lines"])
def test_endless_event_of_a_stream_that_has_begun_ends_it(decode: Attacked, piece: bytes) -> None:
    check_cut(decode, decode.ask_after_an_event(lambda body: itertools.repeat(piece)))


def test_nothing_comes_through_behind_the_end_of_a_stream(decode: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    done = b"data: [DONE]\n\n"
    for behind in (EVENT, b"data: 5\n\n", b"half"):
        assert decode.ask(always(SSE + EVENT + done + behind), STREAM) == (200, EVENT + done)
    monkeypatch.setattr(relay, "_DRAIN_S", 0.1)  # nor is anything waited for beyond that
    decode.bad.stays = True
    try:
        assert decode.ask(always(SSE + EVENT + done), STREAM) == (200, EVENT + done)
    finally:
        decode.bad.stays = False


def test_whole_reply_to_a_request_for_a_stream_is_a_failure(decode: Attacked) -> None:
    status, content = decode.ask(always(reply(b'{"choices": [{"index": 0, "text": "hostile"}]}')), STREAM)
    assert (status, b"hostile" in content) == (200, False)
    decode.check_blamed()


# ---- slow ones ------------------------------------------------------------------------------------------------------


def _drip(start: bytes, drop: bytes) -> Answer:
    def answer(body: bytes) -> Iterable[bytes]:
        yield start
        while True:
            yield drop

    return answer


SLOW: dict[str, Answer] = {
    "nothing": lambda body: (),
    "half a status line": always(b"HTTP/1.1 2"),
    "half a header": always(b"HTTP/1.1 200 OK\r\nX"),
    "half a body": always(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{"),
    "half a chunk": always(CHUNKED + b"\r\n5\r\n{"),
    "half a trailer": always(CHUNKED + b"\r\n" + chunk(b"{}") + b"0\r\nX"),
    "half an error": always(b"HTTP/1.1 500 X\r\nContent-Length: 5\r\n\r\n{"),
    "half an event": always(SSE + b"data: {"),
    "interim replies without end": _drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
}


@pytest.mark.parametrize("role", ROLES)
def test_replies_that_never_end_are_given_up_at_the_legs_deadline(role: str) -> None:
    short = dict.fromkeys([f"{role}_timeout_s", *(["answer_timeout_s"] if role == "decode" else [])], 2.0)
    with attacked(role, num_honest=0, retry_deadline_s=0, **short) as one, ThreadPoolExecutor(len(SLOW)) as pool:
        one.bad.stays = True
        one.bad.answer = lambda body: SLOW[json.loads(body)["prompt"]](body)

        def ask(name: str) -> tuple[int, str]:
            body = ASK | {"prompt": name, "stream": name == "half an event"}
            status, _, content = one.running.http("POST", "/v1/completions", body)
            return status, json.loads(content)["error"]["message"]

        for name, (status, message) in zip(SLOW, pool.map(ask, SLOW), strict=True):
            assert (status, "no answer within 2 s" in message) == (504, True), (name, message)
        one.check_blamed()
        assert one.engine.held_bytes == 0


# ---- lists of models ------------------------------------------------------------------------------------------------


def test_list_of_models_is_bounded_and_another_engine_is_asked(decode: Attacked) -> None:
    for answer in (always(reply(b"[]")), always(reply(b'{"data": NaN}')), always(b""), ENDLESS["endless text"]):
        status, content = decode.ask(answer, path="/v1/models")
        assert (status, json.loads(content)["object"]) == (200, "list")
        decode.check_blamed()


def test_models_of_an_engine_that_never_ends() -> None:
    with attacked("decode", num_honest=0, probe_timeout_s=0.5) as one:
        one.bad.stays, one.bad.answer = True, SLOW["half a body"]
        assert one.running.http("GET", "/v1/models")[0] == 504


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "piece"),
    [(b'{"x": [', b"[],"), (b'{"x": [', b"{},"), (b'{"x": [', b'"",'), (b'{"x": {', b'"a":0,'), (b"{", b'"b":[],')],
)
def test_what_is_not_looked_at_is_not_built(start: bytes, piece: bytes) -> None:
    """Python's own parser takes up to 30 times the bytes."""
    body = start + piece * ((4 << 20) // len(piece))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            judge_reply(body)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


def test_replies_of_one_engine_together_are_bounded(decode: Attacked) -> None:
    """Four may be as long as one may be at most; each further one counts as that engine's failure."""
    decode.engine.held_bytes = 4 * LIMIT_BYTES
    try:
        decode.bad.answer = always(reply(b'{"choices": [{"index": 0, "text": "hostile"}]}'))
        decode.engine.num_begun, decode.engine.last_failure = -1_000_000, ""
        assert TEXT in decode.running.http("POST", "/v1/completions", ASK)[2].decode()
        decode.check_blamed()
        assert "together" in decode.engine.last_failure
    finally:
        decode.engine.held_bytes = 0
