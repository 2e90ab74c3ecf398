"""`kvferry proxy` before two `vllm serve` as the guide configures them, once over shared memory and once over NIXL."""

from __future__ import annotations

import json
import re
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from engine_process import PATIENT, assert_same_tokens, vllm_environment
from tests.patience import PATIENCE_S, wait_until
from vllm_server import START_S, Server, complete

from kvferry.p2p.wire import Address, sign_peer

PROMPT = [(i * i * 31 + i * 7) % 40000 + 100 for i in range(203)]
PAGE = "The ferry leaves the harbour at noon, and comes back before the sun goes down over the hills. " * 9
KEY = "of all engines and the proxy"
GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "disaggregation.md").read_text()
KVFERRY = str(Path(sys.executable).parent / "kvferry")

pytestmark = pytest.mark.timeout(1500)


def start(model: str, folder: Path, number: int, transport: str, **more: str) -> Server:
    """The guide's first or second vLLM engine, on this machine; it may use this transport."""
    texts = [text for text in re.findall(r"(?ms)^```json\n(.*?)^```", GUIDE) if "kvferry.vllm" in text]
    transfer = json.loads(texts[number].replace("10.0.0.1", "127.0.0.1")) | more
    key_file = folder / transfer["kv_connector_extra_config"]["key_file"]
    key_file.write_text(KEY)
    transfer["kv_connector_extra_config"] |= {**PATIENT, "key_file": str(key_file), "transport": transport}
    command = shlex.split(re.findall(r"(?m)^vllm serve MODEL .*$", GUIDE)[number].replace("MODEL", model))
    assert command[-2:] == ["--kv-transfer-config", f"$(cat {('prefill.json', 'decode.json')[number]})"]
    return Server([*command[:-1], json.dumps(transfer), "--num-gpu-blocks-override", "128"], folder / "log")


