"""Cells of the matrix that need an engine each: a compiled model; a hybrid one; two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import StartEngine
from engine_process import assert_same_tokens, offloading, random_prompt
from tests.patience import wait_until

BLOCK_SIZE = 32
CHUNK_TOKENS = 64
MAX_TOKENS = 12
SHARD_BYTES = 4  # a key ends with group and rank, two bytes each

pytestmark = pytest.mark.timeout(1500)


def engine_args(model: str, policy: str, extra: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK_SIZE,
        "max_model_len": 1536,
        "max_num_batched_tokens": 256,
        "disable_log_stats": False,
        "worker_extension_cls": "engine_child.WorkerProbe",
        "kv_transfer_config": offloading(policy, extra),
        **more,
    }


def test_compiled_model(start_engine: StartEngine, tiny_llama: str) -> None:
    engine = start_engine(**engine_args(tiny_llama, "recompute", {"load_async": False}, enforce_eager=False))
    prompt = random_prompt(30, 700)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert cold["external_hits"] == 0
    assert engine.ask(facts=True)["num_compiled_graphs"] > 0
    engine.ask(reset=False)
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == 640
    assert warm["local_hits"] == 0
    assert_same_tokens(warm, cold)

    engine.ask(reset=False)
    engine.ask(rpc="shift_generations", args=[1])
    failed = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert failed["external_hits"] == 640, "the load was tried, and what was computed over it discarded"
    assert "was given to another chunk" in engine.log.read_text()
    assert_same_tokens(failed, cold)


def test_hybrid_model(start_engine: StartEngine, tiny_gemma3: str) -> None:
    engine = start_engine(**engine_args(tiny_gemma3, "fail", {}))
    addresses = engine.ask(facts=True)["layers_by_group"]
    assert len(addresses) == 3
    assert addresses[0] == addresses[1] == addresses[2], "the groups' tensors overlay each other"
    prompt, other = random_prompt(31, 700), random_prompt(32, 300)
    cold = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    alone = engine.ask(generate=other, max_tokens=MAX_TOKENS)
    assert cold["external_hits"] == 0
    assert len(set(cold["token_ids"])) > 1
    engine.ask(reset=False)
    warm = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == 640
    assert warm["local_hits"] == 0
    assert_same_tokens(warm, cold)

    engine.ask(reset=True)
    engine.ask(generate=prompt, max_tokens=1)
    engine.ask(reset=False)
    engine.ask(rpc="shift_generations", args=[1])
    failed = engine.ask(generate_all=[prompt, other], max_tokens=MAX_TOKENS)
    engine.ask(rpc="shift_generations", args=[-1])
    assert failed["outputs"][0]["finish_reason"] == "error"
    assert_same_tokens(failed["outputs"][1], alone)
    engine.ask(reset=False)
    assert_same_tokens(engine.ask(generate=prompt, max_tokens=MAX_TOKENS), cold)


def shards(folder: Path) -> dict[str, set[int]]:
    """Chunk -> the ranks whose shards are on disk, from the file names."""
    found: dict[str, set[int]] = {}
    for path in folder.rglob("*.kv"):
        key = bytes.fromhex(path.stem)
        found.setdefault(key[:-2].hex(), set()).add(int.from_bytes(key[-2:], "little"))
    return found


def test_two_ranks(start_engine: StartEngine, tiny_llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    extra = {"weights_version": "tiny 1", "secondary_tiers": [{"type": "fs", "path": str(folder)}]}
    args = engine_args(tiny_llama, "recompute", extra, tensor_parallel_size=2)
    whole, broken = random_prompt(33, 400), random_prompt(34, 400)

    first = start_engine(**args)
    cold_whole = first.ask(generate=whole, max_tokens=MAX_TOKENS)
    wait_until("both ranks' shards are on disk", lambda: list(shards(folder).values()) == [{0, 1}] * 6)
    chunks_of_whole = set(shards(folder))
    cold_broken = first.ask(generate=broken, max_tokens=MAX_TOKENS)
    wait_until("both ranks' shards are on disk", lambda: list(shards(folder).values()) == [{0, 1}] * 12)
    assert cold_whole["external_hits"] == cold_broken["external_hits"] == 0
    first.kill()
    for chunk in set(shards(folder)) - chunks_of_whole:
        (file,) = folder.rglob(f"{chunk}0100.kv")  # rank 1's
        file.unlink()

    second = start_engine(**args)
    warm = second.ask(generate=whole, max_tokens=MAX_TOKENS)
    assert warm["external_hits"] == 384
    assert_same_tokens(warm, cold_whole)
    missed = second.ask(generate=broken, max_tokens=MAX_TOKENS)
    assert missed["external_hits"] == missed["local_hits"] == 0
    assert_same_tokens(missed, cold_broken)
