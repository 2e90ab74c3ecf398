"""The server as clients see it: the real `openai` client, many streams at once, and clients that misbehave."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, product
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tests import small_tokenizer
from tests.patience import PATIENCE_S
from typer.testing import CliRunner

from kvferry import LLM
from kvferry.cli.main import app as cli
from kvferry.errors import HostError
from kvferry.http import bind_socket
from kvferry.metrics import METRICS, Kind
from kvferry.server.run import ServerOptions, make_server, serve
from kvferry.testing.stub_model import StubModel

PROMPT = [(i * 31 + i * i) % 300 for i in range(70)]
CHAT = [{"role": "user", "content": "What is it?"}]


class GatedModel(StubModel):
    """A stub model whose forwards wait while the gate is closed, and take `pause_s` longer."""

    pause_s = 0.0

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None

    def forward(self, *arguments: Any) -> torch.Tensor:
        assert self.gate.wait(240)
        if self.fault is not None:
            raise self.fault
        time.sleep(self.pause_s)
        return super().forward(*arguments)


class Running:
    """A server in this process."""

    def __init__(self, model: GatedModel, port: int, server: Any) -> None:
        self.model = model
        self.port = port
        self.server = server
        url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=240)
        self.async_client = lambda: openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=240)

    def http(
        self, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.http("GET", "/metrics")[2].decode().splitlines() if not line.startswith("#")]
        found = {}
        for line in lines:
            series, _, value = line.rpartition(" ")
            found[re.sub(r'(model_name="[^"]*"|engine="0"),?', "", series).replace(",}", "}").replace("{}", "")] = (
                float(value)
            )
        return found

    def wait_for(self, name: str, value: float) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.metrics()[name] != value:
            assert time.monotonic() < deadline_s, f"{name} is {self.metrics()[name]}, not {value}"
            time.sleep(0.01)


@contextmanager
def running(*, transfer: Any = None, llm_settings: dict[str, Any] | None = None, **options: Any) -> Iterator[Running]:
    torch.set_num_threads(1)
    tokenizer = small_tokenizer.byte_level()
    model = GatedModel(vocab_size=len(tokenizer), max_model_len=4096)
    model.tokenizer = tokenizer
    settings = {"num_kv_blocks": 1200, "max_num_seqs": 64, "max_num_batched_tokens": 512, **(llm_settings or {})}
    llm = LLM(model, kv_transfer_config=transfer, **settings)
    listening = threading.Event()
    bound = bind_socket("127.0.0.1", 0)
    server = make_server(llm, ServerOptions(model_names=("stub", "alias"), **options), listening.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert listening.wait(120)
        yield Running(model, bound.getsockname()[1], server)
    finally:
        model.gate.set()
        server.should_exit = True
        thread.join(120)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One server for tests that leave no trace but cached blocks."""
    with running(max_body_bytes=100_000) as server:
        yield server


@pytest.fixture
def client(shared: Running) -> openai.OpenAI:
    return shared.client


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    model = StubModel(vocab_size=len(small_tokenizer.byte_level()))
    return model.expected_tokens(prompt, num_tokens)


