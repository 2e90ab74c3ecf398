"""Engine + OffloadingConnector + stub model: every token is right whatever is stored, loaded, lost or slow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry import LLM, SamplingParams
from kvferry.engine.outputs import RequestOutput
from kvferry.kv.keys import Identity, KeyChain, store_key
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

BLOCK_SIZE = 16
CHUNK_TOKENS = 64
MiB = 1 << 20


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    engines: list[LLM] = []

    def make(extra: dict[str, Any] | None = None, policy: str = "recompute", **kwargs: Any) -> LLM:
        transfer = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {
                "weights_version": "1",
                "cpu_bytes_to_use": MiB,
                "stall_timeout_s": 60.0,
                **(extra or {}),
            },
        }
        options = {"block_size": BLOCK_SIZE, "num_kv_blocks": 128, "kv_transfer_config": transfer, **kwargs}
        engines.append(LLM(StubModel(), **options))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()


def run(llm: LLM, tokens: list[int], max_tokens: int = 5) -> RequestOutput:
    """Generate, check every token against the model's definition, check all invariants."""
    output = llm.generate(tokens, greedy(max_tokens))[0]
    assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, max_tokens)
    llm.check_integrity()
    return output


def fs(folder: Path, **more: Any) -> dict[str, Any]:
    return {"secondary_tiers": [{"type": "fs", "path": str(folder), **more}]}


@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [48, 512])
def test_host_hit_after_the_engine_forgot(make_llm: Any, load_async: bool, max_num_batched_tokens: int) -> None:
    llm = make_llm({"load_async": load_async}, max_num_batched_tokens=max_num_batched_tokens)
    tokens = prompt(300)
    assert run(llm, tokens).num_external_tokens == 0
    assert llm.reset_prefix_cache()
    output = run(llm, tokens)
    assert output.num_external_tokens == 256
    assert output.external_hit_sources == {"host": 256}
    assert llm.reset_prefix_cache()
    assert run(llm, [*tokens[:200], 1, 2, 3]).num_external_tokens == 192


