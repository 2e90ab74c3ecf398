"""`kvferry proxy` before real `kvferry serve` engines that hand KV over through shared memory, all real processes.

Two prefill and two decode engines share a key. KV of the first one is pulled, the second one pushes it. `open_decode`
takes KV from any engine of this machine, and computes a prompt when that fails; `closed_decode` takes it only from whom
the proxy has signed, and fails.
"""

from __future__ import annotations

import http.client
import json
import re
import select
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tests.e2e.fake_engine import FakeEngine
from tests.e2e.fake_engine import serving as serving_app
from tests.e2e.test_serve import KVFERRY, NAMED, ROOT, model_folder, run_python, serving

from kvferry.http import bind_socket, url_of
from kvferry.p2p.wire import Address, sign_peer

__all__ = ["model_folder"]  # a fixture
pytestmark = pytest.mark.timeout(900)  # many processes, and CI machines that are busy
GUIDE = ROOT / "docs" / "guides" / "disaggregation.md"
TRANSFER = "--kv-transfer-config"
HANDSHAKE_S = 30.0
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, head size, float32
BLOCK_TOKENS = 16
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24}


def prompt_of(seed: int, num_tokens: int = 300) -> list[int]:
    return [2 + (i * 31 + i * i * seed + seed) % 250 for i in range(num_tokens)]


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


@dataclass
class Engine:
    """A `kvferry serve`, or the proxy, as clients and operators see it."""

    client: openai.OpenAI

    @property
    def url(self) -> str:
        return str(self.client.base_url).removesuffix("/v1/")

    def figures(self, *names: str, **labels: str) -> list[float]:
        """Per metric the sum of its series that bear these labels."""
        marks = [f'{label}="{value}"' for label, value in labels.items()]
        sums = dict.fromkeys(names, 0.0)
        for line in httpx2.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            name = re.split(r"[{ ]", line)[0]
            if name in sums and all(mark in line for mark in marks):
                sums[name] += float(line.rpartition(" ")[2])
        return list(sums.values())

    def figure(self, name: str, **labels: str) -> float:
        return self.figures(name, **labels)[0]

    def prefilled_and_moved(self) -> tuple[float, float]:
        """Prompt tokens that were computed here, and bytes that this engine moved to another or from there."""
        moved = self.figures(*(f"kvferry:connector_{name}_bytes_total" for name in ("loaded", "stored")), medium="shm")
        return self.figure("vllm:prompt_tokens_by_source_total", source="local_compute"), sum(moved)

    def is_idle(self) -> bool:
        """No request, no block in use, by whom ever."""
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        held = ("kvferry:held_blocks", "kvferry:connector_held_blocks")
        return not any(self.figures(*gauges, *held))


@dataclass
class Cluster:
    prefill: list[Engine]
    open_decode: Engine
    closed_decode: Engine
    key_file: Path

    @property
    def key(self) -> str:
        return self.key_file.read_text().strip()

    @property
    def engines(self) -> list[Engine]:
        return [*self.prefill, self.open_decode, self.closed_decode]


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def transfer(role: str, policy: str = "fail", **extra: Any) -> tuple[str, str]:
    config = {
        "kv_connector": "P2PConnector", "kv_role": role, "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"transport": "shm", "handshake_s": HANDSHAKE_S, **extra},
    }  # fmt: skip
    return TRANSFER, json.dumps(config)


# ---- what the guide says ---------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def commands(start: str) -> list[str]:
    """The guide's commands that begin so."""
    return [block.strip() for block in blocks("console") if block.startswith(start)]


def two_machines(key_file: Path, model: Path) -> list[tuple[str, ...]]:
    """Arguments of the guide's engines on two machines; both are this one, and shared memory serves for NIXL."""
    files = dict(zip(("prefill.json", "decode.json"), blocks("json"), strict=False))
    arguments = []
    for command in commands("kvferry serve MODEL"):
        _, _, _, _, host, _, port, name, value = shlex.split(command)
        assert (host, port, name) in (("10.0.0.1", "8001", TRANSFER), ("10.0.0.2", "8002", TRANSFER))
        found = re.fullmatch(r"\$\(cat (\S+)\)", value)
        assert found
        config = json.loads(files[found[1]].replace("10.0.0.1", "127.0.0.1"))
        assert config["kv_connector_extra_config"]["key_file"] == key_file.name
        config["kv_connector_extra_config"] |= {"key_file": str(key_file), "handshake_s": HANDSHAKE_S}
        arguments.append((str(model), TRANSFER, json.dumps(config), *NAMED))
    return arguments


