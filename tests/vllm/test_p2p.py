"""Real vLLM engines, one of which prefills while the other decodes with its KV: two alike, of one rank and of two, and
one beside the embedded engine, whose KV lies otherwise.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, StartEngine, StartEngines
from engine_process import PATIENT, EngineChild, assert_same_tokens, offloading, random_prompt

from kvferry import LLM, SamplingParams
from kvferry.engine.kv_groups import layer_name

BLOCK_SIZE = 32
WINDOW = 64
NUM_LAYERS = 3
TOKEN_BYTES = NUM_LAYERS * TINY["num_key_value_heads"] * 2 * TINY["head_dim"] * 4  # K and V in float32
NUM_TOKENS = 203
MAX_TOKENS = 12
DECODE = {"do_remote_decode": True}
DEADLINE_S = 150
"""A load from an engine that was killed has failed by then: the connection's end says so, not a deadline of PATIENT."""

pytestmark = pytest.mark.timeout(1500)


def transfer_config(role: str, policy: str, name: str = "P2PConnector", **extra: Any) -> dict[str, Any]:
    transport = {"transport": "shm"} if name == "P2PConnector" else {}
    return {
        "kv_connector": name,
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {**transport, **PATIENT, **extra},
    }


def engine_args(model: str, transfer: dict[str, Any], **more: Any) -> dict[str, Any]:
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
        "kv_transfer_config": {"kv_connector_module_path": "kvferry.vllm", **transfer},
        **more,
    }


def moved(engine: EngineChild, op: str, transport: str = "shm") -> int:
    """Bytes that the workers' only transport has seen land."""
    counters = engine.ask(rpc="moved_bytes")["answers"]
    assert all(set(counter) == {transport} for counter in counters)
    return sum(counter[transport][op] for counter in counters)


def tokens_of(
    engine: EngineChild, folder: Path, block_ids: list[int], num_tokens: int, group: int = 0
) -> np.ndarray[Any, Any]:
    """What stands in these blocks of a group: [layers, tokens, heads over all ranks, K then V]."""
    folder.mkdir(exist_ok=True)
    engine.ask(rpc="save_kv", args=[str(folder), block_ids, group])
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
    p: EngineChild,
    d: EngineChild,
    prompt: list[int],
    reference: dict[str, Any],
    folder: Path,
    num_local: int = 0,
    transport: str = "shm",
) -> None:
    """Tokens, counters and bytes of one hand-over of which D has `num_local` tokens already."""
    params = prefill(p, prompt)
    mover, op = (d, "read") if params["transfer_mode"] == "pull" else (p, "write")
    source = tokens_of(p, folder / p.log.stem, params["remote_block_ids"][0], len(prompt))
    before = moved(mover, op, transport)
    d.ask(rpc="num_computed")
    got = d.ask(generate=prompt, max_tokens=MAX_TOKENS, transfer=params)
    assert (got["finish_reason"], got["kv_transfer_params"]) == ("length", None)
    # No first token is handed over to vLLM: it computes the prompt's last token again, and only that.
    assert d.ask(rpc="num_computed")["answers"][0] == [1] * MAX_TOKENS
    assert (got["local_hits"], got["external_hits"]) == (num_local, len(prompt) - num_local)
    assert moved(mover, op, transport) - before == (len(prompt) - num_local) * TOKEN_BYTES
    job = mover.ask(rpc="jobs")["answers"][0][-1]
    assert (job["op"], job["tokens"]) == (op, [num_local, len(prompt)])
    blocks = job["blocks" if mover is d else "to"][0]
    destination = tokens_of(d, folder / d.log.stem, blocks, len(prompt))
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


def test_either_role(start_engines: StartEngines, tiny_llama: str, tmp_path: Path) -> None:
    args = engine_args(tiny_llama, transfer_config("kv_both", "fail"))
    p, d = start_engines(args, args)
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
    assert d.ask(rpc="affinities")["answers"] == [[sorted(os.sched_getaffinity(0))]], "no thread was bound"

    check_other_tokens(p, d, references[len(long)])

    params = prefill(p, random_prompt(52, NUM_TOKENS))
    p.kill()
    failed = d.ask(generate=random_prompt(52, NUM_TOKENS), max_tokens=MAX_TOKENS, transfer=params)
    assert failed["finish_reason"] == "error"
    assert failed["seconds"] < DEADLINE_S
    assert_same_tokens(d.ask(generate=short, max_tokens=MAX_TOKENS), references[len(short)])
    d.ask(reset=False)  # no block is held
    assert d.stop() == 0
    assert not files[1].exists()
    log = d.log.read_text()
    assert re.search(r"(?m)^\(Worker pid=\d+\) INFO .* \[links.py:\d+\] KV between .* moves over shm$", log)
    assert " ERROR " not in log


