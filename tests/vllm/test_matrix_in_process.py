"""Cells of the matrix on one engine: in-process core, blocks of 128, no prefix caching, synchronous loads, fail."""

from __future__ import annotations

import pytest
from conftest import StartEngine
from engine_process import EngineChild, assert_same_tokens, offloading, random_prompt

BLOCK_SIZE = CHUNK_TOKENS = 128
MAX_TOKENS = 12

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def engine(start_shared_engine: StartEngine, tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> EngineChild:
    tiers = [{"type": "fs", "path": str(tmp_path_factory.mktemp("kv"))}]
    return start_shared_engine(
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        model=tiny_llama,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=BLOCK_SIZE,
        max_model_len=1536,
        max_num_batched_tokens=1536,
        disable_log_stats=False,
        worker_extension_cls="engine_child.WorkerProbe",
        kv_transfer_config=offloading("fail", {"load_async": False, "secondary_tiers": tiers}),
    )


def stored(num_tokens: int) -> int:
    return num_tokens // CHUNK_TOKENS * CHUNK_TOKENS


def test_engine_is_as_said(engine: EngineChild) -> None:
    facts = engine.ask(facts=True)
    assert facts["is_in_process"]
    assert not facts["has_prefix_caching"]
    assert facts["block_size"] == BLOCK_SIZE


@pytest.mark.parametrize("num_tokens", [700, 5 * CHUNK_TOKENS])
def test_hit_from_host_memory(engine: EngineChild, num_tokens: int) -> None:
    prompt = random_prompt(20 + num_tokens, num_tokens)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert cold["external_hits"] == 0
    assert warm["external_hits"] == stored(num_tokens - 1), "a synchronous load leaves one token to compute"
    assert warm["local_hits"] == 0
    assert_same_tokens(warm, cold)


def test_shutdown_and_restart(engine: EngineChild) -> None:
    prompt = random_prompt(21, 700)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert cold["external_hits"] == 0
    assert engine.restart() == 0  # and writes what is not on disk yet
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == stored(700)
    assert_same_tokens(warm, cold)


def test_failed_load_fails_its_request_only(engine: EngineChild) -> None:
    prompt, other = random_prompt(22, 700), random_prompt(23, 300)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    alone = engine.ask(generate=other, max_tokens=MAX_TOKENS)
    engine.ask(reset=True)
    engine.ask(generate=prompt, max_tokens=1)
    engine.ask(rpc="shift_generations", args=[1])
    failed = engine.ask(generate_all=[prompt, other], max_tokens=MAX_TOKENS)
    engine.ask(rpc="shift_generations", args=[-1])
    assert failed["external_hits"] == stored(700)
    assert failed["outputs"][0]["finish_reason"] == "error"
    assert failed["outputs"][0]["token_ids"] == []
    assert_same_tokens(failed["outputs"][1], alone)
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == stored(700)
    assert_same_tokens(warm, cold)
