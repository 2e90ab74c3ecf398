"""Two real vLLM engines: one prefills, the other decodes with its KV, over shared memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, StartEngine
from engine_process import EngineChild, assert_same_tokens, random_prompt

BLOCK_SIZE = 32
NUM_LAYERS = 3
TOKEN_BYTES = NUM_LAYERS * TINY["num_key_value_heads"] * 2 * TINY["head_dim"] * 4  # K and V in float32
NUM_TOKENS = 203
MAX_TOKENS = 12
DECODE = {"do_remote_decode": True}
DEADLINE_S = 20

pytestmark = pytest.mark.timeout(400)


def engine_args(model: str, role: str, policy: str, mode: str = "pull", **more: Any) -> dict[str, Any]:
    transfer = {
        "kv_connector": "P2PConnector",
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"transport": "shm", "mode": mode, "handshake_s": 3.0},
    }
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": 64,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "disable_log_stats": False,
        "worker_extension_cls": "engine_child.WorkerProbe",
        "kv_transfer_config": transfer,
        **more,
    }


def moved(engine: EngineChild, op: str) -> int:
    """Bytes that the workers' shm transports have seen land."""
    counters = engine.ask(rpc="moved_bytes")["answers"]
    assert all(set(counter) == {"shm"} for counter in counters)
    return sum(counter["shm"][op] for counter in counters)


def tokens_of(engine: EngineChild, folder: Path, block_ids: list[int], num_tokens: int) -> np.ndarray[Any, Any]:
    """What stands in these blocks: [layers, tokens, heads over all ranks, K then V]."""
    folder.mkdir(exist_ok=True)
    engine.ask(rpc="save_kv", args=[str(folder), block_ids])
    ranks = [np.load(path)[:, :num_tokens] for path in sorted(folder.glob("rank*.npy"))]
    return np.concatenate(ranks, axis=2)


def prefill(engine: EngineChild, prompt: list[int]) -> dict[str, Any]:
    """The parameters for a decode engine."""
    reply = engine.ask(generate=prompt, max_tokens=1, transfer=DECODE)
    params: dict[str, Any] = reply["kv_transfer_params"]
    assert params["do_remote_prefill"]
    assert params["remote_num_tokens"] == len(prompt)
    assert params["remote_first_token_ids"] == reply["token_ids"]
    return params


def check_hand_over(
    p: EngineChild, d: EngineChild, prompt: list[int], reference: dict[str, Any], tmp_path: Path, num_local: int = 0
) -> None:
    """Tokens, counters and bytes of one hand-over of which D has `num_local` tokens already."""
    params = prefill(p, prompt)
    mover, op = (d, "read") if params["transfer_mode"] == "pull" else (p, "write")
    source = tokens_of(p, tmp_path / "p", params["remote_block_ids"][0], len(prompt))
    before = moved(mover, op)
    got = d.ask(generate=prompt, max_tokens=MAX_TOKENS, transfer=params)
    assert got["finish_reason"] == "length"
    assert (got["local_hits"], got["external_hits"]) == (num_local, len(prompt) - num_local)
    assert moved(mover, op) - before == (len(prompt) - num_local) * TOKEN_BYTES
    job = mover.ask(rpc="jobs")["answers"][0][-1]
    assert (job["op"], job["tokens"]) == (op, [num_local, len(prompt)])
    blocks = job["blocks" if mover is d else "to"][0]
    destination = tokens_of(d, tmp_path / "d", blocks, len(prompt))
    assert np.abs(source).any(axis=3).all(), "there is something to compare in every token"
    np.testing.assert_array_equal(source[:, :-1], destination[:, :-1])
    np.testing.assert_allclose(source[:, -1], destination[:, -1], rtol=1e-3, atol=1e-4)  # vLLM computes it again
    assert_same_tokens(got, reference)


def reference_of(engine: EngineChild, prompt: list[int]) -> dict[str, Any]:
    """What the engine says by itself; it has forgotten the prompt afterwards."""
    alone = engine.ask(generate=prompt, max_tokens=MAX_TOKENS)
    assert alone["external_hits"] == 0
    engine.ask(reset=False)
    return alone


def kv_file(engine: EngineChild) -> Path:
    """The shared file that all KV of the engine's only worker lies in."""
    (files,) = engine.ask(rpc="kv_files")["answers"]
    assert len(files) == 1
    return Path(files[0])


def test_either_role(start_engine: StartEngine, tiny_llama: str, tmp_path: Path) -> None:
    args = engine_args(tiny_llama, "kv_both", "fail")
    p, d = start_engine(**args), start_engine(**args)
    files = [kv_file(p), kv_file(d)]
    assert all(file.parent == Path("/dev/shm") for file in files)
    for engine in (p, d):
        engine.ask(rpc="watch_jobs")
    long, short = random_prompt(50, NUM_TOKENS), random_prompt(51, 17)
    references = {len(prompt): reference_of(p, prompt) for prompt in (long, short)}

    check_hand_over(p, d, long, references[len(long)], tmp_path)
    # D keeps whole blocks, and only asks for the rest.
    check_hand_over(p, d, long, references[len(long)], tmp_path, num_local=NUM_TOKENS // BLOCK_SIZE * BLOCK_SIZE)
    check_hand_over(p, d, short, references[len(short)], tmp_path)
    check_hand_over(d, p, short, references[len(short)], tmp_path)  # the other way round

    params = prefill(p, random_prompt(52, NUM_TOKENS))
    p.kill()
    failed = d.ask(generate=random_prompt(52, NUM_TOKENS), max_tokens=MAX_TOKENS, transfer=params)
    assert failed["finish_reason"] == "error"
    assert failed["seconds"] < DEADLINE_S
    assert_same_tokens(d.ask(generate=short, max_tokens=MAX_TOKENS), references[len(short)])
    d.ask(reset=False)  # no block is held
    assert d.stop() == 0
    assert not files[1].exists()
    assert " ERROR " not in d.log.read_text()


def test_producer_and_consumer(start_engine: StartEngine, tiny_llama: str, tmp_path: Path) -> None:
    """D's engine core runs in its own process's main thread; P is killed, and comes again as one that pushes."""
    p = start_engine(**engine_args(tiny_llama, "kv_producer", "fail"))
    d = start_engine({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, **engine_args(tiny_llama, "kv_consumer", "recompute"))
    d.ask(rpc="watch_jobs")
    prompt, other, third = (random_prompt(seed, NUM_TOKENS) for seed in (60, 61, 62))
    references = [reference_of(p, tokens) for tokens in (prompt, other, third)]

    check_hand_over(p, d, prompt, references[0], tmp_path)
    params = prefill(p, other)
    watched = d.ask(watched=other, max_tokens=MAX_TOKENS, transfer=params)
    assert watched["as_seen"] == params
    assert watched["external_hits"] == NUM_TOKENS
    assert_same_tokens(watched, references[1])

    params = prefill(p, third)
    p.kill()
    recomputed = d.ask(generate=third, max_tokens=MAX_TOKENS, transfer=params)
    assert recomputed["seconds"] < DEADLINE_S
    assert_same_tokens(recomputed, references[2])
    d.ask(reset=False)

    pushing = start_engine(**engine_args(tiny_llama, "kv_producer", "fail", mode="push"))
    pushing.ask(rpc="watch_jobs")
    check_hand_over(pushing, d, prompt, references[0], tmp_path)
    assert pushing.stop() == d.stop() == 0