@contextmanager
def started(*arguments: tuple[str, ...]) -> Iterator[list[Engine]]:
    """Several `kvferry serve`, started at the same time."""
    managers = [serving(model, *rest) for model, *rest in arguments]
    with ExitStack() as stack, ThreadPoolExecutor(len(managers)) as pool:
        for manager in managers:
            stack.push(manager)
        clients = [client for _, client in pool.map(lambda manager: manager.__enter__(), managers)]
        for client in clients:
            stack.callback(client.close)
        yield [Engine(client) for client in clients]


V2 = "--use-v2-model-runner"


@pytest.fixture(scope="module")
def cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The prefill engine that pushes, and one of the two decode engines, run the second model runner."""
    folder = tmp_path_factory.mktemp("key")
    subprocess.run(["bash", "-c", *commands("openssl rand")], cwd=folder, check=True)
    key_file = folder / "kvferry.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    first, closed = two_machines(key_file, model_folder)
    key = {"key_file": str(key_file)}
    second = (str(model_folder), *transfer("kv_producer", **key, mode="push"), *NAMED, V2)
    opened = (str(model_folder), *transfer("kv_consumer", "recompute", **key), *NAMED, V2)
    with started(first, second, opened, closed) as engines:
        yield Cluster(engines[:2], *engines[2:], key_file)


@contextmanager
def proxying(prefill: list[str], decode: list[Engine], *options: str) -> Iterator[Engine]:
    """`kvferry proxy` as a process."""
    named = [word for url in prefill for word in ("--prefill", url)]
    named += [word for engine in decode for word in ("--decode", engine.url)]
    command = [KVFERRY, "proxy", "--port", "0", *named, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0], "the proxy did not start"
        url = process.stdout.readline().split()[-1]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield Engine(client)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def proxy(cluster: Cluster) -> Iterator[Engine]:
    """Before all four, with the guide's options for two machines, and without probes in between."""
    (command,) = commands("kvferry proxy --prefill http://10.0.0.1")
    (key_option, key_name) = shlex.split(command)[-2:]
    assert key_name == cluster.key_file.name
    options = (key_option, str(cluster.key_file), "--probe-interval-s", "0")
    decode = [cluster.open_decode, cluster.closed_decode]
    with proxying([p.url for p in cluster.prefill], decode, *options) as proxy:
        yield proxy


class Meddler(FakeEngine):
    """A prefill engine whose KV cannot be had: a real one answers, and what it hands over is changed on the way."""

    def __init__(self, url: str, real: Engine, changes: dict[str, Any]) -> None:
        super().__init__(url)
        self._real = real
        self._changes = changes

    async def complete(self, request: Request) -> Response:
        async with httpx2.AsyncClient(timeout=30) as client:
            reply = (await client.post(self._real.url + request.url.path, content=await request.body())).json()
        reply["kv_transfer_params"] |= self._changes
        return JSONResponse(reply)


@contextmanager
def meddling(real: Engine, **changes: Any) -> Iterator[str]:
    bound = bind_socket("127.0.0.1", 0)
    meddler = Meddler(url_of(bound), real, changes)
    with serving_app(meddler.app(), bound):
        yield meddler.url


@contextmanager
def dead_port() -> Iterator[int]:
    with bind_socket("127.0.0.1", 0) as bound:  # bound, and not listening
        yield bound.getsockname()[1]


# ---- answers, and where the KV came from -----------------------------------------------------------------------------