def test_interrupted_forward_leaves_nothing_pinned(make_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(max_num_batched_tokens=128)
    forward, num_forwards = StubModel.forward, 0

    def interrupted(*args: Any) -> Any:
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards == 2:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(StubModel, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompt(300), greedy(5))
    assert run(llm, prompt(300, seed=1)).num_external_tokens == 0
    assert llm.reset_prefix_cache(), "no block is held"
    output = run(llm, prompt(300))
    assert output.num_external_tokens == 128, "what the first forward computed, and nothing of the second"


def test_generated_tokens_are_stored_too(make_llm: Any) -> None:
    llm = make_llm()
    tokens = prompt(100)
    answer = run(llm, tokens, 60).outputs[0].token_ids
    assert llm.reset_prefix_cache()
    assert run(llm, tokens + answer).num_external_tokens == 128


def test_local_hit_comes_first_and_the_rest_is_loaded(make_llm: Any) -> None:
    llm = make_llm()
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.reset_prefix_cache()
    run(llm, tokens[:150])
    output = run(llm, tokens)
    assert output.num_cached_tokens - output.num_external_tokens >= 128
    assert output.num_cached_tokens == 256


def test_restarted_engine_loads_from_disk(make_llm: Any, tmp_path: Path) -> None:
    tokens = prompt(300)
    first = make_llm(fs(tmp_path / "kv"))
    run(first, tokens)
    first.shutdown()
    second = make_llm(fs(tmp_path / "kv"))
    output = run(second, tokens)
    assert output.num_external_tokens == 256
    assert output.external_hit_sources == {"disk": 256}


def test_other_weights_or_salt_never_hit(make_llm: Any, tmp_path: Path) -> None:
    tokens = prompt(300)
    first = make_llm(fs(tmp_path / "kv"))
    run(first, tokens)
    assert first.reset_prefix_cache()
    salted = first.generate(tokens, greedy(2), cache_salt="other")[0]
    assert salted.num_external_tokens == 0
    first.shutdown()
    second = make_llm({**fs(tmp_path / "kv"), "weights_version": "2"})
    assert run(second, tokens).num_external_tokens == 0


@pytest.mark.parametrize("bad_chunk", [0, 2])
def test_one_flipped_byte_on_disk_is_refused(
    make_llm: Any, tmp_path: Path, bad_chunk: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(300)
    first = make_llm(fs(tmp_path / "kv"))
    run(first, tokens)
    first.shutdown()
    chain = KeyChain(Identity("version:1"))
    chain.extend(tokens)
    key = store_key(chain.value_at((bad_chunk + 1) * CHUNK_TOKENS), 0, 0)
    (file,) = (tmp_path / "kv").rglob(f"{key.hex()}.kv")
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    second = make_llm(fs(tmp_path / "kv"))
    assert run(second, tokens).num_external_tokens == bad_chunk * CHUNK_TOKENS
    assert key.hex() in caplog.text, "the refused chunk's key must be named"
    assert second.reset_prefix_cache()
    assert run(second, tokens).num_external_tokens == 256, "stored anew"


def test_a_prefix_larger_than_the_arena_is_claimed_in_part(make_llm: Any, tmp_path: Path) -> None:
    tokens = prompt(900)
    first = make_llm(fs(tmp_path / "kv"))
    run(first, tokens)
    first.shutdown()
    chunk_bytes = 8192
    second = make_llm({**fs(tmp_path / "kv"), "cpu_bytes_to_use": 5 * chunk_bytes})
    assert run(second, tokens).num_external_tokens == 5 * CHUNK_TOKENS
    second.check_integrity()


def test_a_tier_that_blocks_for_minutes_delays_nobody(make_llm: Any) -> None:
    tier = {"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers", "block_s": 300}
    llm = make_llm({"secondary_tiers": [tier], "shutdown_timeout_s": 0.1})
    slowest_s = 0.0
    started_s = time.monotonic()
    ids = [llm.add_request(prompt(200, seed), greedy(5)) for seed in range(20)]
    outputs: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        before_s = time.monotonic()
        outputs.update((output.request_id, output) for output in llm.step())
        slowest_s = max(slowest_s, time.monotonic() - before_s)
        assert time.monotonic() - started_s < 100, "requests wait for the tier"
    assert slowest_s < 60
    for seed, request_id in enumerate(ids):
        assert outputs[request_id].outputs[0].token_ids == StubModel().expected_tokens(prompt(200, seed), 5)
    assert llm.reset_prefix_cache()
    assert run(llm, prompt(200, 19)).num_external_tokens == 192, "the host tier serves meanwhile"


@pytest.mark.parametrize("load_async", [True, False])
def test_many_requests_in_a_small_pool(make_llm: Any, tmp_path: Path, load_async: bool) -> None:
    """Preemption, eviction in host and disk, shared prefixes, aborts: all at once, and every token right."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    llm = make_llm(
        {"load_async": load_async, "cpu_bytes_to_use": 24 * 8192, **fs(tmp_path / "kv", max_bytes=MiB)},
        num_kv_blocks=48,
        max_num_batched_tokens=128,
    )
    wanted: dict[str, tuple[list[int], int]] = {}
    outputs: dict[str, RequestOutput] = {}
    aborted: set[str] = set()
    for _ in range(60):
        tokens = prompt(rng.randrange(20, 400), rng.randrange(4)) + prompt(rng.randrange(1, 50), rng.randrange(100))
        max_tokens = rng.randrange(1, 30)
        wanted[llm.add_request(tokens, greedy(max_tokens))] = (tokens, max_tokens)
        for _ in range(rng.randrange(12)):
            outputs.update((output.request_id, output) for output in llm.step())
            llm.check_integrity()
        if rng.random() < 0.15:
            aborted.add(victim := rng.choice(list(wanted)))
            llm.abort_request(victim)
        if rng.random() < 0.1:
            llm.reset_prefix_cache()
    deadline_s = time.monotonic() + 60
    while llm.has_requests():
        outputs.update((output.request_id, output) for output in llm.step())
        llm.check_integrity()
        assert time.monotonic() < deadline_s, "the engine never came to rest"
    assert set(outputs) == set(wanted)
    external = 0
    for request_id, (tokens, max_tokens) in wanted.items():
        output = outputs[request_id]
        if output.outputs[0].finish_reason == "abort":
            assert request_id in aborted
            continue
        assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, max_tokens), request_id
        external += output.num_external_tokens
    assert external > 0
    assert llm.reset_prefix_cache(), "no block may be held at rest"


def test_abort_while_loading_leaves_nothing_behind(make_llm: Any) -> None:
    llm = make_llm()
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.reset_prefix_cache()
    request_id = llm.add_request(tokens, greedy(5))
    llm.step()
    llm.abort_request(request_id)
    while llm.has_requests():
        llm.step()
        llm.check_integrity()
    assert llm.reset_prefix_cache()
    assert run(llm, tokens).num_external_tokens == 256


def test_reset_with_the_connector_forgets_every_tier(make_llm: Any, tmp_path: Path) -> None:
    llm = make_llm(fs(tmp_path / "kv"))
    run(llm, prompt(300))
    assert llm.reset_prefix_cache(reset_connector=True)
    assert run(llm, prompt(300)).num_external_tokens == 0


def flip_in_host_memory(llm: LLM, where: float) -> int:
    """Flip one bit of every chunk, at `where` of its bytes (0: first, 1: last); returns the number of chunks."""
    assert llm.connector is not None
    store = llm.connector.side.store
    chunks = store._host.chunks()
    for chunk in chunks:
        view = store._host.view(chunk, chunk.payload_bytes)
        view[int(where * (len(view) - 1))] ^= 0x10
    return len(chunks)


@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize("where", [0, 0.5, 0.77, 1])
def test_one_flipped_bit_in_host_memory_is_refused(make_llm: Any, load_async: bool, where: float) -> None:
    llm = make_llm({"load_async": load_async})
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.reset_prefix_cache()
    assert flip_in_host_memory(llm, where) == 4
    output = run(llm, tokens)  # checks the tokens
    assert output.num_external_tokens == 0
    assert llm.connector is not None
    stats = llm.connector.side.store.stats()
    assert sum(stats.invalidated.values()) == 4
    assert llm.reset_prefix_cache()
    assert run(llm, prompt(300, 1)).num_external_tokens == 0
    again = run(llm, tokens)  # the chunks were stored anew, or are computed; never loaded as they were
    assert again.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_part_of_a_flipped_chunk_is_refused(make_llm: Any) -> None:
    """The engine has the chunk's first blocks itself; the bit that flipped is in them, and is not even to be loaded."""
    llm = make_llm()
    tokens = prompt(200)
    run(llm, tokens)
    assert llm.reset_prefix_cache()
    run(llm, tokens[:33])  # two blocks of the first chunk, from host memory or computed: here either way
    flip_in_host_memory(llm, 0)
    assert run(llm, tokens).num_external_tokens == 0


def test_without_the_proof_a_flipped_bit_is_loaded(make_llm: Any) -> None:
    """What `verify_host_loads` is for."""
    llm = make_llm({"verify_host_loads": False})
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.reset_prefix_cache()
    flip_in_host_memory(llm, 0.5)
    output = llm.generate(tokens, greedy(5))[0]
    assert output.num_external_tokens == 256
    assert output.outputs[0].token_ids != StubModel().expected_tokens(tokens, 5)


def test_what_flipped_in_host_memory_comes_back_from_disk(make_llm: Any, tmp_path: Path) -> None:
    llm = make_llm(fs(tmp_path / "kv"))
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.connector is not None
    assert llm.connector.side.store.flush(30)
    assert llm.reset_prefix_cache()
    flip_in_host_memory(llm, 0.3)
    assert run(llm, tokens).num_external_tokens == 0
    assert llm.reset_prefix_cache()
    llm.connector.side.store.prove([chunk.key for chunk in llm.connector.side.store._host.chunks()])
    assert run(llm, tokens).num_external_tokens == 256