# ---- what the client gets -----------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; this server has stub, alias") as caught:
        client.completions.create(model="other", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_completion_of_tokens_is_the_models_and_counts_cached_tokens(client: openai.OpenAI) -> None:
    prompt = [7, *PROMPT]
    for cached in (0, 64):
        reply = client.completions.create(
            model="stub", prompt=prompt, max_tokens=9, temperature=0, extra_body={"return_token_ids": True}
        )
        (choice,) = reply.choices
        assert choice.model_extra is not None
        assert choice.model_extra["token_ids"] == expected(prompt, 9)
        assert (choice.finish_reason, choice.index) == ("length", 0)
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (71, 9, 80)
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == cached


def test_streamed_and_whole_completions_agree(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "stub", "prompt": "the quick", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in client.completions.create(**request, stream=True))


def test_streamed_and_whole_chats_agree(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "stub", "messages": CHAT, "max_completion_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**request)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    tokenizer = small_tokenizer.byte_level()
    rendered = tokenizer("<|user|> What is it?\n<|assistant|> ")["input_ids"]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(rendered)
    text = tokenizer.decode(rendered + expected(rendered, 20), skip_special_tokens=True)
    assert whole.choices[0].message.content == text[len(tokenizer.decode(rendered)) :]
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " it?"}]}]
    again = client.chat.completions.create(**(request | {"messages": parts}))
    assert again.choices[0].message.content == whole.choices[0].message.content
    assert client.chat.completions.create(model="stub", messages=CHAT).choices[0].finish_reason == "length"  # type: ignore[list-item]


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="stub", prompt=[PROMPT[:5], PROMPT[:6]], n=2, seed=1, max_tokens=6, extra_body={"return_token_ids": True}
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 24)
    alone = client.completions.create(
        model="stub", prompt=PROMPT[:6], seed=2, max_tokens=6, extra_body={"return_token_ids": True}
    )
    assert alone.choices[0].model_extra == reply.choices[3].model_extra, "a choice is its seed's"
    assert reply.choices[2].model_extra != reply.choices[3].model_extra
    streamed = {index: [] for index in range(4)}
    for chunk in client.completions.create(
        model="stub", prompt=[PROMPT[:5], PROMPT[:6]], n=2, seed=1, max_tokens=6, stream=True,
        extra_body={"return_token_ids": True},
    ):  # fmt: skip
        assert chunk.choices[0].model_extra is not None
        streamed[chunk.choices[0].index] += chunk.choices[0].model_extra["token_ids"]
    assert streamed == {c.index: c.model_extra["token_ids"] for c in reply.choices if c.model_extra is not None}


