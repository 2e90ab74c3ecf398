"""The proxy as clients see it: the real `openai` client before it, engines that fail on demand behind it."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from tests.e2e.fake_engine import WORDS, FakeEngine, engine, serving
from tests.patience import PATIENCE_S

from kvferry.http import bind_socket, url_of
from kvferry.proxy.app import Proxy
from kvferry.proxy.config import ProxyConfig
from kvferry.proxy.metrics import OUTCOMES

TEXT = "".join(WORDS)
QUICK = {"probe_interval_s": 0, "min_backoff_s": 0.05, "max_backoff_s": 0.1, "connect_timeout_s": 30}
ASK: dict[str, Any] = {"model": "m", "prompt": "Count", "max_tokens": 4}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Count"}], "max_tokens": 4}


class Running:
    """A proxy in this process, with its engines."""

    def __init__(self, prefill: list[FakeEngine], decode: list[FakeEngine], proxy: Proxy, port: int) -> None:
        self.prefill = prefill
        self.decode = decode
        self.proxy = proxy
        self.port = port
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="the-key", max_retries=0, timeout=120
        )

    def http(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers or {})
            reply = connection.getresponse()
            return reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def metric(self, series: str) -> float:
        for line in self.http("GET", "/metrics")[2].decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        raise KeyError(series)

    def num_asked(self) -> tuple[list[int], list[int]]:
        return [len(p.seen) for p in self.prefill], [len(d.seen) for d in self.decode]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@contextmanager
def running(num_prefill: int = 1, num_decode: int = 1, **settings: Any) -> Iterator[Running]:
    with ExitStack() as stack:
        prefill = [stack.enter_context(engine()) for _ in range(num_prefill)]
        decode = [stack.enter_context(engine()) for _ in range(num_decode)]
        urls = {"prefill": [p.url for p in prefill], "decode": [d.url for d in decode]}
        proxy = Proxy(ProxyConfig.parse({**urls, **QUICK, **settings}))
        bound = bind_socket("127.0.0.1", 0)
        port = bound.getsockname()[1]
        stack.enter_context(serving(proxy.app(), bound))
        yield Running(prefill, decode, proxy, port)


# ---- the two legs -------------------------------------------------------------------------------------------------


def test_completion_goes_through_both_legs() -> None:
    with running() as r:
        reply = r.client.completions.create(**ASK, extra_headers={"X-Request-Id": "req-7"})
        assert reply.choices[0].text == TEXT
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 4
        (asked,), (continued,) = r.prefill[0].seen, r.decode[0].seen
        assert asked["max_tokens"] == 1
        assert asked["kv_transfer_params"]["do_remote_decode"] is True
        handed = continued.pop("kv_transfer_params")
        assert handed == {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": r.prefill[0].url,
            "transfer_id": asked["kv_transfer_params"]["transfer_id"], "remote_first_token_ids": [11],
        }  # fmt: skip
        assert continued == ASK
        for headers in (r.prefill[0].headers[0], r.decode[0].headers[0]):
            assert headers["authorization"] == "Bearer the-key"
            assert headers["x-request-id"] == "req-7"
        assert r.metric('kvferry:proxy_requests_total{outcome="ok"}') == 1
        assert r.metric('kvferry:proxy_leg_seconds_count{leg="prefill"}') == 1
        assert r.metric("kvferry:proxy_in_flight") == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stream_is_byte_for_byte_the_decode_engines(path: str) -> None:
    body = (ASK if "chat" not in path else CHAT) | {"stream": True, "stream_options": {"include_usage": True}}
    with running() as r:
        status, headers, through = r.http("POST", path, body, {"X-Request-Id": "bad id\t"})
        direct = http.client.HTTPConnection("127.0.0.1", int(r.decode[0].url.rpartition(":")[2]), timeout=120)
        direct.request("POST", path, json.dumps(body))
        assert through == direct.getresponse().read()
        direct.close()
        assert status == 200
        assert headers["content-type"].startswith("text/event-stream")
        ids = {one.headers[0]["x-request-id"] for one in (r.prefill[0], r.decode[0])} | {headers["x-request-id"]}
        assert len(ids) == 1
        assert re.fullmatch("[0-9a-f]{32}", ids.pop()), "not the client's, which is no id"


def test_chat_stream_with_usage_by_the_real_client() -> None:
    with running() as r:
        chunks = list(r.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 9


def test_same_prefix_goes_to_the_same_prefill_engine_and_others_spread() -> None:
    with running(num_prefill=3) as r:
        for turn in range(4):
            for who in range(3):
                prompt = f"{who} " * 1000 + "x" * 600 * turn
                r.client.completions.create(**(ASK | {"prompt": prompt}))
        for p in r.prefill:
            assert len(p.seen) == 4
            assert len({body["prompt"][0] for body in p.seen}) == 1, "one conversation each"


def test_models_come_from_an_engine() -> None:
    with running() as r:
        assert [model.id for model in r.client.models.list()] == [r.decode[0].url]
        with pytest.raises(openai.NotFoundError):
            r.client.models.retrieve("other")


@contextmanager
def before_an_echo() -> Iterator[Running]:
    """A proxy before an engine that answers every GET with the path it was asked for."""

    async def echo(request: Request) -> Response:
        return JSONResponse({"id": request.scope["raw_path"].decode()})

    with ExitStack() as stack:
        bound, front = (bind_socket("127.0.0.1", 0) for _ in range(2))
        stack.enter_context(serving(Starlette(routes=[Route("/{path:path}", echo)]), bound))
        proxy = Proxy(ProxyConfig.parse({"prefill": ["http://p:1"], "decode": [url_of(bound)], **QUICK}))
        stack.enter_context(serving(proxy.app(), front))
        yield Running([], [], proxy, front.getsockname()[1])


def test_name_of_a_model_cannot_lead_to_an_engines_other_routes() -> None:
    with before_an_echo() as r:
        for asked, passed in (
            ("org/model", "org%2Fmodel"), ("%2Fa%2F.b..c", "%2Fa%2F.b..c"), ("a%3Fb%23%25", "a%3Fb%23%25"),
            ("%C3%A9", "%C3%A9"),
        ):  # fmt: skip
            status, _, content = r.http("GET", f"/v1/models/{asked}")
            assert (status, json.loads(content)) == (200, {"id": f"/v1/models/{passed}"})
        for asked in (
            "%2e%2e/%2e%2e/debug/requests", "..%2f..%2fdebug", "a/%2e%2e/b", "%2e%2e", "%2e", "%0a", "", "x" * 2000
        ):  # fmt: skip
            status, _, content = r.http("GET", f"/v1/models/{asked}")
            assert (status, "GET /v1/models lists all" in json.loads(content)["error"]["message"]) == (404, True)


# ---- engines that fail before anything was sent ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["500", "503", "429", "hang", "no_params", "other_params"])
@pytest.mark.parametrize("stream", [False, True])
def test_failed_prefill_goes_to_another_engine(mode: str, stream: bool) -> None:
    with running(num_prefill=2, prefill_timeout_s=5 if mode == "hang" else 30) as r:
        r.prefill[0].mode = mode
        assert r.http("POST", "/v1/completions", ASK | {"stream": stream})[0] == 200
        assert r.num_asked() == ([1, 1], [1])
        assert r.metric('kvferry:proxy_retries_total{leg="prefill"}') == 1
        wait_until(lambda: r.prefill[0].num_left == (mode == "hang"))


@pytest.mark.parametrize("mode", ["500", "error", "cut_at_start", "hang"])
def test_failed_decode_is_tried_elsewhere_with_a_new_prefill(mode: str) -> None:
    with running(num_decode=2, decode_timeout_s=5 if mode == "hang" else 30) as r:
        r.decode[0].mode = mode
        chunks = list(r.client.completions.create(**ASK, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == TEXT
        assert r.num_asked() == ([2], [1, 1]), "what was handed over may be spent"
        first, second = (p["kv_transfer_params"]["transfer_id"] for p in r.prefill[0].seen)
        assert first != second
        assert r.decode[1].seen[0]["kv_transfer_params"]["transfer_id"] == second


def test_dead_decode_engine_never_saw_the_hand_over_so_it_is_used_again() -> None:
    with engine() as dead_one:
        dead = dead_one.url
    with running(num_decode=1) as r:
        config = ProxyConfig.parse({"prefill": [r.prefill[0].url], "decode": [dead, r.decode[0].url], **QUICK})
        bound = bind_socket("127.0.0.1", 0)
        port = bound.getsockname()[1]
        with serving(Proxy(config).app(), bound):
            two = Running(r.prefill, r.decode, r.proxy, port)
            for _ in range(4):
                assert two.client.completions.create(**ASK).choices[0].text == TEXT
            assert two.num_asked() == ([4], [4])


@pytest.mark.parametrize(
    ("role", "mode", "status", "message"),
    [
        ("prefill", "500", 502, "it is 500"),
        ("prefill", "429", 429, "it is 429"),
        ("prefill", "hang", 504, "no answer within 0.75 s"),
        ("prefill", "no_params", 502, "without kv_transfer_params that hand KV over: start it with a P2P connector"),
        ("prefill", "other_params", 502, "that hand KV over"),
        ("decode", "500", 502, "it is 500"),
        ("decode", "hang", 504, "no answer within 0.75 s"),
        ("decode", "error", 502, 'finish_reason="error"'),
        ("decode", "recomputed", 502, "computed 3 prompt tokens again"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_error_names_engine_and_remedy(role: str, mode: str, status: int, message: str, stream: bool) -> None:
    timeout_s = 0.75 if mode == "hang" else 30
    short = dict.fromkeys(("decode_timeout_s", "answer_timeout_s", f"{role}_timeout_s"), timeout_s)
    with running(retry_deadline_s=0, **short) as r:
        failing = (r.prefill if role == "prefill" else r.decode)[0]
        failing.mode = mode
        with pytest.raises(openai.APIStatusError, match=re.escape(message)) as caught:
            r.client.completions.create(**ASK, stream=stream)
        assert caught.value.status_code == status
        assert f"{role} engine {failing.url}" in caught.value.message
        assert r.num_asked() == ([1], [role == "decode"]), "no second prefill, no second try"
        outcome = "full" if mode == "429" else "failed"
        assert r.metric(f'kvferry:proxy_requests_total{{outcome="{outcome}"}}') == 1
        assert r.metric('kvferry:proxy_recomputed_total{reason="decode_engine"}') == (mode == "recomputed")


@pytest.mark.parametrize(
    ("role", "stream", "option"),
    [
        ("prefill", True, "--prefill-timeout-s"),
        ("decode", True, "--decode-timeout-s"),
        ("decode", False, "--answer-timeout-s"),
    ],
)
def test_late_answer_names_the_option_that_says_how_late(role: str, stream: bool, option: str) -> None:
    with running(retry_deadline_s=0, **{option.removeprefix("--").replace("-", "_"): 0.5}) as r:
        (r.prefill if role == "prefill" else r.decode)[0].mode = "hang"
        with pytest.raises(openai.APIStatusError, match=re.escape(f"no answer within 0.5 s (the proxy's {option})")):
            r.client.completions.create(**ASK, stream=stream)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusals_are_passed_on_as_they_are(role: str, status: int) -> None:
    with running(num_prefill=2, num_decode=2) as r:
        for one in r.prefill if role == "prefill" else r.decode:
            one.mode = str(status)
        with pytest.raises(openai.APIStatusError, match=f"it is {status}") as caught:
            r.client.completions.create(**ASK)
        assert (caught.value.status_code, caught.value.code) == (status, "c")
        asked = r.num_asked()
        assert sum(asked[0]) == 1
        assert sum(asked[1]) == (role == "decode"), "asked once: it would be wrong anywhere"
        if role == "decode":
            wait_until(lambda: given_back(r) == handed_over(r))


# ---- what nobody will fetch -----------------------------------------------------------------------------------------


def handed_over(r: Running) -> list[str]:
    """Transfer ids of all prefill legs."""
    return sorted(body["kv_transfer_params"]["transfer_id"] for p in r.prefill for body in p.seen)


def given_back(r: Running) -> list[str]:
    return sorted(name for p in r.prefill for name in p.given_back)


@pytest.mark.parametrize("mode", ["500", "drop", "error", "recomputed", "full"])
@pytest.mark.parametrize("stream", [False, True])
def test_hand_over_that_is_not_fetched_is_given_back_and_one_that_is_fetched_is_not(mode: str, stream: bool) -> None:
    with running(retry_deadline_s=2.0) as r:
        r.client.completions.create(**ASK)
        fetched = handed_over(r)
        r.decode[0].mode = mode
        with pytest.raises(openai.APIError):
            list(r.client.completions.create(**ASK, stream=stream))
        wait_until(lambda: len(given_back(r)) == len(handed_over(r)) - 1)
        assert sorted(given_back(r) + fetched) == handed_over(r), "each once"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_hand_overs_of_clients_that_leave_are_given_back(role: str) -> None:
    """Also when the prefill engine's answer was on its way, so that the proxy knows the transfer's id alone."""
    with running() as r:
        failing = (r.prefill if role == "prefill" else r.decode)[0]
        failing.mode = "hang"
        connections = [http.client.HTTPConnection("127.0.0.1", r.port, timeout=120) for _ in range(8)]
        for connection in connections:
            connection.request("POST", "/v1/completions", json.dumps(ASK))
        wait_until(lambda: len(failing.seen) == len(connections))
        for connection in connections:
            connection.close()
        wait_until(lambda: given_back(r) == handed_over(r))
        assert len(given_back(r)) == len(connections)


# ---- streams that break off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cut", "quiet_end"])
def test_stream_that_breaks_off_ends_with_an_error_and_is_not_tried_again(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(num_decode=2) as r:
        for d in r.decode:
            d.mode = mode
        headers = {"X-Request-Id": "req-9"}
        stream = iter(r.client.completions.create(**ASK, stream=True, extra_headers=headers))
        assert "".join(next(stream).choices[0].text for _ in range(3)) == WORDS[0] + WORDS[1]
        with pytest.raises(openai.APIError, match=r"decode engine http://\S+: its stream (broke off|ended)"):
            next(stream)
        assert r.num_asked()[0] == [1]
        assert sum(r.num_asked()[1]) == 1
        assert r.metric('kvferry:proxy_requests_total{outcome="cut"}') == 1
        (line,) = [record.getMessage() for record in caplog.records if "req-9" in record.getMessage()]
        (asked,) = [d for d in r.decode if d.seen]
        said = rf"request req-9: the stream of decode engine {asked.url} broke off after 3 events \((\d+) bytes\)"
        found = re.match(said, line)
        assert found
        assert int(found[1]) > len(WORDS[0] + WORDS[1])


def test_silent_stream_is_cut_at_its_deadline() -> None:
    with running(decode_timeout_s=5) as r:
        r.decode[0].mode = "pause"
        with pytest.raises(openai.APIError, match="no answer within 5 s"):
            list(r.client.completions.create(**ASK, stream=True))
        wait_until(lambda: r.decode[0].num_left == 1)


@pytest.mark.parametrize("strict", [True, False])
def test_a_request_that_no_engine_can_hand_over_costs_no_engine_its_place(strict: bool) -> None:
    """Four of them once took the only prefill engine out of rotation, for everybody."""
    with running(strict=strict, min_backoff_s=60, max_backoff_s=60) as r:
        r.prefill[0].mode = "refused"
        for _ in range(4):
            status, _, content = r.http("POST", "/v1/completions", ASK)
            assert status == (400 if strict else 200)
            if strict:
                assert "for this request: its media are numbered; start" in json.loads(content)["error"]["message"]
        assert r.num_asked() == ([4], [0 if strict else 4])
        r.prefill[0].mode = "ok"
        assert r.client.completions.create(**ASK).choices[0].text == TEXT


# ---- not strict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "reason"), [("no_params", "no_params"), ("recomputed", "decode_engine")])
@pytest.mark.parametrize("stream", [False, True])
def test_not_strict_forwards_and_counts_once(mode: str, reason: str, stream: bool) -> None:
    with running(strict=False) as r:
        r.prefill[0].mode = r.decode[0].mode = mode
        for _ in range(5):
            assert r.http("POST", "/v1/completions", ASK | {"stream": stream})[0] == 200
        assert r.metric(f'kvferry:proxy_recomputed_total{{reason="{reason}"}}') == 5
        sent = [body.get("kv_transfer_params") for body in r.decode[0].seen]
        assert (sent == [None] * 5) == (mode == "no_params")


@pytest.mark.parametrize("num_requests", [1, 5])
def test_not_strict_answers_without_any_prefill_engine(num_requests: int) -> None:
    with running(strict=False, min_backoff_s=30, max_backoff_s=30) as r:
        r.prefill[0].mode = "500"
        for _ in range(num_requests):
            assert r.client.completions.create(**ASK).choices[0].text == TEXT
        assert r.num_asked() == ([min(3, 2 * num_requests)], [num_requests])
        assert r.metric('kvferry:proxy_recomputed_total{reason="no_prefill_engine"}') == num_requests


def test_requests_that_cannot_be_split() -> None:
    with running() as r, pytest.raises(openai.BadRequestError, match=r"n=2: cannot be split.*--no-strict"):
        r.client.completions.create(**ASK, n=2)
    with running(strict=False) as r:
        assert len(r.client.completions.create(**ASK, n=2).choices) == 2
        assert r.num_asked() == ([0], [1])
        assert r.decode[0].seen == [ASK | {"n": 2}]
        assert r.metric('kvferry:proxy_recomputed_total{reason="not_split"}') == 1


# ---- clients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "mode"), [("prefill", "hang"), ("decode", "hang"), ("decode", "pause")])
@pytest.mark.parametrize("stream", [False, True])
def test_leg_ends_when_the_client_leaves(role: str, mode: str, stream: bool) -> None:
    if mode == "pause" and not stream:
        mode = "hang"
    with running() as r:
        failing = (r.prefill if role == "prefill" else r.decode)[0]
        failing.mode = mode
        connection = http.client.HTTPConnection("127.0.0.1", r.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT | {"stream": stream}))
        wait_until(lambda: len(failing.seen) == 1)
        if mode == "pause":
            connection.getresponse().read1()
        connection.sock.close()
        connection.close()
        wait_until(lambda: failing.num_left == 1)
        wait_until(lambda: r.metric('kvferry:proxy_requests_total{outcome="client_gone"}') == 1)
        assert r.metric("kvferry:proxy_in_flight") == 0
        url = failing.url
        assert r.metric(f'kvferry:proxy_engine_in_flight{{role="{role}",url="{url}"}}') == 0
        failing.mode = "ok"
        assert r.client.completions.create(**ASK).choices[0].text == TEXT, "it is no failure of the engine"


def test_many_streams_at_once_of_which_some_are_left() -> None:
    seed, num_clients = 5, 100
    rng = random.Random(seed)
    leaving = {who for who in range(num_clients) if rng.random() < 0.3}

    async def one(client: openai.AsyncOpenAI, who: int) -> str:
        stream = await client.completions.create(**(ASK | {"prompt": f"{who % 7} " * 700}), stream=True)
        if who in leaving:
            await stream.close()
            return TEXT
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them(port: int) -> list[str]:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, who) for who in range(num_clients)))

    with running(num_prefill=2, num_decode=3) as r:
        assert set(asyncio.run(all_of_them(r.port))) == {TEXT}, f"seed {seed}"
        wait_until(lambda: r.metric("kvferry:proxy_in_flight") == 0)
        ended = {how: r.metric(f'kvferry:proxy_requests_total{{outcome="{how}"}}') for how in OUTCOMES}
        assert sum(ended.values()) == num_clients
        assert ended["ok"] >= num_clients - len(leaving)
        assert ended["ok"] + ended["client_gone"] == num_clients
        asked = r.num_asked()
        assert sum(asked[0]) == num_clients
        assert max(asked[1]) - min(asked[1]) <= num_clients // 4, "decoding is spread"
        for role, engines in (("prefill", r.prefill), ("decode", r.decode)):
            for one_engine in engines:
                assert r.metric(f'kvferry:proxy_engine_in_flight{{role="{role}",url="{one_engine.url}"}}') == 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (json.dumps(ASK | {"kv_transfer_params": {"remote_host": "evil"}}).encode(), 400, "only the proxy sets"),
        (b"x" * 3000, 413, "larger than 2000 bytes"),
    ],
)
def test_bodies_that_are_refused(body: bytes, status: int, message: str) -> None:
    with running(max_body_bytes=2000) as r:
        answer, _, content = r.http("POST", "/v1/completions", body)
        assert answer == status
        assert message in json.loads(content)["error"]["message"]
        assert r.num_asked() == ([0], [0])
        assert r.http("POST", "/v1/nowhere", b"{}")[0] == 404


def test_bodies_of_requests_under_way_have_a_budget() -> None:
    body = ASK | {"user": "u" * 3000}
    with running(max_held_body_bytes=5000) as r:
        r.decode[0].mode = "hang"
        waiting = socket.create_connection(("127.0.0.1", r.port), timeout=PATIENCE_S)
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        waiting.sendall(head.encode() + content)
        wait_until(lambda: len(r.decode[0].seen) == 1)
        status, headers, answer = r.http("POST", "/v1/completions", body)
        assert (status, headers["retry-after"], json.loads(answer)["error"]["code"]) == (503, "1", "overloaded")
        assert "--max-held-body-bytes" in json.loads(answer)["error"]["message"]
        assert r.metric('kvferry:proxy_requests_total{outcome="full"}') == 1
        r.decode[0].mode = "ok"
        assert r.http("POST", "/v1/completions", ASK)[0] == 200, "a small one has room"
        waiting.close()
        wait_until(lambda: r.metric("kvferry:proxy_in_flight") == 0)
        assert r.http("POST", "/v1/completions", body)[0] == 200
        assert r.http("POST", "/v1/completions", body | {"user": "u" * 9000})[0] == 200, "one alone is always taken"


def test_engines_cookies_do_not_go_to_other_clients() -> None:
    with running() as r:
        for _ in range(2):
            r.client.completions.create(**ASK)
        headers = r.prefill[0].headers + r.decode[0].headers
        assert len(headers) == 4
        assert not any("cookie" in one for one in headers)


@pytest.mark.parametrize("name", ["Authorization", "traceparent", "tracestate"])
def test_header_that_cannot_be_sent_on_is_the_clients_mistake(name: str) -> None:
    with running() as r:
        for method, path, body in (("POST", "/v1/completions", ASK), ("GET", "/v1/models", None)):
            for value in ("k=\xe9", "k=\x01"):
                status, _, content = r.http(method, path, body, {name: value})
                message = json.loads(content)["error"]["message"]
                assert (status, f"header {name.lower()} " in message, value in message) == (400, True, False)
            assert r.http(method, path, body, {name: "a=b,\tc=d"})[0] == 200
        assert r.num_asked() == ([1], [1])


def test_request_id_with_other_letters_is_not_taken() -> None:
    with running() as r:
        status, headers, _ = r.http("POST", "/v1/completions", ASK, {"X-Request-Id": "n\xe9"})
        assert status == 200
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])


@pytest.mark.parametrize("status", [200, 400, 500])
def test_engine_that_names_a_wrong_content_encoding_has_failed(status: int) -> None:
    async def answer(request: Request) -> Response:
        return PlainTextResponse("no gzip", status, {"Content-Encoding": "gzip"})

    with ExitStack() as stack:
        bound, front = (bind_socket("127.0.0.1", 0) for _ in range(2))
        stack.enter_context(serving(Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])]), bound))
        proxy = Proxy(ProxyConfig.parse({"prefill": [url_of(bound)], "decode": ["http://d:1"], **QUICK}))
        stack.enter_context(serving(proxy.app(), front))
        r = Running([], [], proxy, front.getsockname()[1])
        told, _, content = r.http("POST", "/v1/completions", ASK)
        message = json.loads(content)["error"]["message"]
        assert (told, f"prefill engine {url_of(bound)}" in message, "Content-Encoding" in message) == (502, True, True)


def test_url_of_an_engine_that_cannot_be_one_is_named() -> None:
    with running() as r:
        r.proxy.fleet.prefill[0].url = "http://ü..b:1"
        status, _, content = r.http("POST", "/v1/completions", ASK)
        assert (status, "http://ü..b:1" in json.loads(content)["error"]["message"]) == (502, True)


# ---- rotation and readiness -----------------------------------------------------------------------------------------


def test_engine_that_fails_is_left_alone_and_comes_back_by_a_probe() -> None:
    with running(num_prefill=2, probe_interval_s=0.05) as r:
        wait_until(lambda: r.http("GET", "/ready")[0] == 200)
        bad, good = r.prefill
        up = f'kvferry:proxy_engine_up{{role="prefill",url="{bad.url}"}}'
        bad.mode = "500"
        wait_until(lambda: r.metric(up) == 0)
        state = json.loads(r.http("GET", "/ready")[2])
        assert state["ready"]
        (told,) = [e for e in state["engines"] if e["url"] == bad.url]
        assert "it is 500" in told["last_failure"]
        bad.mode = "ok"
        wait_until(lambda: r.metric(up) == 1)
        assert r.client.completions.create(**ASK).choices[0].text == TEXT
        assert good.url != bad.url


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_engines_that_fail_one_request_and_answer_others_stay_in_rotation(role: str) -> None:
    with running(probe_interval_s=30, min_backoff_s=30, max_backoff_s=30) as r:
        wait_until(lambda: r.http("GET", "/ready")[0] == 200)
        engine = (r.prefill if role == "prefill" else r.decode)[0]
        engine.mode = "500 at times"
        for stream in (False, True, False):
            status, _, content = r.http("POST", "/v1/completions", ASK | {"prompt": "Bad", "stream": stream})
            assert (status, b"Internal server error" in content) == (502, True)
            assert r.client.completions.create(**ASK).choices[0].text == TEXT
            assert r.http("GET", "/ready")[0] == 200


def test_engine_that_fails_every_request_is_found_out_by_probes_as_soon_as_it_did() -> None:
    with running(probe_interval_s=3600) as r:
        wait_until(lambda: r.http("GET", "/ready")[0] == 200)
        r.prefill[0].mode = "500"
        assert r.http("POST", "/v1/completions", ASK)[0] in (502, 503)
        up = f'kvferry:proxy_engine_up{{role="prefill",url="{r.prefill[0].url}"}}'
        wait_until(lambda: r.metric(up) == 0)


def test_ready_means_transfers_work() -> None:
    with running(probe_interval_s=0.05) as r:
        wait_until(lambda: r.http("GET", "/ready")[0] == 200)
        pair = f'kvferry:proxy_pair_transfers{{decode="{r.decode[0].url}",prefill="{r.prefill[0].url}"}}'
        assert r.metric(pair) == 1
        for one, mode in ((r.decode[0], "recomputed"), (r.prefill[0], "no_params"), (r.decode[0], "503")):
            one.mode = mode
            wait_until(lambda: r.http("GET", "/ready")[0] == 503)
            assert r.http("GET", "/health")[0] == 200
            one.mode = "ok"
            wait_until(lambda: r.http("GET", "/ready")[0] == 200)
        assert r.metric('kvferry:proxy_leg_seconds_count{leg="prefill"}') == 0, "probes are nobody's requests"
        assert r.metric('kvferry:proxy_recomputed_total{reason="decode_engine"}') == 0


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "give its API key with --engine-key-file or --probe-key-file"),
        (400, "--probe-interval-s 0 switches probes off"),
    ],
)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_refused_probe_is_told_with_its_remedy_and_the_next_ones_go_on(role: str, status: int, remedy: str) -> None:
    with running() as r:
        refusing = (r.prefill if role == "prefill" else r.decode)[0]
        refusing.mode = str(status)
        told = f"a probe was refused by {role} engine {refusing.url}: {status} it is {status}: {remedy}"
        config = ProxyConfig.parse(
            {"prefill": [r.prefill[0].url], "decode": [r.decode[0].url], "probe_interval_s": 0.05}
        )
        bound = bind_socket("127.0.0.1", 0)
        with serving(Proxy(config).app(), bound):
            two = Running(r.prefill, r.decode, r.proxy, bound.getsockname()[1])
            wait_until(lambda: json.loads(two.http("GET", "/ready")[2])["pairs"][0].get("last_failure") == told)
            assert two.http("GET", "/ready")[0] == 503
            refusing.mode = "ok"
            wait_until(lambda: two.http("GET", "/ready")[0] == 200)
            refusing.mode = str(status)
            num_asked = len(refusing.seen)
            wait_until(lambda: len(refusing.seen) > num_asked + 1)
            assert two.http("GET", "/ready")[0] == 200, "it says nothing of transfers"


def test_engine_that_is_only_busy_stays_in_rotation() -> None:
    with running(probe_interval_s=0.05, probe_timeout_s=1.0) as r:
        wait_until(lambda: r.http("GET", "/ready")[0] == 200)
        r.prefill[0].mode = "hang"
        connection = http.client.HTTPConnection("127.0.0.1", r.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(ASK))
        busy = f'kvferry:proxy_engine_in_flight{{role="prefill",url="{r.prefill[0].url}"}}'
        wait_until(lambda: r.metric(busy) == 1)
        time.sleep(4.5)  # time for several probes that would have to wait
        assert r.http("GET", "/ready")[0] == 200
        connection.close()


def test_nobody_in_rotation_is_told_at_once() -> None:
    with running(min_backoff_s=30, max_backoff_s=30) as r:
        r.prefill[0].mode = "500"
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                r.client.completions.create(**ASK)
        num_asked = len(r.prefill[0].seen)
        assert num_asked == 3, "three failures in a row, and no fourth"
        status, headers, content = r.http("POST", "/v1/completions", ASK)
        error = json.loads(content)["error"]
        assert (status, error["code"], error["type"]) == (503, "no_engine", "server_error")
        assert r.prefill[0].url in error["message"]
        assert "it is 500" in error["message"]
        assert 0 < int(headers["retry-after"]) <= 30


def test_pair_that_does_not_transfer_is_named_with_the_reason() -> None:
    with running(num_prefill=2, min_backoff_s=30, max_backoff_s=30, failure_threshold=1, retry_deadline_s=0) as r:
        r.decode[0].mode = "500"  # as an engine answers whose load failed
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="it is 500"):
                r.client.completions.create(**ASK)
        assert r.metric(f'kvferry:proxy_engine_up{{role="decode",url="{r.decode[0].url}"}}') == 1, "it did answer"
        with pytest.raises(openai.InternalServerError) as caught:
            r.client.completions.create(**ASK)
        assert caught.value.status_code == 503
        for p in r.prefill:
            told = f"transfers from {p.url} to {r.decode[0].url} are out of rotation: status 500: it is 500"
            assert told in caught.value.message
        assert r.num_asked() == ([1, 1], [2])


def test_stopping_proxy_takes_nothing_new_and_is_not_ready() -> None:
    with running() as r:
        assert r.http("GET", "/ready")[0] == 200
        r.proxy.refuse_new("the server is stopping")
        status, headers, content = r.http("POST", "/v1/completions", ASK)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "stopping" in json.loads(content)["error"]["message"]
        assert r.http("GET", "/ready")[0] == 503
        assert r.http("GET", "/health")[0] == 200