@pytest.fixture(scope="module")
def prefill(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An engine with both transports; perhaps not up yet."""
    server = start(model_folder, tmp_path_factory.mktemp("prefill"), 0, "auto")
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["nixl", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def decode(
    prefill: Server, transport: str, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """An engine with one transport."""
    folder = tmp_path_factory.mktemp("decode")
    server = start(model_folder, folder, 1, transport, kv_load_failure_policy="recompute")
    try:
        prefill.wait_until_up()
        server.wait_until_up()
        yield server
    finally:
        server.stop()


@contextmanager
def proxying(prefill_url: str, decode_url: str, key_file: Path, *options: str) -> Iterator[str]:
    """URL of a proxy that has seen a transfer work, unless `options` keep it from looking."""
    command = [KVFERRY, "proxy", "--port", "0", "--prefill", prefill_url, "--decode", decode_url, *options]
    command += ["--shared-key-file", str(key_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=vllm_environment()) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], PATIENCE_S)[0], "the proxy did not start"
            found = re.search(r"on (http://\S+)$", process.stdout.readline())
            assert found
            ready = f"{found[1]}/ready"
            wait_until("transfers work", lambda: httpx2.get(ready, timeout=PATIENCE_S).status_code == 200, START_S)
            yield found[1]
        finally:
            process.kill()


def key_of(server: Server) -> Path:
    return server.folder / "kvferry.key"


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def token_bytes(model: str) -> int:
    """K and V of one token in float32."""
    config = json.loads((Path(model) / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 2 * 4)


def loaded_bytes(server: Server) -> dict[str, float]:
    """By transport, what /metrics says."""
    rows = server.connector_rows("P2PConnector")
    return {name.split()[1]: value for name, value in rows.items() if name.startswith("loaded_bytes_total ") and value}


def recomputed(proxy_url: str) -> dict[str, float]:
    """Why prompts were computed again, and how many."""
    text = httpx2.get(f"{proxy_url}/metrics", timeout=PATIENCE_S).text
    rows = re.findall(r'^kvferry:proxy_recomputed_total{reason="(\w+)"} (\S+)$', text, re.MULTILINE)
    assert len(rows) >= 4, "every reason has a row"
    return {reason: float(value) for reason, value in rows if float(value)}


def streamed(client: openai.OpenAI, prompt: str, max_tokens: int) -> list[str]:
    """The pieces of text of a stream, empty ones left out."""
    with client.completions.create(
        model="small", prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        return [choice.text for chunk in stream for choice in chunk.choices if choice.text]


def assert_it_streams(client: openai.OpenAI, decode: Server) -> None:
    """The first text comes before the last token is made: nobody between engine and client keeps the answer back."""
    before = decode.counter("generation_tokens")
    with client.completions.create(
        model="small", prompt=PAGE, max_tokens=1500, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert next(choice.text for chunk in stream for choice in chunk.choices if choice.text)
        assert 0 < decode.counter("generation_tokens") - before < 1500


def test_behind_the_proxy(prefill: Server, decode: Server, transport: str, model_folder: str) -> None:
    local = complete(prefill.client, PROMPT)
    words = prefill.client.completions.create(
        model="small", prompt=PAGE, max_tokens=12, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    assert words.usage is not None
    num_bytes = token_bytes(model_folder)
    # One probe of 64 tokens makes it ready, and no second one comes in between.
    with proxying(
        prefill.url, decode.url, key_of(decode), "--probe-interval-s", "3600", "--probe-timeout-s", str(PATIENCE_S)
    ) as url:
        client, hits = client_of(url), decode.counter("external_prefix_cache_hits")
        wait_until("the probe is counted", lambda: loaded_bytes(decode) == {transport: 64 * num_bytes})
        assert hits == 64
        routed = complete(client, PROMPT)
        assert_same_tokens(routed, local)
        assert routed["text"] == local["text"]
        wait_until("the load is counted", lambda: loaded_bytes(decode) == {transport: (64 + 203) * num_bytes})
        assert decode.counter("external_prefix_cache_hits") - hits == 203

        assert "".join(streamed(client, PAGE, max_tokens=12)) == words.choices[0].text
        num_tokens = 64 + 203 + words.usage.prompt_tokens
        wait_until("the load is counted", lambda: loaded_bytes(decode) == {transport: num_tokens * num_bytes})
        assert_it_streams(client, decode)
        assert recomputed(url) == {}
    prefill.reset(external=False)  # no block is held
    decode.reset(external=False)


class StalePrefill(BaseHTTPRequestHandler):
    """A prefill engine that has forgotten what it says it has."""

    params: dict[str, Any]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"index": 0, "text": "x"}], "kv_transfer_params": self.params}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def stale_prefill(params: dict[str, Any]) -> Iterator[str]:
    handler = type("Handler", (StalePrefill,), {"params": params})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def post(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert reply.status_code == 200, reply.text
    content: dict[str, Any] = reply.json()
    return content


def test_a_second_prefill_is_not_silent(prefill: Server, decode: Server) -> None:
    """The decode engine computes what it could not load, and tells it: strict, the proxy answers an error."""
    prompt = PROMPT[::-1]
    request = {"model": "small", "prompt": prompt, "max_tokens": 1}
    params = post(prefill, {**request, "kv_transfer_params": {"do_remote_decode": True}})["kv_transfer_params"]
    address = Address(params["remote_host"], params["remote_port"])
    signed = {"transfer_id": "one", "peer_token": sign_peer(KEY, address, "one", int(time.time()) + 500)}
    assert post(decode, {**request, "kv_transfer_params": params | signed})["kv_transfer_params"] is None
    decode.reset(external=False)
    with stale_prefill(params) as url:  # the hand-over is spent
        with (
            proxying(url, decode.url, key_of(decode), "--probe-interval-s", "0", "--max-attempts", "1") as strict,
            pytest.raises(openai.APIStatusError, match="computed 202 prompt tokens again") as caught,
        ):
            complete(client_of(strict), prompt)
        assert caught.value.status_code == 502
        decode.reset(external=False)
        with proxying(url, decode.url, key_of(decode), "--probe-interval-s", "0", "--no-strict") as lenient:
            assert_same_tokens(complete(client_of(lenient), prompt), complete(prefill.client, prompt))
            assert recomputed(lenient) == {"decode_engine": 1}