def test_stop_string_and_logprobs(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "stub", "prompt": "the dog", "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**request).choices[0].text
    stop = next(text[i : i + 2] for i in range(8, 40) if text[i : i + 2].isascii())
    for stream in (False, True):
        reply = client.completions.create(**request, stop=["never", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        assert choices[-1].model_extra is not None
        assert choices[-1].model_extra["stop_reason"] == stop
    found = client.completions.create(**request, logprobs=1).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    # The stub's logits are 1 at the next token and 0 elsewhere.
    vocab_size = len(small_tokenizer.byte_level())
    likeliest = float(torch.log_softmax(torch.eye(1, vocab_size), dim=-1)[0, 0])
    assert found.token_logprobs == pytest.approx([likeliest] * 30)
    chat = client.chat.completions.create(
        model="stub",
        messages=CHAT,
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,  # type: ignore[list-item]
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [2, 2, 2]
    assert content[0].logprob == pytest.approx(likeliest)


def test_64_concurrent_streams_each_get_their_own(shared: Running) -> None:
    prompts = [[i, *PROMPT[: 10 + i]] for i in range(64)]

    async def one(client: openai.AsyncOpenAI, prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        stream = await client.completions.create(
            model="stub",
            prompt=prompt,
            max_tokens=20,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        async for chunk in stream:
            tokens += (chunk.choices[0].model_extra or {})["token_ids"]
        return tokens

    async def all_of_them() -> list[list[int]]:
        async with shared.async_client() as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    model = StubModel(vocab_size=shared.model.vocab_size)
    before = shared.metrics()["vllm:generation_tokens_total"]
    assert asyncio.run(all_of_them()) == [model.expected_tokens(prompt, 20) for prompt in prompts]
    assert shared.metrics()["vllm:generation_tokens_total"] == before + 64 * 20


def test_kv_transfer_params_and_salt_go_in_and_come_out() -> None:
    transfer = {
        "kv_connector": "EchoConnector", "kv_connector_module_path": "tests.e2e.echo_connector", "kv_role": "kv_both",
    }  # fmt: skip
    with running(transfer=transfer) as server:
        body = {"kv_transfer_params": {"do_remote_prefill": True}, "cache_salt": "tenant"}
        wanted = {"kv_transfer_params": {"echo": {"do_remote_prefill": True}, "salt": "tenant"}, "cache_salt": "tenant"}
        reply = server.client.completions.create(model="stub", prompt=PROMPT, max_tokens=2, extra_body=body)
        assert reply.model_extra == wanted
        chat = server.client.chat.completions.create(
            model="stub",
            messages=CHAT,
            max_tokens=2,
            extra_body=body,
            stream=True,  # type: ignore[arg-type]
        )
        assert list(chat)[-1].model_extra == wanted
        status, _, reply = server.http(
            "POST", "/v1/completions", '{"prompt": [1, 2], "max_tokens": 2, "kv_transfer_params": {"x": 1e999}}'
        )
        assert status == 200
        assert json.loads(reply)["kv_transfer_params"] is None, "the connector's infinity is no JSON"


def test_prompt_computed_again_is_told_in_the_reply_and_in_the_first_chunk(client: openai.OpenAI) -> None:
    prompt = [7 + i * 5 for i in range(40)]  # blocks of 16: nothing cached at first, then 32 tokens
    body = {"kv_transfer_params": {"do_remote_prefill": True, "remote_num_tokens": 40}}
    for num_recomputed in (39, 7):  # the last token is computed in any case
        reply = client.completions.create(model="stub", prompt=prompt, max_tokens=3, extra_body=body)
        assert reply.model_extra == {"kv_transfer_params": {"num_recomputed_tokens": num_recomputed}}
    stream = client.completions.create(model="stub", prompt=prompt, max_tokens=3, extra_body=body, stream=True)
    told = [(chunk.model_extra or {}).get("kv_transfer_params") for chunk in stream]
    assert told[0] == told[-1] == {"num_recomputed_tokens": 7}
    for params in ({"do_remote_prefill": False, "remote_num_tokens": 40}, {"do_remote_prefill": True}):
        reply = client.completions.create(
            model="stub", prompt=prompt, max_tokens=1, extra_body={"kv_transfer_params": params}
        )
        assert reply.model_extra == {"kv_transfer_params": None}


def test_second_request_is_loaded_by_the_connector() -> None:
    transfer = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 22, "weights_version": "1"},
    }  # fmt: skip
    with running(transfer=transfer) as server:
        cached = []
        for _ in range(2):
            reply = server.client.completions.create(model="stub", prompt=[*PROMPT, *PROMPT], max_tokens=2)
            assert reply.usage is not None
            assert reply.usage.prompt_tokens_details is not None
            cached.append(reply.usage.prompt_tokens_details.cached_tokens)
            deadline_s = time.monotonic() + PATIENCE_S
            while json.loads(server.http("POST", "/reset_prefix_cache")[2]) != {"success": True}:
                assert time.monotonic() < deadline_s
        assert cached == [0, 128]
        metrics = server.metrics()
        assert metrics["vllm:external_prefix_cache_hits_total"] == 128
        assert metrics['vllm:prompt_tokens_cached_by_source_total{source="host"}'] == 128
        host = '{connector="OffloadingConnector",medium="host"}'
        assert metrics[f"kvferry:connector_hit_tokens_total{host}"] == 128
        assert metrics[f"kvferry:connector_loads_total{host}"] == 2
        assert metrics[f"kvferry:connector_used_bytes{host}"] > 0
        assert metrics['kvferry:connector_fallbacks_total{connector="OffloadingConnector",reason="failed load"}'] == 0
        assert server.http("POST", "/reset_prefix_cache?reset_external=true")[0] == 200
        assert server.http("POST", "/reset_prefix_cache?reset_external=2")[0] == 400


def test_a_tier_that_is_down_is_named_and_the_server_stays_ready(tmp_path: Path) -> None:
    tier = {"type": "fs", "path": str(tmp_path / "kv")}
    extra = {"cpu_bytes_to_use": 1 << 22, "weights_version": "1", "secondary_tiers": [tier]}
    transfer = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra,
    }  # fmt: skip
    with running(transfer=transfer) as server:
        status, _, body = server.http("GET", "/ready")
        assert (status, json.loads(body)) == (200, {"degraded_tiers": []})
        (tmp_path / "kv").rename(tmp_path / "away")
        (tmp_path / "kv").write_text("a file is in the way")
        deadline_s = time.monotonic() + 60
        for i in count():
            prompt = [(7 * i + token) % 100 for token in range(80)]
            assert server.client.completions.create(model="stub", prompt=prompt, max_tokens=2).usage is not None
            status, _, body = server.http("GET", "/ready")
            assert status == 200
            if json.loads(body) == {"degraded_tiers": ["fs"]}:
                break
            assert time.monotonic() < deadline_s
        row = 'kvferry:tier_up{connector="OffloadingConnector",medium='
        metrics = server.metrics()
        assert (metrics[row + '"host"}'], metrics[row + '"fs"}']) == (1, 0)


# ---- metrics and health -------------------------------------------------------------------------------------------


def test_every_metric_is_there_from_the_start_and_counts() -> None:
    with running() as server:
        at_start = server.metrics()
        for metric in METRICS:
            suffix = {Kind.COUNTER: "_total", Kind.HISTOGRAM: "_count"}.get(metric.kind, "")
            for values in product(*metric.values):  # none where a label is open: there is no connector
                labels = ",".join(f'{label}="{value}"' for label, value in zip(metric.labels, values, strict=True))
                series = metric.name + suffix + (f"{{{labels}}}" if labels else "")
                assert at_start[series] == (1 if metric.name == "kvferry:engine_up" else 0), series
        for _ in range(2):
            server.client.completions.create(model="stub", prompt=PROMPT, max_tokens=5, temperature=0)
        server.wait_for('vllm:request_success_total{finished_reason="length"}', 2)
        found = server.metrics()
        assert found["vllm:prompt_tokens_total"] == 140
        assert found["vllm:prompt_tokens_cached_total"] == found["vllm:prefix_cache_hits_total"] == 64
        assert found['vllm:prompt_tokens_by_source_total{source="local_compute"}'] == 76
        assert found["vllm:generation_tokens_total"] == 10
        assert found["vllm:time_to_first_token_seconds_count"] == 2
        assert found["vllm:inter_token_latency_seconds_count"] == 8
        assert found["vllm:external_prefix_cache_queries_total"] == 0
        assert [server.http("GET", path)[0] for path in ("/health", "/ready")] == [200, 200]


def test_request_that_was_under_way_when_the_engine_failed_is_not_sent_again_by_openais_client() -> None:
    with running() as server:
        server.server.linger_s = 240.0
        server.model.fault = RuntimeError("the model broke")
        client = server.client.with_options(max_retries=openai.DEFAULT_MAX_RETRIES)
        with pytest.raises(openai.InternalServerError, match="the model broke") as caught:
            client.completions.create(model="stub", prompt=PROMPT)
        assert caught.value.code == "engine_ended", "that of the first try: a second one would find it unavailable"


@pytest.mark.parametrize("stream", [False, True])
def test_request_whose_logits_name_no_token_has_a_code_of_its_own(monkeypatch: Any, stream: bool) -> None:
    with running() as server:
        forward = server.model.forward
        monkeypatch.setattr(server.model, "forward", lambda *args: forward(*args).fill_(float("nan")))
        with pytest.raises(openai.APIError, match="no token can be chosen") as caught:
            list(server.client.completions.create(model="stub", prompt=PROMPT, stream=stream))
        assert caught.value.code == "no_token"
        assert server.http("GET", "/ready")[0] == 200


def test_engine_that_breaks_is_told_and_seen() -> None:
    with running() as server:
        server.server.linger_s = 240.0
        server.model.fault = RuntimeError("the model broke")
        for stream in (True, False):
            with pytest.raises(openai.APIError, match="engine failed: RuntimeError: the model broke") as caught:
                list(server.client.completions.create(model="stub", prompt=PROMPT, stream=stream))
            assert caught.value.code == ("engine_ended" if stream else "unavailable"), "the second one found it so"
        status, headers, body = server.http("GET", "/health")
        assert (status, headers["retry-after"]) == (503, "1")
        assert "the model broke" in json.loads(body)["error"]["message"]
        assert server.http("GET", "/ready")[0] == 503
        assert server.http("POST", "/reset_prefix_cache")[0] == 503
        assert server.metrics()["kvferry:engine_up"] == 0


def test_engine_that_breaks_ends_its_server_with_an_error() -> None:
    """A supervisor starts a new one; a server that only says 503 for ever would have to be found."""
    tokenizer = small_tokenizer.byte_level()
    model = GatedModel(vocab_size=len(tokenizer), max_model_len=4096)
    model.tokenizer = tokenizer
    model.fault = RuntimeError("the model broke")
    llm = LLM(model, num_kv_blocks=64)
    bound = bind_socket("127.0.0.1", 0)
    asking = threading.Thread(target=lambda: ask_and_fail(bound.getsockname()[1]))
    with bound, pytest.raises(HostError, match="engine failed: RuntimeError: the model broke"):
        serve(llm, ServerOptions(model_names=("stub",)), bound, asking.start)
    asking.join(PATIENCE_S)
    with pytest.raises(HostError, match=r"earlier step \(RuntimeError: the model broke\)"):
        llm.generate([1, 2, 3])


def ask_and_fail(port: int) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    with pytest.raises(openai.APIError, match="the model broke"):
        client.completions.create(model="stub", prompt=PROMPT)


# ---- clients that ask for too much, or leave ----------------------------------------------------------------------


def test_overload_is_refused_at_once_and_passes() -> None:
    with running(llm_settings={"max_num_seqs": 1}, max_queued_requests=1) as server:
        server.model.gate.clear()
        done: list[Any] = []

        def ask() -> None:
            done.append(server.client.completions.create(model="stub", prompt=PROMPT, max_tokens=2))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline_s = time.monotonic() + PATIENCE_S
        while server.http("GET", "/ready")[0] == 200:
            assert time.monotonic() < deadline_s
        with pytest.raises(openai.InternalServerError, match="at most 2") as caught:
            server.client.completions.create(model="stub", prompt=PROMPT)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.BadRequestError, match="3 choices at once"):
            server.client.completions.create(model="stub", prompt=PROMPT, n=3)
        server.model.gate.set()
        for thread in threads:
            thread.join(120)
        assert len(done) == 2
        assert server.metrics()['vllm:admission_rejections_total{reason="queue_full"}'] == 1
        server.client.completions.create(model="stub", prompt=PROMPT, max_tokens=2)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_place(shared: Running, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.model, "pause_s", 0.005)  # the request outlives a test that stands still for seconds
    before = shared.metrics()
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3900, "ignore_eos": True, "stream": stream})
    with socket.create_connection(("127.0.0.1", shared.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        if stream:
            connection.settimeout(120)
            received = b""
            while b'"text"' not in received:
                received += (piece := connection.recv(1000))
                assert piece, received
        else:
            shared.wait_for("vllm:num_requests_running", 1)
    shared.wait_for("vllm:num_requests_running", 0)
    aborts, gone = 'vllm:request_success_total{finished_reason="abort"}', "kvferry:client_disconnects_total"
    shared.wait_for(aborts, before[aborts] + 1)
    assert shared.metrics()[gone] == before[gone] + 1
    assert shared.metrics()["vllm:kv_cache_usage_perc"] == 0


BAD: list[tuple[str, str, Any, int, str]] = [
    ("not json", "completions", b"{", 400, "not valid JSON"),
    ("not utf-8", "completions", b'{"prompt": "\xff"}', 400, "not valid JSON"),
    ("deep", "completions", b"[" * 50_000, 400, "not valid JSON"),
    ("not an object", "completions", [1], 400, "must be a JSON object"),
    ("empty", "completions", b"", 400, "not valid JSON"),
    ("no prompt", "completions", {}, 400, "prompt"),
    ("empty prompt", "completions", {"prompt": []}, 400, "prompt=[] must not be empty"),
    ("empty tokens", "completions", {"prompt": [[]]}, 400, "the prompt is empty"),
    ("mixed prompt", "completions", {"prompt": [1, "a"]}, 400, "prompt"),
    ("float tokens", "completions", {"prompt": [1.5]}, 400, "prompt"),
    ("unknown token", "completions", {"prompt": [100_000]}, 400, "not a token id"),
    ("negative token", "completions", {"prompt": [-1]}, 400, "not a token id"),
    ("huge token", "completions", {"prompt": [10**30]}, 400, "not a token id"),
    ("too long", "completions", {"prompt": [1] * 5000}, 400, "max_model_len=4096"),
    ("lone surrogate", "completions", b'{"prompt": "\\ud800"}', 400, "surrogates not allowed"),
    ("bad salt", "completions", b'{"prompt": "a", "cache_salt": "\\ud800"}', 400, "surrogates"),
    ("empty salt", "completions", {"prompt": "a", "cache_salt": ""}, 400, "cache_salt"),
    ("params no object", "completions", {"prompt": "a", "kv_transfer_params": [1]}, 400, "kv_transfer_params"),
    ("typo", "completions", {"prompt": "a", "max_token": 3}, 400, "not supported (did you mean 'max_tokens'"),
    ("zero max_tokens", "completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0"),
    ("text max_tokens", "completions", {"prompt": "a", "max_tokens": "7"}, 400, "max_tokens"),
    ("temperature", "completions", {"prompt": "a", "temperature": -1}, 400, "temperature=-1"),
    ("nan", "completions", b'{"prompt": "a", "temperature": NaN}', 400, "NaN is no JSON"),
    ("top_p", "completions", {"prompt": "a", "top_p": 2}, 400, "top_p=2"),
    ("penalty", "completions", {"prompt": "a", "presence_penalty": 9}, 400, "presence_penalty=9"),
    ("n", "completions", {"prompt": "a", "n": 0}, 400, "n"),
    ("many", "completions", {"prompt": ["a"] * 50, "n": 50}, 400, "2500 choices"),
    ("logprobs", "completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs=21"),
    ("stop", "completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
    ("echo", "completions", {"prompt": "a", "echo": True}, 400, "echo"),
    ("bias", "completions", {"prompt": "a", "logit_bias": {"1": 5}}, 400, "logit_bias"),
    ("stream options", "completions", {"prompt": "a", "stream_options": {"x": 1}}, 400, "stream_options.x"),
    ("model type", "completions", {"prompt": "a", "model": 7}, 400, "model"),
    ("no messages", "chat/completions", {"messages": []}, 400, "messages"),
    ("messages text", "chat/completions", {"messages": "hi"}, 400, "messages"),
    ("no content", "chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ("image", "chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages.0"),
    ("role", "chat/completions", {"messages": [{"role": "x", "content": "a"}]}, 400, "chat template refuses"),
    ("tools", "chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools"),
    ("format", "chat/completions", {"messages": CHAT, "response_format": {"type": "x"}}, 400, "response_format"),
    ("top_logprobs", "chat/completions", {"messages": CHAT, "top_logprobs": 3}, 400, "top_logprobs=3"),
    ("large", "completions", {"prompt": "a" * 200_000}, 413, "larger than 100000 bytes"),
    ("nowhere", "nothing", {}, 404, "Not Found"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "text"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_malformed_requests_get_openai_errors(shared: Running, path: str, body: Any, status: int, text: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body)
    got, _, reply = shared.http("POST", f"/v1/{path}", data, {"Content-Type": "application/json"})
    assert got == status, reply
    error = json.loads(reply)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert text in error["message"]
    assert error["type"] == "invalid_request_error"
    if "=" in text and "max_model_len" not in text and "prompt=" not in text:
        assert error["param"] == text.split("=")[0]


def test_wrong_methods_and_broken_http(shared: Running) -> None:
    for method, path in (("GET", "/v1/completions"), ("PUT", "/v1/chat/completions"), ("POST", "/v1/models")):
        status, _, reply = shared.http(method, path)
        assert status == 405
        assert json.loads(reply)["error"]["type"] == "invalid_request_error"
    for broken in (b"\x00\x01\x02\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", shared.port)) as connection:
            connection.sendall(broken)
            connection.settimeout(120)
            assert b" 400 " in connection.recv(1000)
    with socket.create_connection(("127.0.0.1", shared.port)) as connection:  # promises more than it sends
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    with socket.create_connection(("127.0.0.1", shared.port)) as connection, suppress(ConnectionError):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(60):
            connection.sendall(b"800\r\n" + b" " * 2048 + b"\r\n")
        connection.settimeout(120)
        assert b" 413 " in connection.recv(1000)
    assert shared.http("GET", "/health")[0] == 200


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_requests_leaves_a_working_server(shared: Running, seed: int) -> None:
    """Random fields with random values: each reply is a completion or an OpenAI error, never a 500."""
    print("seed", seed)
    rng = random.Random(seed)
    values: list[Callable[[], Any]] = [
        lambda: rng.randint(-3, 40), lambda: rng.uniform(-1, 3), lambda: None, lambda: rng.random() < 0.5,
        lambda: "text", lambda: ["a", "b"], list, dict, lambda: [1, 2, 3], lambda: {"x": [None]},
    ]  # fmt: skip
    fields = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "n", "logprobs", "stop_token_ids",
              "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "skip_special_tokens",
              "cache_salt", "kv_transfer_params", "user", "return_token_ids", "stream"]  # fmt: skip
    statuses = set()
    for _ in range(60):
        body = {"prompt": rng.choice(["the dog", [1, 2, 3], ["a", "b"]]), "max_tokens": 5}
        for name in rng.sample(fields, rng.randint(1, 4)):
            body[name] = rng.choice(values)()
        status, _, reply = shared.http("POST", "/v1/completions", json.dumps(body))
        assert status in (200, 400), (body, reply)
        if status == 400:
            assert "message" in json.loads(reply)["error"]
        statuses.add(status)
    assert statuses == {200, 400}
    shared.wait_for("vllm:num_requests_running", 0)


# ---- explanations -------------------------------------------------------------------------------------------------


def test_clients_learn_why_their_prefix_was_a_hit() -> None:
    transfer = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 22, "weights_version": "1"},
    }  # fmt: skip
    with running(transfer=transfer, llm_settings={"explain_requests": True}) as server:
        prompt = [*PROMPT, *PROMPT]
        first = server.client.completions.create(model="stub", prompt=prompt, max_tokens=2)
        deadline_s = time.monotonic() + PATIENCE_S
        while json.loads(server.http("POST", "/reset_prefix_cache")[2]) != {"success": True}:
            assert time.monotonic() < deadline_s
        second = server.client.completions.create(model="stub", prompt=prompt, max_tokens=2)
        ranges = []
        for reply in (first, second):
            status, _, body = server.http("GET", f"/debug/requests/{reply.id}")
            assert status == 200
            explained = json.loads(body)
            assert explained["id"] == explained["requests"][0]["request_id"] == reply.id
            ranges.append([(r["tokens"], r["place"], r["loaded"]) for r in explained["requests"][0]["ranges"]])
        assert ranges == [
            [([0, 128], "nowhere", False), ([128, 140], "nowhere", False)],
            [([0, 128], "host", True), ([128, 140], "nowhere", False)],
        ]
        url = f"http://127.0.0.1:{server.port}"
        shown = CliRunner().invoke(cli, ["explain", second.id, "--url", url], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        for text in (
            "finished (length)",
            "loaded 128 from host, 12 to compute",
            "in host memory",
            "less than one chunk",
        ):
            assert text in shown.output
        asked = json.loads(CliRunner().invoke(cli, ["explain", second.id, "--url", f"{url}/v1", "--json"]).output)
        assert asked == json.loads(server.http("GET", f"/debug/requests/{second.id}")[2])
        with pytest.raises(HostError, match="no request 'cmpl-0'"):
            CliRunner().invoke(cli, ["explain", "cmpl-0", "--url", url], catch_exceptions=False)


def test_live_requests_choices_and_unknown_ids() -> None:
    with running(llm_settings={"explain_requests": True}) as server:
        server.model.pause_s = 0.005  # the request outlives a test that stands still for seconds
        stream = server.client.completions.create(
            model="stub", prompt=[PROMPT, PROMPT[:9]], max_tokens=2000, temperature=0, stream=True
        )
        reply_id = next(iter(stream)).id
        live = json.loads(server.http("GET", "/debug/requests")[2])["requests"]
        assert [request["request_id"] for request in live] == [f"{reply_id}-0", f"{reply_id}-1"]
        assert {request["state"] for request in live} == {"running"}
        both = json.loads(server.http("GET", f"/debug/requests/{reply_id}")[2])["requests"]
        assert [request["tokens"]["prompt"] for request in both] == [70, 9]
        one = json.loads(server.http("GET", f"/debug/requests/{reply_id}-1")[2])["requests"]
        assert [request["tokens"]["prompt"] for request in one] == [9]
        stream.close()
        status, _, body = server.http("GET", "/debug/requests/cmpl-unknown")
        error = json.loads(body)["error"]
        assert (status, error["code"], error["param"]) == (404, "request_not_found", "id")
        assert "no request 'cmpl-unknown'" in error["message"]
