"""Engine + built-in LMCacheMPConnector + a stand-in server: right tokens whatever it does, and nothing left locked."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fake_lmcache import CHUNK_TOKENS, SILENT, FakeServer
from tests.settings_tables import doctors_word, named
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kvferry import LLM, SamplingParams
from kvferry.cli.main import app
from kvferry.contract import KVConnectorFactory, supports_hma
from kvferry.contract.views import RequestView
from kvferry.engine.outputs import RequestOutput
from kvferry.errors import ConfigError, HostError
from kvferry.lmcache.wire import ServerConnection, ServerKey
from kvferry.testing.stub_model import StubModel

BLOCK_SIZE = 16
IMPATIENT = {"lmcache.mp.mq_timeout": 3.0, "lookup_timeout_s": 3.0}
MakeLlm = Callable[..., LLM]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.close()


@pytest.fixture
def make_llm(server: FakeServer) -> Iterator[MakeLlm]:
    engines: list[LLM] = []

    def make(policy: str = "recompute", extra: Any = None, model: Any = None, **options: Any) -> LLM:
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {
                "server_urls": [server.url],
                "weights_version": "1",
                "staging_bytes": 1 << 16,
                "lookup_timeout_s": 60.0,
                **(extra or {}),
            },
        }
        options = {"block_size": BLOCK_SIZE, "num_kv_blocks": 128, "kv_transfer_config": transfer, **options}
        engines.append(LLM(model or StubModel(), **options))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()


def run(
    llm: LLM, tokens: list[int], max_tokens: int = 3, *, model: StubModel | None = None, **more: Any
) -> RequestOutput:
    """Generate, check every token against the model's definition and all invariants; store what is to be stored."""
    output = llm.generate(tokens, greedy(max_tokens), **more)[0]
    assert output.outputs[0].token_ids == (model or StubModel()).expected_tokens(tokens, max_tokens)
    settle(llm)
    llm.scheduler.check_integrity()
    return output


def settle(llm: LLM) -> None:
    deadline = time.monotonic() + 60
    while llm.connector.side.has_pending_push_work():
        assert time.monotonic() < deadline, "transfers have not ended"
        llm.step()
        time.sleep(0.0005)