def words_of(reply: Any, *, is_stream: bool) -> str:
    choices = [chunk.choices[0] for chunk in reply if chunk.choices] if is_stream else [reply.choices[0]]
    if hasattr(choices[0], "text"):
        return "".join(choice.text for choice in choices)
    return "".join((choice.delta if is_stream else choice.message).content or "" for choice in choices)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "ask",
    [
        {"prompt": prompt_of(3)},
        {"prompt": prompt_of(4), "logprobs": 2},
        {"prompt": prompt_of(5), "temperature": 0.9, "seed": 7},
        {"prompt": prompt_of(6), "max_tokens": 1},
        chat("Tell me of the ferry. " * 9),
    ],
    ids=["completion", "logprobs", "seeded", "one token", "chat"],
)
def test_answer_is_that_of_one_engine_and_the_kv_was_moved_not_computed(
    cluster: Cluster, proxy: Engine, ask: dict[str, Any], is_stream: bool
) -> None:
    def answer(engine: Engine, salt: str) -> str:
        endpoint = engine.client.chat.completions if "messages" in ask else engine.client.completions
        body = {**GREEDY, **ask, "extra_body": {"ignore_eos": True, "cache_salt": salt}}
        return words_of(endpoint.create(**body, stream=is_stream), is_stream=is_stream)

    alone = answer(cluster.prefill[0], f"alone {is_stream}")
    wait_until("the engines have nothing to do", lambda: all(engine.is_idle() for engine in cluster.engines))
    before = [engine.prefilled_and_moved() for engine in cluster.engines]
    assert answer(proxy, f"routed {is_stream}") == alone
    wait_until("the prefill engine gave the blocks up", lambda: all(engine.is_idle() for engine in cluster.engines))
    after = [engine.prefilled_and_moved() for engine in cluster.engines]
    grown = [(now[0] - then[0], now[1] - then[1]) for then, now in zip(before, after, strict=True)]

    num_tokens = sum(computed for computed, _ in grown[:2])
    if "prompt" in ask:
        assert num_tokens == len(ask["prompt"])
    assert sorted(computed for computed, _ in grown) == [0, 0, 0, num_tokens], "one engine prefilled, once"
    pulled, pushed = sorted(moved for _, moved in grown[2:]), [moved for _, moved in grown[:2]]
    assert (pulled, pushed) in (
        ([0, num_tokens * TOKEN_BYTES], [0, 0]),
        ([0, 0], [0, num_tokens * TOKEN_BYTES]),
    ), "all of it was moved, once, by the decode engine or by the prefill engine that pushes"


