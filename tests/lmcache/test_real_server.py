"""The built-in LMCacheMPConnector against a real LMCache server: bytes, restarts, deaths and silence."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lmcache.conftest import StartServer, transfer_to
from tests.lmcache_server import LMCacheServer

from kvferry import LLM, SamplingParams
from kvferry.engine.outputs import RequestOutput
from kvferry.errors import HostError, TransferError
from kvferry.lmcache.wire import ServerConnection
from kvferry.testing.stub_model import StubModel

CHUNK = 64
HERE = Path(__file__).parent
MakeLlm = Callable[..., LLM]


@pytest.fixture
def make_llm() -> Iterator[MakeLlm]:
    engines: list[LLM] = []

    def make(transfer: dict[str, Any], **options: Any) -> LLM:
        options = {"block_size": 16, "num_kv_blocks": 128, **options}
        engines.append(LLM(StubModel(), kv_transfer_config=transfer, **options))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


def run(llm: LLM, tokens: list[int]) -> RequestOutput:
    """Three right tokens, or an AssertionError."""
    output = llm.generate(tokens, SamplingParams(max_tokens=3, temperature=0))[0]
    assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, 3)
    llm.scheduler.check_integrity()
    return output


def found_by_and_by(llm: LLM, tokens: list[int], num_tokens: int) -> None:
    """Run until the server has the prompt: it says that it has stored a little before others can find it."""
    deadline = time.monotonic() + 120
    while run(llm, tokens).num_external_tokens != num_tokens:
        assert time.monotonic() < deadline, "the prompt is never found"
        assert llm.reset_prefix_cache()
        time.sleep(0.2)


def client(server: LMCacheServer, *argv: str) -> list[str]:
    command = [sys.executable, str(HERE / "client_child.py"), str(server.port), *argv]
    env = {"PYTHONPATH": str(HERE.parents[1] / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bytes_of_one_process_arrive_in_another(server: LMCacheServer) -> None:
    stored, knows_lmcache = client(server, "store", "17")
    assert client(server, "retrieve") == [stored, "False"]
    assert knows_lmcache == "False"


def test_an_engine_that_was_restarted_hits(transfer: dict[str, Any], make_llm: MakeLlm) -> None:
    tokens = prompt(5 * CHUNK + 20)
    llm = make_llm(transfer)
    assert run(llm, tokens).num_external_tokens == 0
    llm.shutdown()
    found_by_and_by(make_llm(transfer), tokens, 5 * CHUNK)


def test_many_requests_and_nothing_left_locked(
    server: LMCacheServer, transfer: dict[str, Any], make_llm: MakeLlm
) -> None:
    prompts = [prompt(3 * CHUNK + 7 * i, seed=i % 5) for i in range(20)]
    for _ in range(2):
        llm = make_llm(transfer)
        outputs = llm.generate(prompts, SamplingParams(max_tokens=3, temperature=0))
        for tokens, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, 3)
        llm.shutdown()
    deadline = time.monotonic() + 60
    while (locked := json.loads(server.status())["storage_manager"]["l1_manager"]["read_locked_count"]) != 0:
        assert time.monotonic() < deadline, f"{locked} chunks are still locked"
        time.sleep(0.1)


def test_an_unknown_operation_costs_its_deadline_and_no_more(server: LMCacheServer) -> None:
    connection = ServerConnection(f"tcp://127.0.0.1:{server.port}")
    started = time.monotonic()
    with pytest.raises(TransferError, match=r"has not answered 'no_such_operation' within 0.5 s"):
        connection.call("no_such_operation", returns=bool, timeout_s=0.5)
    assert 0.4 < time.monotonic() - started < 30
    assert connection.probe(http_port=server.http_port) == CHUNK
    connection.close()


def test_a_restarted_server_is_found_again(start_server: StartServer, make_llm: MakeLlm) -> None:
    server = start_server("--chunk-size", "64")
    llm = make_llm(transfer_to(server.port, "restart"))
    found_by_and_by(llm, prompt(2 * CHUNK + 5), 2 * CHUNK)
    server.kill()
    run(llm, prompt(2 * CHUNK + 5, seed=1))
    server.start()
    assert llm.reset_prefix_cache()
    found_by_and_by(llm, prompt(2 * CHUNK + 5), 2 * CHUNK)


@pytest.mark.parametrize("fault", ["kill", "pause"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_server_that_dies_or_stops_during_a_retrieve(
    start_server: StartServer, make_llm: MakeLlm, monkeypatch: pytest.MonkeyPatch, fault: str, policy: str
) -> None:
    server = start_server("--chunk-size", "64")
    transfer = {**transfer_to(server.port, "dies", mq_timeout=6.0), "kv_load_failure_policy": policy}
    tokens = prompt(4 * CHUNK + 5)
    found_by_and_by(make_llm(transfer), tokens, 4 * CHUNK)
    llm, call = make_llm(transfer), ServerConnection.call

    def call_or_fault(self: ServerConnection, operation: str, *arguments: Any, **options: Any) -> Any:
        if operation == "retrieve":
            getattr(server, fault)()
        return call(self, operation, *arguments, **options)

    monkeypatch.setattr(ServerConnection, "call", call_or_fault)
    started = time.monotonic()
    output = llm.generate(tokens, SamplingParams(max_tokens=3, temperature=0))[0]
    assert time.monotonic() - started < 60
    if policy == "fail":
        assert output.outputs[0].finish_reason == "error"
    else:
        assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, 3)
    monkeypatch.undo()
    if fault == "pause":
        server.resume()  # what was asked of it happens now, in memory that nobody reads
        run(llm, prompt(4 * CHUNK + 5, seed=1))
        assert llm.reset_prefix_cache()
        found_by_and_by(llm, tokens, 4 * CHUNK)


def test_a_server_in_the_other_transfer_mode_is_refused(start_server: StartServer, make_llm: MakeLlm) -> None:
    server = start_server("--chunk-size", "64", "--supported-transfer-mode", "engine_driven", "--shm-name", "kvf_test")
    with pytest.raises(HostError, match=r"--supported-transfer-mode lmcache_driven"):
        make_llm(transfer_to(server.port, "mode"))


def test_chunks_that_do_not_fit_are_refused_and_a_default_server_fits(
    start_server: StartServer, make_llm: MakeLlm
) -> None:
    server = start_server()
    tokens = prompt(2 * 256 + 5)
    found_by_and_by(make_llm(transfer_to(server.port, "default", staging_bytes=1 << 20)), tokens, 512)