def check_other_tokens(p: EngineChild, d: EngineChild, reference: dict[str, Any]) -> None:
    """D is sent for the KV of other tokens: of as many, or of fewer. It says so, reads nothing, and caches nothing."""
    long = random_prompt(50, NUM_TOKENS)
    d.ask(reset=False)
    before = moved(d, "read")
    prompts = ([*long[:100], (long[100] + 1) % 90, *long[101:]], [(long[0] + 1) % 90, *long[1:150]])
    references = [reference_of(p, wrong) for wrong in prompts]
    for wrong, right in zip(prompts, references, strict=True):
        failed = d.ask(generate=wrong, max_tokens=MAX_TOKENS, transfer=prefill(p, long))
        assert failed["finish_reason"] == "error"
        assert "the KV of other tokens" in d.log.read_text()
        alone = d.ask(generate=wrong, max_tokens=MAX_TOKENS)
        assert alone["local_hits"] == 0
        assert_same_tokens(alone, right)
    assert moved(d, "read") == before
    d.ask(reset=False)
    assert_same_tokens(d.ask(generate=long, max_tokens=MAX_TOKENS, transfer=prefill(p, long)), reference)
    assert moved(d, "read") == before + NUM_TOKENS * TOKEN_BYTES


def test_producer_and_consumer(start_engines: StartEngines, tiny_llama: str, tmp_path: Path) -> None:
    """P is killed, and comes again as one that pushes. D's core is in one process with its client."""
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    p, d = start_engines(
        engine_args(tiny_llama, transfer_config("kv_producer", "fail")),
        engine_args(tiny_llama, transfer_config("kv_consumer", "recompute"), env=in_process),
    )
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
    check_recomputed(recomputed, references[2])
    d.ask(reset=False)

    (pushing,) = start_engines(engine_args(tiny_llama, transfer_config("kv_producer", "fail", mode="push")))
    pushing.ask(rpc="watch_jobs")
    check_hand_over(pushing, d, prompt, references[0], tmp_path)
    assert pushing.stop() == d.stop() == 0


def check_recomputed(got: dict[str, Any], reference: dict[str, Any]) -> None:
    """The load failed in time; the tokens are right, and a strict proxy is told, also of engines that recompute."""
    assert got["seconds"] < DEADLINE_S
    assert got["kv_transfer_params"]["num_recomputed_tokens"] == NUM_TOKENS - 1
    assert got["kv_transfer_params"]["load_error"]
    assert_same_tokens(got, reference)


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_what_nobody_fetches_comes_free_when_it_is_given_back(
    start_engine: StartEngine, tiny_llama: str, mode: str
) -> None:
    """By an ordinary request: of vLLM's server kvferry has no route. `reset` waits for less than the lease's 400 s."""
    p = start_engine(**engine_args(tiny_llama, transfer_config("kv_producer", "fail", mode=mode)))
    for seed, name in ((63, "remote_lease_id"), (64, "transfer_id")):
        asked = {**DECODE, "transfer_id": f"transfer {seed}"}
        reply = p.ask(generate=random_prompt(seed, NUM_TOKENS), max_tokens=1, transfer=asked)
        given_back = {"do_release": True, name: reply["kv_transfer_params"][name]}
        assert p.ask(generate=[1], max_tokens=1, transfer=given_back)["kv_transfer_params"] is None
        p.ask(reset=False)  # no block is held
    assert p.stop() == 0


def give_back(engine: EngineChild, params: dict[str, Any]) -> None:
    """Else the engine waits for the lease's end before it stops."""
    engine.ask(generate=[1], max_tokens=1, transfer={"do_release": True, "remote_lease_id": params["remote_lease_id"]})


def test_over_nixl(start_engines: StartEngines, tiny_llama: str, tmp_path: Path) -> None:
    """One engine pulls, the other pushes; both hand over and take. Its successor only has the name."""
    pushes, pulls = start_engines(
        *(
            engine_args(tiny_llama, transfer_config("kv_both", "recompute", name))
            for name in ("NixlPushConnector", "NixlPullConnector")
        )
    )
    for engine in (pushes, pulls):
        engine.ask(rpc="watch_jobs")
    prompts = [random_prompt(seed, NUM_TOKENS) for seed in (80, 81, 82)]
    references = [reference_of(pushes, prompt) for prompt in prompts]
    check_hand_over(pulls, pushes, prompts[0], references[0], tmp_path, transport="nixl")
    check_hand_over(pushes, pulls, prompts[1], references[1], tmp_path, transport="nixl")
    params = prefill(pushes, prompts[2])
    pushes.kill()
    check_recomputed(pulls.ask(generate=prompts[2], max_tokens=MAX_TOKENS, transfer=params), references[2])
    (plain,) = start_engines(engine_args(tiny_llama, transfer_config("kv_both", "fail", "NixlConnector")))
    plain.ask(rpc="watch_jobs")
    check_hand_over(pulls, plain, prompts[0], references[0], tmp_path, transport="nixl")
    assert pulls.stop() == plain.stop() == 0


