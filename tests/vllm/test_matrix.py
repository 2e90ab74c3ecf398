"""Cells of the matrix on one engine: core in a process of its own, prefix caching, asynchronous loads, recompute."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import StartEngine
from engine_process import EngineChild, assert_same_tokens, offloading, random_prompt
from tests.patience import wait_until

BLOCK_SIZE = 32
CHUNK_TOKENS = 64
BUDGET = 192
NUM_BLOCKS = 64
MAX_TOKENS = 12

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def engine(start_shared_engine: StartEngine, tiny_llama: str, folder: Path) -> EngineChild:
    return start_shared_engine(
        model=tiny_llama,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_BLOCKS,
        max_model_len=1536,
        max_num_batched_tokens=BUDGET,
        disable_log_stats=False,
        worker_extension_cls="engine_child.WorkerProbe",
        kv_transfer_config=offloading("recompute", {"secondary_tiers": [{"type": "fs", "path": str(folder)}]}),
    )


def stored(num_tokens: int) -> int:
    return num_tokens // CHUNK_TOKENS * CHUNK_TOKENS


def test_engine_is_as_said(engine: EngineChild) -> None:
    facts = engine.ask(facts=True)
    assert not facts["is_in_process"]
    assert facts["num_compiled_graphs"] == 0
    assert facts["has_prefix_caching"]
    assert facts["block_size"] == BLOCK_SIZE


def test_hit_without_a_local_hit(engine: EngineChild) -> None:
    prompt = random_prompt(1, 700)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert cold["external_hits"] == cold["local_hits"] == 0
    engine.ask(reset=False)
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == stored(700)
    assert warm["local_hits"] == 0
    assert_same_tokens(warm, cold)


def test_other_weights_are_refused_while_kv_is_named_by_those_that_were_loaded(
    engine: EngineChild, tiny_llama: str
) -> None:
    """The next engine would find their KV under the name of the first. The same weights may be loaded again."""
    cold = engine.ask(generate=random_prompt(21, 200), max_tokens=MAX_TOKENS)
    *refused, same = engine.ask(rpc="refused_weights", args=[tiny_llama])["answers"][0]
    assert all("is refused" in said and "weights_version" in said for said in refused), refused
    assert same == ""
    engine.ask(reset=False)
    assert_same_tokens(engine.ask(generate=random_prompt(21, 200), max_tokens=MAX_TOKENS), cold)


def test_local_hits_come_first(engine: EngineChild) -> None:
    prompt = random_prompt(2, 700)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    again = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert again["external_hits"] == 0
    assert again["local_hits"] == 700 // BLOCK_SIZE * BLOCK_SIZE
    engine.ask(reset=False)
    engine.ask(generate=prompt[:200], max_tokens=1)
    mixed = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert mixed["local_hits"] == 200 // BLOCK_SIZE * BLOCK_SIZE
    assert mixed["external_hits"] == stored(700) - mixed["local_hits"]
    assert_same_tokens(mixed, cold)


def test_prefill_in_chunks_behind_a_hit(engine: EngineChild) -> None:
    prompt = random_prompt(3, 320) + random_prompt(4, 500)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    engine.ask(reset=True)
    engine.ask(generate=prompt[:320], max_tokens=1)
    engine.ask(reset=False)
    engine.ask(rpc="watch_steps")
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    steps = [BUDGET, BUDGET, 500 - 2 * BUDGET]
    assert engine.ask(rpc="num_computed")["answers"][0] == [*steps, *[1] * (MAX_TOKENS - 1)]
    assert warm["external_hits"] == 320
    assert warm["local_hits"] == 0
    assert_same_tokens(warm, cold)


def test_reset_of_the_connector_forgets_everything(engine: EngineChild, folder: Path) -> None:
    prompt = random_prompt(5, 400)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    engine.ask(reset=False)
    assert engine.ask(generate=prompt, max_tokens=MAX_TOKENS)["external_hits"] == stored(400)
    engine.ask(reset=True)
    wait_until("the files are gone", lambda: not list(folder.rglob("*.kv")))
    after = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert after["external_hits"] == after["local_hits"] == 0
    assert_same_tokens(after, cold)
    engine.ask(reset=False)
    assert engine.ask(generate=prompt, max_tokens=MAX_TOKENS)["external_hits"] == stored(400)


def test_preempted_requests_are_continued(engine: EngineChild) -> None:
    prompts, num_tokens = [random_prompt(seed, 500) for seed in (6, 7, 8)], 200
    assert len(prompts) * 500 < NUM_BLOCKS * BLOCK_SIZE < len(prompts) * (500 + num_tokens)
    cold = [engine.ask(generate=prompt, max_tokens=num_tokens) for prompt in prompts]
    assert not any(alone["num_preemptions"] for alone in cold)
    engine.ask(reset=False)
    together = engine.ask(generate_all=prompts, max_tokens=num_tokens)
    assert together["num_preemptions"] > 0
    assert together["external_hits"] == len(prompts) * stored(500)
    for got, alone in zip(together["outputs"], cold, strict=True):
        assert_same_tokens(got, alone)


def test_aborted_request_leaves_its_chunks_and_no_block(engine: EngineChild) -> None:
    prompt = random_prompt(9, 400)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    engine.ask(reset=True)
    aborted = engine.ask(abort_running=prompt, after_tokens=3)
    assert aborted["external_hits"] == 0
    assert aborted["num_tokens"] >= 3
    assert not aborted["is_unfinished"]
    engine.ask(reset=False)  # waits until no block is held
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == stored(400)
    assert_same_tokens(warm, cold)


def test_abort_while_loading(engine: EngineChild) -> None:
    prompt = random_prompt(10, 400)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    engine.ask(reset=False)
    aborted = engine.ask(abort_loading=prompt)
    assert not aborted["is_free_while_loading"], "blocks that are being written must not be handed out"
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] >= stored(400)
    assert warm["local_hits"] == 0
    assert_same_tokens(warm, cold)


def test_failed_load_is_computed_again(engine: EngineChild) -> None:
    prompt = random_prompt(11, 400)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    engine.ask(reset=False)
    engine.ask(rpc="shift_generations", args=[1])
    failed = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert failed["external_hits"] >= stored(400), "the load was tried"
    assert "was given to another chunk" in engine.log.read_text()
    assert_same_tokens(failed, cold)
    engine.ask(rpc="shift_generations", args=[-1])
    engine.ask(reset=False)
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == stored(400)
    assert_same_tokens(warm, cold)