def until(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_another_engine_finds_whole_chunks(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(3 * CHUNK_TOKENS + 20)
    assert run(make_llm(), tokens).num_external_tokens == 0
    assert len(server.chunks) == 3
    assert run(make_llm(), tokens).num_external_tokens == 3 * CHUNK_TOKENS
    until("locks are left", lambda: server.num_locked == 0)


def test_long_prompts_go_through_a_small_staging_in_parts(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(20 * CHUNK_TOKENS)
    run(make_llm(num_kv_blocks=256), tokens)
    assert server.calls.count("store") > 1
    assert run(make_llm(), tokens).num_external_tokens == 20 * CHUNK_TOKENS
    assert server.calls.count("retrieve") > 1


def test_stores_pin_at_most_half_of_the_blocks(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(20 * CHUNK_TOKENS + 5)
    server.faults["store"] = lambda _: SILENT
    llm = make_llm(extra=IMPATIENT, num_kv_blocks=100)
    run(llm, tokens)
    stats = llm.connector.side.get_kv_connector_stats()
    assert stats.media["lmcache"].num_dropped == 20 - 50 // 4
    assert stats.fallbacks["dropped store"] == 20 - 50 // 4
    assert stats.held_blocks == 0


def test_generated_tokens_are_stored_too(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(CHUNK_TOKENS - 10)
    answer = run(make_llm(), tokens, max_tokens=20).outputs[0].token_ids
    longer = [*tokens, *answer]
    assert run(make_llm(), longer).num_external_tokens == CHUNK_TOKENS


def test_what_is_local_is_not_loaded_and_its_locks_are_freed(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(4 * CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    llm = make_llm()
    run(llm, tokens[: 2 * CHUNK_TOKENS + 40])  # leaves 2.5 chunks in the engine's own cache
    assert run(llm, tokens).num_external_tokens == 4 * CHUNK_TOKENS - (2 * CHUNK_TOKENS + 32)
    run(llm, tokens)
    until("locks are left", lambda: server.num_locked == 0)


def test_salts_do_not_meet(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(CHUNK_TOKENS + 5)
    run(make_llm(), tokens, cache_salt="a")
    for salt, hit in (("b", 0), ("a", CHUNK_TOKENS), ("a/b", 0), ("kvferry-", 0)):
        assert run(make_llm(), tokens, cache_salt=salt).num_external_tokens == hit
    assert {name[2][:8] for name in server.chunks} == {"a", "b", "kvferry-"}


def test_reset_cache_means_that_nothing_older_is_found(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(CHUNK_TOKENS + 5)
    llm = make_llm()
    run(llm, tokens)
    assert llm.reset_prefix_cache(reset_connector=True)
    assert run(llm, tokens).num_external_tokens == 0
    assert llm.reset_prefix_cache()
    assert run(llm, tokens).num_external_tokens == CHUNK_TOKENS


def flip(server: FakeServer, position: int) -> None:
    for name, content in server.chunks.items():
        changed = bytearray(content)
        changed[position] ^= 1
        server.chunks[name] = bytes(changed)


@pytest.mark.parametrize("position", [0, 2000, -1, -20, -45])
def test_changed_bytes_are_noticed_and_not_loaded_again(
    server: FakeServer, make_llm: MakeLlm, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(3 * CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    flip(server, position)
    llm = make_llm()
    run(llm, tokens)
    assert "with other bytes than were stored" in caplog.text
    num_retrieves = server.calls.count("retrieve")
    assert llm.reset_prefix_cache()
    assert run(llm, tokens).num_external_tokens == 0
    assert server.calls.count("retrieve") == num_retrieves, "a chunk that is known to be bad was fetched again"
    until("locks are left", lambda: server.num_locked == 0)


def test_chunks_of_other_tokens_are_noticed(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(2 * CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    names = list(server.chunks)
    first, second = server.chunks[names[0]], server.chunks[names[1]]
    server.chunks.update({names[0]: second, names[1]: first})
    run(make_llm(), tokens)


FAULTS: dict[str, Any] = {
    "silent": SILENT,
    "refused": [b"event", False],
    "not registered": [b"", False],
    "another type": "gibberish",
    "no result": [],
}


@pytest.mark.parametrize("answer", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("operation", ["store", "retrieve"])
def test_a_transfer_that_goes_wrong_costs_time_not_truth(
    server: FakeServer, make_llm: MakeLlm, operation: str, answer: Any
) -> None:
    tokens = prompt(2 * CHUNK_TOKENS + 5)
    if operation == "retrieve":
        run(make_llm(), tokens)
    llm = make_llm(extra=IMPATIENT if answer is SILENT else {})
    server.faults[operation] = lambda _: answer
    run(llm, tokens)
    del server.faults[operation]
    assert not llm.connector.side._num_pinned
    until("not registered again", lambda: server.calls.count("register_kv_cache") >= 2 or answer == FAULTS["refused"])
    other = prompt(2 * CHUNK_TOKENS + 5, seed=1)
    wait_for_server(llm)
    run(llm, other)
    assert run(make_llm(), other).num_external_tokens == 2 * CHUNK_TOKENS


def wait_for_server(llm: LLM) -> None:
    worker = llm._hosted.worker._guard.connector.side
    until("no session", lambda: worker._session is not None)


def test_a_failed_load_is_a_visible_error_when_that_is_the_policy(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    server.faults["retrieve"] = lambda _: SILENT
    output = make_llm("fail", IMPATIENT).generate(tokens, greedy(3))[0]
    assert output.outputs[0].finish_reason == "error"


def test_a_late_retrieve_writes_where_nobody_reads(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens, held = prompt(CHUNK_TOKENS + 5), []
    run(make_llm(), tokens)
    llm = make_llm(extra=IMPATIENT)
    server.faults["retrieve"] = lambda arguments: held.append(arguments) or SILENT
    run(llm, tokens)
    del server.faults["retrieve"]
    flip(server, 0)
    for other in range(1, 4):
        run(llm, prompt(CHUNK_TOKENS + 5, seed=other))
        (key, *more) = held[0]
        server.locks.update(server._names(key))
        server.on_retrieve(key, *more)
    for other in range(1, 4):
        assert run(make_llm(), prompt(CHUNK_TOKENS + 5, seed=other)).num_external_tokens in (0, CHUNK_TOKENS)


@pytest.mark.parametrize("operation", ["lookup", "query_prefetch_status"])
def test_a_lookup_without_answer_delays_a_request_for_a_bounded_time(
    server: FakeServer, make_llm: MakeLlm, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    server.faults[operation] = lambda _: SILENT
    llm = make_llm(extra=IMPATIENT)
    started = time.monotonic()
    assert run(llm, tokens).num_external_tokens == 0
    assert time.monotonic() - started < 30
    started = time.monotonic()
    run(llm, prompt(CHUNK_TOKENS + 5, seed=1), max_tokens=1)
    assert "no lookups go to the LMCache server until it answers again" in caplog.text


def test_a_lookup_that_is_pending_for_ever_is_given_up_and_released(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    is_pending = [True]
    server.on_query_prefetch_status = (  # type: ignore[method-assign]
        lambda request_id: None if is_pending[0] else server._sessions[request_id]["found"]
    )
    llm = make_llm(extra=IMPATIENT)
    assert run(llm, tokens).num_external_tokens == 0
    assert server.num_locked == 1
    is_pending[0] = False
    until("locks are left", lambda: server.num_locked == 0)
    assert llm.connector.side.get_kv_connector_stats().fallbacks["stalled wait"] == 1


def test_an_aborted_request_leaves_nothing_locked(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(2 * CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    llm = make_llm()
    for num_steps in range(4):
        request_id = llm.add_request(tokens, greedy(3))
        for _ in range(num_steps):
            llm.step()
            time.sleep(0.01)
        llm.abort_request(request_id)
        settle(llm)
        assert llm.reset_prefix_cache()
    until("locks are left", lambda: server.num_locked == 0)
    run(llm, tokens)


def test_a_server_that_is_gone_and_comes_back(make_llm: MakeLlm, server: FakeServer) -> None:
    llm = make_llm(extra=IMPATIENT)
    run(llm, prompt(CHUNK_TOKENS + 5))
    server.close()
    run(llm, prompt(CHUNK_TOKENS + 5, seed=1))
    back = FakeServer(port=server.port)
    try:
        until("not registered again", lambda: "register_kv_cache" in back.calls and "get_chunk_size" in back.calls)
        until("lookups are down", lambda: not llm.connector.side.lookups.is_down)
        tokens = prompt(CHUNK_TOKENS + 5, seed=2)
        run(llm, tokens)
        assert llm.reset_prefix_cache()
        assert run(llm, tokens).num_external_tokens == CHUNK_TOKENS
        llm.shutdown()
    finally:
        back.close()
        server.__init__()  # type: ignore[misc]  # for the fixture to close


def test_beside_another_connector(server: FakeServer) -> None:
    children = [
        {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20}},
        {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_extra_config": {"server_urls": server.url, "lookup_timeout_s": 60.0},
        },
    ]
    for child in children:
        child["kv_connector_extra_config"]["weights_version"] = "1"  # type: ignore[index]
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": children},
    }
    tokens = prompt(3 * CHUNK_TOKENS + 5)
    for _ in range(2):
        with LLM(StubModel(), kv_transfer_config=transfer, block_size=BLOCK_SIZE, num_kv_blocks=128) as llm:
            first = llm.generate(tokens, greedy(3))[0]
            assert llm.reset_prefix_cache()
            again = llm.generate(tokens, greedy(3))[0]  # from host memory; the server's chunks are unlocked
            for output in (first, again):
                assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, 3)
            assert again.num_external_tokens == 3 * CHUNK_TOKENS
    assert first.num_external_tokens == 3 * CHUNK_TOKENS, "the second engine has it from the server"
    until("locks are left", lambda: server.num_locked == 0)


def test_nothing_of_the_staging_is_left_in_shared_memory(make_llm: MakeLlm) -> None:
    before = set(Path("/dev/shm").glob("kvferry-lmcache-*"))
    llm = make_llm()
    assert set(Path("/dev/shm").glob("kvferry-lmcache-*")) == before, "unlinked as soon as the server has it"
    llm.shutdown()


@pytest.mark.parametrize(
    ("extra", "options", "says"),
    [
        ({"server_urls": "tcp://127.0.0.1:9"}, {}, "start `lmcache server` 0.5.6 or later"),
        ({}, {"block_size": 48}, "chunks of 64 tokens, not a multiple of 16 and of this engine's block_size=48"),
        ({"staging_bytes": 100}, {}, "staging_bytes=100 is too little for chunks of .* raise it to at least"),
        ({"staging_bytes": 1 << 50}, {}, "staging_bytes: .* bytes are needed in /dev/shm, .* are free: lower it"),
        ({"http_port": 9}, {}, "http_port: the LMCache server's .* does not report its version"),
        ({"implementation": "package"}, {}, "implementation='package'.* runs in vLLM only"),
        ({"implementation": "buildin"}, {}, "implementation='buildin' is not one of.*did you mean 'builtin'"),
        ({"lmcache.mp.prot": 1}, {}, "lmcache.mp.prot is unknown.*did you mean 'lmcache.mp.port'"),
    ],
)
def test_mistakes_are_told_at_start_and_by_doctor(
    make_llm: MakeLlm,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    extra: dict[str, Any],
    options: dict[str, Any],
    says: str,
) -> None:
    timeout_s = 0.3 if "server_urls" in extra else 20.0  # nobody is there; the others' server answers
    monkeypatch.setitem(ServerConnection.probe.__kwdefaults__, "timeout_s", timeout_s)
    with pytest.raises((ConfigError, HostError), match=says):
        make_llm(extra=extra, **options)
    given = named("LMCacheMPConnector", **{"server_urls": [server.url], "weights_version": "1", **extra})
    assert any(re.search(says, text) for text in doctors_word({**given, **options}))


def test_doctor_asks_for_the_server_as_the_start_does(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).save_pretrained(tmp_path)
    said = {}
    for url, timeout_s in ((server.url, 20.0), ("tcp://127.0.0.1:9", 0.3)):
        monkeypatch.setitem(ServerConnection.probe.__kwdefaults__, "timeout_s", timeout_s)
        extra = {"server_urls": url, "weights_version": "1"}
        transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        shown = CliRunner().invoke(
            app, ["doctor", "--model", str(tmp_path), "--kv-transfer-config", json.dumps(transfer)]
        )
        said[url] = shown.exit_code, " ".join(shown.output.split())
    assert said[server.url][0] == 0, said
    assert said["tcp://127.0.0.1:9"][0] == 1, said
    assert "no LMCache server answers" in said["tcp://127.0.0.1:9"][1]


def test_a_server_that_does_not_take_the_staging(
    server: FakeServer, make_llm: MakeLlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.lmcache.session.PROBE_TIMEOUT_S", 0.2)
    server.faults["register_kv_cache"] = lambda _: SILENT
    with pytest.raises(HostError, match="--supported-transfer-mode lmcache_driven"):
        make_llm()


def test_what_runs_is_told_and_is_no_hybrid_one(make_llm: MakeLlm, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        llm = make_llm()
    for side in ("worker", "scheduler"):
        assert f"LMCacheMPConnector ({side}): the built-in one of kvferry" in caplog.text
    assert not supports_hma(llm.connector)
    resolved = KVConnectorFactory.resolve(llm.config.kv_transfer_config)
    assert resolved.capabilities.supports_hma is False
    assert "lmcache" not in sys.modules


def test_the_package_is_not_imported() -> None:
    code = "import sys, kvferry.lmcache.connector; print('lmcache' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("found", [-3, 99])
def test_a_server_that_claims_nonsense_is_not_believed(server: FakeServer, make_llm: MakeLlm, found: int) -> None:
    tokens = prompt(2 * CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    server.faults["query_prefetch_status"] = lambda _: found
    assert run(make_llm(), tokens).num_external_tokens == (2 * CHUNK_TOKENS if found > 0 else 0)


def test_a_model_with_windows_is_kept_in_one_group(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(4 * CHUNK_TOKENS + 5)
    windows = [2 * CHUNK_TOKENS, None]
    for num_external_tokens in (0, 4 * CHUNK_TOKENS):
        model = StubModel(windows=windows)
        llm = make_llm(model=model)
        assert len(llm.kv_cache_config.kv_cache_groups) == 1, "not SupportsHMA"
        assert run(llm, tokens, model=model).num_external_tokens == num_external_tokens


def test_what_is_released_while_the_server_is_silent_is_released_later(server: FakeServer, make_llm: MakeLlm) -> None:
    tokens = prompt(2 * CHUNK_TOKENS + 5)
    run(make_llm(), tokens)
    llm = make_llm(extra=IMPATIENT)
    lookups = llm.connector.side.lookups
    fields = {"request_id": "r", "all_token_ids": tokens, "num_tokens": len(tokens), "num_computed_tokens": 0}
    view = RequestView(SimpleNamespace(**fields))
    until("the lookup never answered", lambda: llm.connector.side.get_num_new_matched_tokens(view, 0)[0] is not None)
    assert server.num_locked == 2
    server.faults["ping"] = server.faults["get_chunk_size"] = server.faults["end_session"] = lambda _: SILENT
    lookups.end(lookups_key(tokens, "other"))
    until("lookups are still up", lambda: lookups.is_down)
    llm.connector.side.request_finished(view, ([],))
    server.faults.clear()
    until("locks are left", lambda: server.num_locked == 0)


def lookups_key(tokens: list[int], request_id: str) -> ServerKey:
    return ServerKey("m", 1, None, tuple(tokens), 0, CHUNK_TOKENS, request_id)