@pytest.mark.timeout(1500)
def test_one_rank_and_two(start_engines: StartEngines, tiny_llama: str, tmp_path: Path) -> None:
    """Each rank's half of the heads, and back."""
    args = engine_args(tiny_llama, transfer_config("kv_both", "fail"))
    one, two = start_engines(args, {**args, "tensor_parallel_size": 2})
    for engine in (one, two):
        engine.ask(rpc="watch_jobs")
    first, second = random_prompt(70, NUM_TOKENS), random_prompt(71, NUM_TOKENS)
    references = [reference_of(one, prompt) for prompt in (first, second)]
    check_hand_over(one, two, first, references[0], tmp_path)
    shards = [np.load(path) for path in sorted((tmp_path / two.log.stem).glob("rank*.npy"))]
    assert [shard.shape[2] for shard in shards] == [1, 1], "one of the two heads on each rank"
    check_hand_over(two, one, second, references[1], tmp_path)
    assert one.stop() == two.stop() == 0


def test_hybrid_model(start_engines: StartEngines, tiny_gemma3: str, tmp_path: Path) -> None:
    """Of two of the three groups only the window's blocks are handed over."""
    args = engine_args(tiny_gemma3, transfer_config("kv_both", "fail"))
    p, d = start_engines(args, args)
    groups = p.ask(facts=True)["layers_by_group"]
    assert [len(layers) for layers in groups] == [2, 2, 2]
    assert groups[0][0] == groups[1][0] == groups[2][0], "the groups' tensors overlay each other"
    for engine in (p, d):
        engine.ask(rpc="watch_jobs")
    prompt = random_prompt(95, NUM_TOKENS)
    reference = reference_of(p, prompt)
    assert len(set(reference["token_ids"])) > 1

    params = prefill(p, prompt)
    first_block = (NUM_TOKENS - WINDOW) // BLOCK_SIZE
    num_blocks = -(-NUM_TOKENS // BLOCK_SIZE)
    assert [[block == 0 for block in table].index(False) for table in params["remote_block_ids"]] == [
        first_block, first_block, 0,
    ]  # fmt: skip
    firsts = [first_block * BLOCK_SIZE, first_block * BLOCK_SIZE, 0]
    sources = [
        tokens_of(p, tmp_path / "p", table[first // BLOCK_SIZE :], NUM_TOKENS - first, group)
        for group, (table, first) in enumerate(zip(params["remote_block_ids"], firsts, strict=True))
    ]
    got = d.ask(generate=prompt, max_tokens=MAX_TOKENS, transfer=params)
    assert (got["finish_reason"], got["external_hits"]) == ("length", NUM_TOKENS)
    assert moved(d, "read") == sum(NUM_TOKENS - first for first in firsts) * 2 * TOKEN_BYTES // NUM_LAYERS
    (job,) = d.ask(rpc="jobs")["answers"][0]
    for group, (source, first) in enumerate(zip(sources, firsts, strict=True)):
        table = job["blocks"][group][first // BLOCK_SIZE : num_blocks]
        destination = tokens_of(d, tmp_path / "d", table, NUM_TOKENS - first, group)
        assert np.abs(source).any(axis=3).all()
        np.testing.assert_array_equal(source[:, :-1], destination[:, :-1])
    assert_same_tokens(got, reference)
    assert p.stop() == d.stop() == 0


def test_a_window_that_begins_with_a_block(start_engines: StartEngines, tiny_gemma3: str) -> None:
    """vLLM computes the last prompt token again, which sees one token more: that token's block is loaded, too."""
    args = engine_args(tiny_gemma3, transfer_config("kv_both", "fail"))
    p, d = start_engines(args, args)
    d.ask(rpc="watch_jobs")
    num_tokens = WINDOW + 4 * BLOCK_SIZE - 1
    prompt = random_prompt(96, num_tokens)
    reference = reference_of(p, prompt)
    got = d.ask(generate=prompt, max_tokens=MAX_TOKENS, transfer=prefill(p, prompt))
    assert (got["finish_reason"], got["external_hits"]) == ("length", num_tokens - 1)
    (job,) = d.ask(rpc="jobs")["answers"][0]
    first_seen = (num_tokens - WINDOW) // BLOCK_SIZE
    assert [table.index(next(filter(None, table))) for table in job["blocks"]] == [first_seen, first_seen, 0]
    assert_same_tokens(got, reference)
    assert p.stop() == d.stop() == 0


class Embedded:
    """The embedded engine in this process: block-first KV in blocks of 16."""

    def __init__(self, model: str, **extra: Any) -> None:
        transfer = transfer_config("kv_both", "fail", **extra)
        self.llm = LLM(model, dtype="float32", block_size=16, num_kv_blocks=64, kv_transfer_config=transfer)
        assert self.llm.kv_caches[layer_name(0)].stride()[0] > NUM_LAYERS * 16 * 2 * 64 - 1, (
            "all layers of a block together"
        )

    def run(self, name: str, prompt: list[int], max_tokens: int, transfer: dict[str, Any]) -> tuple[Any, list[int]]:
        """The output, and the blocks that the request had at its first token."""
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args={"kv_transfer_params": transfer}
        )
        self.llm.add_request(prompt, sampling, request_id=name)
        blocks: list[int] = []
        while True:
            for output in self.llm.step():
                if output.finished:
                    return output, blocks
                blocks = blocks or list(self.llm.scheduler.manager.get_block_ids(name)[0])
            if not self.llm.has_moved:
                time.sleep(0.001)

    def step_while(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `call`, in another thread, returns; an engine that pushes must step for that."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(call)
            while not answer.done():
                self.llm.step()
                time.sleep(0.001)
            return answer.result()

    def tokens_of(self, block_ids: list[int], num_tokens: int) -> np.ndarray[Any, Any]:
        """As the function of this name."""
        layers = [self.llm.kv_caches[layer_name(layer)][block_ids].permute(0, 2, 1, 3) for layer in range(NUM_LAYERS)]
        return np.stack([layer.flatten(0, 1)[:num_tokens].numpy().copy() for layer in layers])


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_beside_the_embedded_engine(
    start_engine: StartEngine, tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    vllm = start_engine(**engine_args(tiny_llama, transfer_config("kv_both", "fail", mode=mode)))
    vllm.ask(rpc="watch_jobs")
    embedded = Embedded(tiny_llama, mode=mode)
    here, there, third = (random_prompt(seed, NUM_TOKENS) for seed in (90, 91, 92))
    references = [reference_of(vllm, prompt) for prompt in (here, there, third)]
    num_bytes = NUM_TOKENS * TOKEN_BYTES

    # prefill here, decode in vLLM
    output, _ = embedded.run("p", here, 1, DECODE)
    source = embedded.tokens_of(output.kv_transfer_params["remote_block_ids"][0], NUM_TOKENS)
    got = embedded.step_while(
        lambda: vllm.ask(generate=here, max_tokens=MAX_TOKENS, transfer=output.kv_transfer_params)
    )
    assert got["external_hits"] == NUM_TOKENS
    if mode == "push":
        assert embedded.llm.connector_stats.media["shm"].stored_bytes == num_bytes
    else:  # who moves the bytes knows the blocks
        assert moved(vllm, "read") == num_bytes
        (job,) = vllm.ask(rpc="jobs")["answers"][0]
        destination = tokens_of(vllm, tmp_path / "vllm", job["blocks"][0], NUM_TOKENS)
        np.testing.assert_array_equal(source[:, :-1], destination[:, :-1])
    assert_same_tokens(got, references[0])

    # prefill in vLLM, decode here
    params = prefill(vllm, there)
    source = tokens_of(vllm, tmp_path / "vllm", params["remote_block_ids"][0], NUM_TOKENS)
    output, blocks = embedded.run("d", there, MAX_TOKENS, params)
    assert output.num_external_tokens == NUM_TOKENS
    loaded_bytes = embedded.llm.connector_stats.media["shm"].loaded_bytes
    assert (loaded_bytes if mode == "pull" else moved(vllm, "write")) == num_bytes
    np.testing.assert_array_equal(source, embedded.tokens_of(blocks, NUM_TOKENS))
    assert_same_tokens({"token_ids": output.outputs[0].token_ids}, references[1])
    embedded.llm.shutdown()

    other = Embedded(tiny_llama, weights_version="of another training")
    params = prefill(vllm, third)
    output, _ = other.run("d", third, MAX_TOKENS, params)
    assert output.outputs[0].finish_reason == "error"
    assert "weights: " in caplog.text
    assert "version:of another training" in caplog.text
    other.llm.shutdown()
    give_back(vllm, params)
    assert vllm.stop() == 0


# ---- what hostile clients send -------------------------------------------------------------------------------

LONG, DIGITS, HALF = "x" * 100_000, "\u0663\u0664", "\ud800"
NOT_ALLOWED = {"remote_host": "10.1.2.3"}
POISON: list[dict[str, Any]] = [
    *({"remote_host": host} for host in (5, "", LONG, DIGITS, "a\0b", HALF, "10.1.2.3", ["127.0.0.1"], {"a": 1})),
    *({"remote_port": port} for port in (0, -1, 1 << 16, 2**63, -(2**63), 1.5, True, DIGITS, "80", [80] * 50_000)),
    *(
        {name: value}
        for name in ("remote_lease_id", "remote_generation")
        for value in (7, "", LONG, DIGITS * 16, "0" * 32, "F" * 32, "0" * 31 + "\0", HALF, ["0" * 32], {"a": 1})
    ),
    *({"remote_num_tokens": number} for number in (-1, 2**63, 1.5, True, "40", DIGITS, [40])),
    *({"remote_first_token_ids": ids} for ids in (7, [-1], [2**63], [1.5], ["a"], [5] * 50_000, {"a": 1})),
    *({"transfer_mode": mode} for mode in (7, "throw", LONG, ["pull"])),
    *({"transfer_id": name} for name in (7, "", LONG, HALF, ["a"] * 50_000)),
    *(NOT_ALLOWED | {"peer_token": token} for token in (None, 7, LONG, HALF, f"v1.{DIGITS}.{'A' * 43}", [1] * 50_000)),
    *({"remote_host": None, name: None} for name in ("remote_port", "remote_lease_id")),
]
"""What a request changes in parameters that are right."""
HARMLESS: list[Any] = [
    {"do_release": True, "remote_lease_id": ["x"] * 50_000, "transfer_id": 2**63},
    {"do_release": 1.5, "transfer_id": HALF},
    {"children": 5},
    {"children": {"P2PConnector": {"do_remote_prefill": True}}},
    {"remote_port": 2**63},
]
"""Whole parameters that ask for nothing."""
SHORT = random_prompt(97, 50)


def ask_all(engine: EngineChild, transfers: list[Any]) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = engine.ask(generate_all=[SHORT] * len(transfers), max_tokens=4, transfer=transfers)[
        "outputs"
    ]
    return outputs


def test_poisoned_parameters_cost_one_request(start_engines: StartEngines, tiny_llama: str, tmp_path: Path) -> None:
    """Each is its own request's failure. One engine computes what it cannot load; the other fails, and has P2P as one
    of two children."""
    (tmp_path / "key").write_text("k" * 40)
    (tmp_path / "key").chmod(0o600)
    alone = transfer_config("kv_both", "recompute", key_file=str(tmp_path / "key"))
    child = {"kv_connector": "P2PConnector", "kv_connector_extra_config": alone["kv_connector_extra_config"]}
    both = {**offloading("fail", {}), "kv_connector": "FerryMultiConnector"}
    stored = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": both["kv_connector_extra_config"]}
    both["kv_connector_extra_config"] = {"connectors": [child, stored]}
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    recomputes, fails = start_engines(
        *(engine_args(tiny_llama, transfer, env=in_process) for transfer in (alone, both))
    )
    right = reference_of(recomputes, SHORT)
    right = {name: right[name][:4] for name in ("token_ids", "logit_gaps")}
    for producer, consumer in ((recomputes, fails), (fails, recomputes)):
        is_recomputed = consumer is recomputes
        good = prefill(producer, SHORT)
        for poison, got in zip(POISON, ask_all(consumer, [good | poison for poison in POISON]), strict=True):
            shown = f"{poison}"[:80]
            assert got["finish_reason"] == ("length" if is_recomputed else "error"), shown
            if is_recomputed:
                assert got["kv_transfer_params"]["load_error"], shown
                assert_same_tokens(got, right)
        for got in ask_all(consumer, HARMLESS):
            assert_same_tokens(got, right)
        consumer.ask(reset=True)
        (got,) = ask_all(consumer, [good])  # the hand-over of which all of them spoke is still there
        assert_same_tokens(got, right)
        for engine in (producer, consumer):
            engine.ask(reset=True)  # no block is held
            guards = engine.ask(guards=True)
            assert (guards["num_errors"], guards["is_off"]) == (0, [False, False])