def test_conversations_stay_with_the_engine_that_knows_them(cluster: Cluster, proxy: Engine) -> None:
    def hits() -> list[float]:
        return [engine.figure("vllm:prefix_cache_hits_total") for engine in cluster.prefill]

    num_turns, num_conversations = 3, 4
    before = hits()
    for turn in range(num_turns):
        for who in range(num_conversations):
            prompt = prompt_of(20 + who, 400 + 120 * turn)
            proxy.client.completions.create(**(GREEDY | {"max_tokens": 2}), prompt=prompt)
    grown = [now - then for then, now in zip(before, hits(), strict=True)]
    known = [(400 + 120 * turn) // BLOCK_TOKENS * BLOCK_TOKENS for turn in range(num_turns - 1)]
    assert sum(grown) == num_conversations * sum(known), "each turn found all whole blocks of the turn before"
    assert min(grown) == 2 * sum(known), "and the engines share the conversations"
    assert cluster.prefill[1].prefilled_and_moved()[1], "the second one pushes"
    assert sum(proxy.figure("kvferry:proxy_leg_seconds_count", leg=leg) for leg in ("prefill", "decode")) >= 24
    assert proxy.figure("kvferry:proxy_recomputed_total") == 0
    assert proxy.figure("kvferry:proxy_requests_total", outcome="ok") >= num_turns * num_conversations
    assert proxy.figure("kvferry:proxy_pair_transfers") >= 2


# ---- clients that leave ---------------------------------------------------------------------------------------------


def test_client_that_leaves_ends_both_legs_and_frees_all_blocks(cluster: Cluster, proxy: Engine) -> None:
    long = {**GREEDY, "prompt": prompt_of(40), "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    gone = proxy.figure("kvferry:proxy_requests_total", outcome="client_gone")
    decoders = (cluster.open_decode, cluster.closed_decode)
    streams = [proxy.client.completions.create(**long, stream=True) for _ in range(4)]
    for stream in streams:
        for _ in range(2):
            next(stream)
    assert sum(engine.figure("vllm:num_requests_running") for engine in decoders) == len(streams)
    for stream in streams:
        stream.close()
    wait_until("the decode engines stopped", lambda: all(engine.is_idle() for engine in cluster.engines))
    ended = sum(engine.figure("vllm:request_success_total", finished_reason="abort") for engine in decoders)
    assert ended >= len(streams)
    assert proxy.figure("kvferry:proxy_requests_total", outcome="client_gone") - gone == len(streams)
    assert proxy.figure("kvferry:proxy_in_flight") == 0


def test_client_that_leaves_during_the_prefill_ends_it(cluster: Cluster, proxy: Engine) -> None:
    def prefills(*names: str, **labels: str) -> float:
        return sum(sum(engine.figures(*names, **labels)) for engine in cluster.prefill)

    def ended(*outcomes: str) -> float:
        return sum(proxy.figure("kvferry:proxy_requests_total", outcome=outcome) for outcome in outcomes)

    aborted, gone = prefills("vllm:request_success_total", finished_reason="abort"), ended("client_gone")
    known = ended("client_gone", "ok")
    address, num_clients = proxy.url.removeprefix("http://"), 24
    connections = [http.client.HTTPConnection(address, timeout=30) for _ in range(num_clients)]
    for who, connection in enumerate(connections):
        body = {**GREEDY, "prompt": prompt_of(50 + who, 4000)}
        connection.request("POST", "/v1/completions", json.dumps(body))
    # Each takes some steps, one after the other: while several are there, some have far to go.
    wait_until("prefills", lambda: prefills("vllm:num_requests_running", "vllm:num_requests_waiting") >= 4)
    for connection in connections:
        connection.close()
    wait_until("the engines are idle", lambda: all(engine.is_idle() for engine in cluster.engines))
    wait_until("all have ended", lambda: ended("client_gone", "ok") - known == num_clients)
    assert ended("client_gone") > gone
    assert prefills("vllm:request_success_total", finished_reason="abort") > aborted


# ---- hand-overs that nobody fetches ----------------------------------------------------------------------------------


@contextmanager
def refusing(real: Engine, key_file: Path) -> Iterator[tuple[Engine, list[float]]]:
    """A proxy whose decode leg fails each time with the prefill done, and how many blocks were held then."""
    held: list[float] = []

    class Refuser(FakeEngine):
        async def complete(self, request: Request) -> Response:
            held.append(real.figure("kvferry:connector_held_blocks"))
            return await super().complete(request)

    bound = bind_socket("127.0.0.1", 0)
    refuser = Refuser(url_of(bound))
    refuser.mode = "400"
    with serving_app(refuser.app(), bound):
        client = openai.OpenAI(base_url=f"{refuser.url}/v1", api_key="none")
        options = ("--probe-interval-s", "0", "--shared-key-file", str(key_file))
        with proxying([real.url], [Engine(client)], *options) as proxy:
            yield proxy, held


@pytest.mark.parametrize("number", [0, 1], ids=["pull", "push"])
def test_blocks_of_a_request_that_the_decode_engine_refuses_come_free_at_once(cluster: Cluster, number: int) -> None:
    """Long before `lease_s`, which is 30."""
    prefill = cluster.prefill[number]
    wait_until("idle", prefill.is_idle)
    with refusing(prefill, cluster.key_file) as (proxy, held):
        with pytest.raises(openai.BadRequestError):
            proxy.client.completions.create(**GREEDY, prompt=prompt_of(90 + number))
        began_s = time.monotonic()
        wait_until("the blocks come free", prefill.is_idle, timeout_s=20)
        assert held == [19], "they were held"
        assert time.monotonic() - began_s < 20


def test_clients_that_leave_between_the_legs_leave_no_blocks_held(cluster: Cluster) -> None:
    prefill, num_clients = cluster.prefill[0], 24
    wait_until("idle", prefill.is_idle)
    bound = bind_socket("127.0.0.1", 0)
    hanging = FakeEngine(url_of(bound))
    hanging.mode = "hang"
    options = ("--probe-interval-s", "0", "--shared-key-file", str(cluster.key_file))
    with (
        serving_app(hanging.app(), bound),
        openai.OpenAI(base_url=f"{hanging.url}/v1", api_key="none") as client,
        proxying([prefill.url], [Engine(client)], *options) as proxy,
    ):
        address = proxy.url.removeprefix("http://")
        connections = [http.client.HTTPConnection(address, timeout=60) for _ in range(num_clients)]
        for who, connection in enumerate(connections):
            body = {**GREEDY, "prompt": prompt_of(100 + who, 100)}
            connection.request("POST", "/v1/completions", json.dumps(body))
        wait_until("all are prefilled", lambda: len(hanging.seen) == num_clients)
        assert prefill.figure("kvferry:connector_held_blocks") == num_clients * 7
        for connection in connections:
            connection.close()
        wait_until("the blocks come free", prefill.is_idle, timeout_s=20)


# ---- readiness, and hand-overs that are lost -----------------------------------------------------------------------


def state_of(proxy: Engine) -> tuple[int, str]:
    reply = httpx2.get(f"{proxy.url}/ready", timeout=30)
    return reply.status_code, reply.text


def test_ready_when_transfers_work_between_two_engines(cluster: Cluster) -> None:
    decode = [cluster.open_decode, cluster.closed_decode]
    with dead_port() as port, meddling(cluster.prefill[0], remote_port=port) as dead_end:
        quick = ("--probe-interval-s", "0.3", "--shared-key-file", str(cluster.key_file))
        with proxying([dead_end], decode, *quick) as proxy:
            wait_until("all is known", lambda: state_of(proxy)[1].count('"transfers":false') == 2)
            status, text = state_of(proxy)
            assert status == 503
            # Engines that answer are not taken for broken: what is broken is what is between them.
            assert all(engine["state"] == "in rotation" for engine in json.loads(text)["engines"]), text
            assert all(f"127.0.0.1:{port}" in pair["last_failure"] for pair in json.loads(text)["pairs"])
            assert httpx2.get(f"{proxy.url}/health", timeout=60).status_code == 200
        with proxying([dead_end, cluster.prefill[1].url], decode[:1], *quick) as proxy:
            wait_until("transfers work", lambda: state_of(proxy)[0] == 200)
            wait_until("all is known", lambda: '"transfers":null' not in state_of(proxy)[1])
            pairs = [(pair["prefill"], pair["transfers"]) for pair in json.loads(state_of(proxy)[1])["pairs"]]
            assert dict(pairs) == {dead_end: False, cluster.prefill[1].url: True}
            assert proxy.figure("kvferry:proxy_pair_transfers") == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_lost_hand_over_is_an_error_and_is_recomputed_only_when_that_is_wanted(
    cluster: Cluster, is_stream: bool
) -> None:
    """The lease is gone by the time the decode engine comes for it."""
    ask: dict[str, Any] = {**GREEDY, "prompt": prompt_of(60 + is_stream), "stream": is_stream}
    ask["extra_body"] = {"ignore_eos": True}
    decoder = cluster.open_decode
    alone = words_of(cluster.prefill[1].client.completions.create(**ask), is_stream=is_stream)
    with meddling(cluster.prefill[0], remote_lease_id="0" * 32) as forgetful:
        with proxying([forgetful], [decoder], "--probe-interval-s", "0") as proxy:
            before = decoder.figure("vllm:generation_tokens_total")
            with pytest.raises(openai.APIStatusError, match="computed 299 prompt tokens again") as caught:
                proxy.client.completions.create(**ask)
            assert caught.value.status_code == 502
            assert is_stream or "unknown" in caught.value.message, "the reason is told where it is known"
            assert len(httpx2.get(f"{proxy.url}/ready", timeout=60).json()["pairs"]) == 1
            wait_until("the decode engine stopped", decoder.is_idle)
            if is_stream:
                assert decoder.figure("vllm:generation_tokens_total") - before < GREEDY["max_tokens"]
        with proxying([forgetful], [decoder], "--probe-interval-s", "0", "--no-strict") as proxy:
            assert words_of(proxy.client.completions.create(**ask), is_stream=is_stream) == alone
            assert proxy.figure("kvferry:proxy_recomputed_total", reason="decode_engine") == 1
            assert proxy.figure("kvferry:proxy_recomputed_total") == 1


# ---- the shared key -------------------------------------------------------------------------------------------------


def test_proxy_must_have_the_engines_key(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(cluster.key[::-1])
    for options, message in (
        ((), r"allowed_peers \(nobody\), and carries no token of the proxy.*--shared-key-file"),
        (("--shared-key-file", str(other)), r"not signed with this engine's key.*--shared-key-file"),
    ):
        with (
            proxying([cluster.prefill[0].url], [cluster.closed_decode], *options, "--probe-interval-s", "0") as proxy,
            pytest.raises(openai.APIStatusError, match=message) as caught,
        ):
            proxy.client.completions.create(**GREEDY, prompt=prompt_of(70))
        assert caught.value.status_code == 502


def test_token_is_for_one_transfer_and_a_while(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill[0].client, cluster.closed_decode.client

    def hand_over(transfer_id: str) -> dict[str, Any]:
        asked = {"do_remote_decode": True, "transfer_id": transfer_id}
        body = {"kv_transfer_params": asked, "cache_salt": transfer_id}
        reply = prefill.completions.create(**(GREEDY | {"max_tokens": 1}), prompt=prompt_of(80), extra_body=body)
        assert reply.model_extra is not None
        return dict(reply.model_extra["kv_transfer_params"])

    def take(params: dict[str, Any], token: str) -> Any:
        body = {"kv_transfer_params": {**params, "peer_token": token}, "cache_salt": params["transfer_id"]}
        return decode.completions.create(**GREEDY, prompt=prompt_of(80), extra_body=body)

    def token_of(params: dict[str, Any], expires_s: float) -> str:
        address = Address(params["remote_host"], params["remote_port"])
        return sign_peer(cluster.key, address, params["transfer_id"], int(expires_s))

    first, second = hand_over("first"), hand_over("second")
    with pytest.raises(openai.APIStatusError, match="expired"):
        take(first, token_of(first, time.time() - 1))
    token = token_of(first, time.time() + 60)
    with pytest.raises(openai.APIStatusError, match="not signed with this engine's key"):
        take(second, token)
    assert take(first, token).usage.completion_tokens == GREEDY["max_tokens"]
    with pytest.raises(openai.APIStatusError, match=r"failed to load: .*done"):
        take(first, token)
    assert take(second, token_of(second, time.time() + 60)).usage.completion_tokens == GREEDY["max_tokens"]


# ---- the guide's first half -----------------------------------------------------------------------------------------


def test_five_minutes_on_one_machine(tmp_path: Path) -> None:
    places = {}
    serve = [shlex.split(command) for command in commands("kvferry serve smollm2")]
    assert [words[3:5] for words in serve] == [["--port", "8001"], ["--port", "8002"]]
    with started(*((words[2], *words[5:]) for words in serve)) as engines:
        for words, engine in zip(serve, engines, strict=True):
            places[f"http://127.0.0.1:{words[4]}"] = engine.url
        (command,) = commands("kvferry proxy --prefill http://127.0.0.1")
        name, subcommand, prefill_option, prefill, decode_option, decode = shlex.split(command)
        assert (name, subcommand, prefill_option, decode_option) == ("kvferry", "proxy", "--prefill", "--decode")
        prefill_engine, decode_engine = (places[url] for url in (prefill, decode))
        with proxying([prefill_engine], [Engine(engines[1].client)]) as proxy:
            assert decode_engine == engines[1].url
            places["http://127.0.0.1:8100"] = proxy.url

            def here(text: str) -> str:
                assert any(place in text for place in places), text
                return re.sub(r"http://127\.0\.0\.1:\d+", lambda found: places[found[0]], text)

            ready, bytes_moved = (here(command) for command in commands("curl"))
            assert json.loads(run_bash(ready))["ready"] is True
            (program,) = blocks("python")
            said = run_python(here(program), tmp_path).splitlines()
            assert re.search(r"nine|9", said[0])
            found = re.fullmatch(r"(\d+) of (\d+) prompt tokens were in the prefill engine's cache", said[-1])
            assert found
            assert int(found[1]) < int(found[2])
            assert float(run_bash(bytes_moved).split()[-1]) > 0
            assert 'medium="shm"' in run_bash(bytes_moved)


def run_bash(command: str) -> str:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
