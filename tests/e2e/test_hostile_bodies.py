"""Bodies that nobody honest sends: each is refused by name, none costs other clients more than a moment."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_server import CHAT, PROMPT, Running, expected, running

from kvferry.http import bind_socket, url_of
from kvferry.proxy.app import Proxy, make_server
from kvferry.proxy.config import ProxyConfig
from kvferry.server.protocol import ChatBody, CompletionBody

P2P = {
    "kv_connector": "P2PConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail",
    "kv_connector_extra_config": {"transport": "shm", "weights_version": "1"},
}  # fmt: skip
HAND_OVER = {
    "do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 9, "remote_lease_id": "a" * 32,
    "remote_generation": "b" * 32, "remote_num_tokens": 70, "transfer_id": "t", "transfer_mode": "pull",
    "remote_first_token_ids": [1], "peer_token": "x", "remote_engine_id": "e", "remote_block_ids": [[1]],
    "remote_request_id": "r", "remote_prefill_cached_tokens": 0, "remote_prompt_digest": "d",
}  # fmt: skip
NASTY = [
    b"null", b"true", b"0", b"-1", b"1.5", b"1e999", b"1" + b"0" * 400, b"9" * 5000, b"NaN", b"-Infinity", b'""',
    b'"\\ud800"', b'"\xed\xa0\x80"', b'["\xed\xa0\xbd"]', b'{"\\udfff": 1}', b'"\xff"', b'"\\u0000"',
    b'"' + b"x" * 3000 + b'"', '"\u0661\u0662"'.encode(), b"[]", b"[[]]", b"[null]", b"[true, 1]", b"[-1]", b"[1e30]",
    b'["a", 1]', b"{}", b'{"": null}', b'{"a": {"b": []}}', b"[" * 300 + b"]" * 300, b"[" * 60_000,
    b'[{"role": 1}]', b'[{"role": "user", "content": [null]}]', b"[[1], [null]]",
]  # fmt: skip
CENTRAL = ("prompt", "messages", "stop", "cache_salt", "kv_transfer_params")  # each gets each value, others a third
HONEST_S = 20.0  # two busy cores; the attacks took 12 to 238 s


def honest(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    status, _, reply = server.http("POST", "/v1/completions", json.dumps(body))
    assert status == 200, reply
    assert json.loads(reply)["choices"][0]["token_ids"] == expected(PROMPT, 3)


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with running(transfer=P2P) as server:
        yield server


@contextmanager
def proxied(engine: Running) -> Iterator[int]:
    """A proxy that lets one decode engine do everything; its port. The prefill engine is away."""
    urls = {"prefill": ["http://127.0.0.1:9"], "decode": [f"http://127.0.0.1:{engine.port}"]}
    config = ProxyConfig.parse({**urls, "strict": False, "probe_interval_s": 0, "retry_deadline_s": 240.0})
    listening = threading.Event()
    with bind_socket("127.0.0.1", 0) as bound:
        server = make_server(Proxy(config), listening.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert listening.wait(120)
            yield int(url_of(bound).rpartition(":")[2])
        finally:
            server.should_exit = True
            thread.join(120)


def fields_of_both() -> set[str]:
    return CompletionBody.model_fields.keys() & ChatBody.model_fields.keys() - {"logprobs"}


def bodies(kind: str) -> Iterator[tuple[str, bytes]]:
    """(field that is wrong, body): fields with nasty values, also twice; other fields as they should be."""
    start = {"prompt": [1, 2], "max_tokens": 1} if kind == "completions" else {"messages": CHAT, "max_tokens": 1}
    fields = (
        set(CompletionBody.model_fields) if kind == "completions" else ChatBody.model_fields.keys() - fields_of_both()
    )
    for index, name in enumerate((*sorted(fields), "unknown")):
        rest = json.dumps({key: value for key, value in start.items() if key != name})[1:-1].encode()
        for value in NASTY if name in CENTRAL else NASTY[index % 3 :: 3]:
            yield name, b'{%s, "%s": %s}' % (rest, name.encode(), value)
        yield name, b'{%s, "%s": 1, "%s": [null]}' % (rest, name.encode(), name.encode())


def hand_overs() -> Iterator[tuple[str, bytes]]:
    for name in HAND_OVER:
        fields = {key: value for key, value in HAND_OVER.items() if key not in (name, "remote_port")}
        # Without a port nobody is asked: what is wrong is found before.
        yield (
            "kv_transfer_params",
            json.dumps({"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": fields}).encode(),
        )
        inner = json.dumps({key: value for key, value in HAND_OVER.items() if key != name})[1:-1].encode()
        if name in ("remote_host", "remote_port", "transfer_mode", "remote_num_tokens", "remote_lease_id"):
            for value in NASTY:
                if value != b"null" or name in ("remote_host", "remote_port", "remote_lease_id"):
                    yield (
                        "kv_transfer_params",
                        b'{"prompt": [1, 2], "max_tokens": 1, "kv_transfer_params": {%s, "%s": %s}}'
                        % (inner, name.encode(), value),
                    )


def send_all(port: int, path: str, cases: Iterator[tuple[str, bytes]]) -> set[int]:
    """The statuses; each refusal has OpenAI's form and names the field, where the body can be read at all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
    statuses, wrong = set(), []
    for name, body in cases:
        connection.request("POST", f"/v1/{path}", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        reply = response.read()
        if response.status >= 500:
            wrong.append((name, body[:300], reply))
            continue
        statuses.add(response.status)
        if response.status != 200:
            error = json.loads(reply)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(error["message"]) < 1100
            is_named = error["param"] == name or name in error["message"]
            if not is_named and "not valid JSON" not in error["message"]:
                wrong.append((name, body[:300], reply))
    connection.close()
    assert not wrong
    return statuses


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_no_value_of_any_field_is_answered_with_a_fault_of_the_server(engine: Running, kind: str) -> None:
    assert {200, 400} <= send_all(engine.port, kind, bodies(kind))
    honest(engine)


def test_malformed_hand_overs_are_the_clients_mistake(engine: Running) -> None:
    assert 400 in send_all(engine.port, "completions", hand_overs())
    honest(engine)


def test_the_same_through_the_proxy(engine: Running) -> None:
    names = ("prompt", "messages", "stop", "stop_token_ids", "n", "stream", "max_tokens", "kv_transfer_params")
    statuses: set[int] = set()
    with proxied(engine) as port:
        for kind in ("completions", "chat/completions"):
            statuses |= send_all(port, kind, ((name, body) for name, body in bodies(kind) if name in names))
    assert {200, 400} <= statuses
    honest(engine)


# ---- bodies that would cost others --------------------------------------------------------------------------------

NULLS = b"[" + b"null," * 1_600_000 + b"null]"
ATTACKS: dict[str, tuple[str, bytes, str]] = {
    "nulls in prompt": ("completions", b'{"prompt": ' + NULLS + b"}", "prompt"),
    "nulls in stop": ("completions", b'{"prompt": [1], "stop": ' + NULLS + b"}", "stop"),
    "nulls in messages": ("chat/completions", b'{"messages": ' + NULLS + b"}", "messages"),
    "nulls in content": (
        "chat/completions", b'{"messages": [{"role": "user", "content": ' + NULLS + b"}]}", "messages",
    ),
    "nulls among token ids": ("completions", b'{"prompt": [[' + b"1," * 4000 + b"null]]}", "prompt"),
    "lists": ("completions", b'{"prompt": [' + b"[]," * 2_700_000 + b"[]]}", "brackets"),
    "unknown fields": (
        "completions", b'{"prompt": [1]' + b"".join(b',"%d":0' % i for i in range(600_000)) + b"}", "not supported",
    ),
    "stop strings": ("completions", json.dumps({"prompt": [1], "stop": ["ab"] * 50_000}).encode(), "stop"),
    "choices with stops": (
        "completions", json.dumps({"prompt": [1], "n": 64, "stop": [f"s{i}" for i in range(100_000)]}).encode(), "stop",
    ),
    "stop token ids": (
        "completions", json.dumps({"prompt": [1], "stop_token_ids": [5] * 1_000_000}).encode(), "stop_token_ids",
    ),
    "long stop string": ("completions", json.dumps({"prompt": [1], "stop": "a" * 7_000_000}).encode(), "stop"),
    "long salt": ("completions", json.dumps({"prompt": [1], "cache_salt": "a" * 7_000_000}).encode(), "cache_salt"),
    "long text": ("completions", json.dumps({"prompt": "words and " * 700_000}).encode(), "prompt"),
    "long chat": (
        "chat/completions", json.dumps({"messages": [{"role": "user", "content": "a " * 3_500_000}]}).encode(),
        "messages",
    ),
    "many prompts": ("completions", b'{"prompt": [' + b'"",' * 2_500_000 + b'""]}', "choices at once"),
    "large model name": ("completions", json.dumps({"prompt": [1], "model": "m" * 7_000_000}).encode(), "model"),
}  # fmt: skip


def attack(port: int, engine: Running, path: str, body: bytes) -> tuple[int, Any, float]:
    """Status and error of the attack, and the longest that an honest request took while it was under way."""
    worst_s, done = 0.0, threading.Event()

    def ask_on() -> None:
        nonlocal worst_s
        while not done.is_set():
            begun_s = time.monotonic()
            honest(engine)
            worst_s = max(worst_s, time.monotonic() - begun_s)

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("POST", f"/v1/{path}", body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())["error"], worst_s
    finally:
        done.set()
        asking.join(300)
        connection.close()


@pytest.mark.parametrize(("path", "body", "names"), ATTACKS.values(), ids=ATTACKS)
def test_an_honest_client_does_not_wait_for_a_hostile_one(engine: Running, path: str, body: bytes, names: str) -> None:
    assert len(body) <= 8 << 20, "a larger one is refused for its size"
    status, error, worst_s = attack(engine.port, engine, path, body)
    assert status in (400, 404), error
    assert names in error["message"]
    assert worst_s < HONEST_S
    honest(engine)


@pytest.mark.parametrize("name", ["nulls in prompt", "nulls in messages", "nulls in stop", "lists", "stop strings"])
def test_the_proxy_refuses_it_too(engine: Running, name: str) -> None:
    path, body, names = ATTACKS[name]
    with proxied(engine) as port:
        begun_s = time.monotonic()
        status, error, worst_s = attack(port, engine, path, body)
        assert status == 400
        assert names in error["message"]
        assert max(worst_s, time.monotonic() - begun_s) < HONEST_S
