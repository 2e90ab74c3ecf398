"""Two embedded engines in this process hand KV over, through real shared memory and a real control channel.

The stub model turns one wrong KV byte into another token, and says what is right without any engine. Engines are
stepped in turns by the test; all waits are bounded by `Cluster.drive`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry import LLM, SamplingParams
from kvferry.engine.config import RequestOutputKind
from kvferry.engine.kv_groups import layer_name
from kvferry.engine.outputs import RequestOutput
from kvferry.engine.prompts import PromptInput
from kvferry.engine.request import Request
from kvferry.errors import ConfigError, TransferError
from kvferry.p2p import links
from kvferry.p2p.scheduler_side import P2PSchedulerSide
from kvferry.p2p.transports import nixl, shm, threaded
from kvferry.p2p.transports.shm import ShmTransport
from kvferry.p2p.transports.threaded import Step, Transfer
from kvferry.p2p.transports.transport import Completion, TransferOp
from kvferry.testing.stub_model import StubModel
from kvferry.testing.transports import FakeNetwork, FakeTransport, TransportFaults

pytestmark = pytest.mark.usefixtures("runner")

BLOCK = 4
MODES = ("pull", "push")
QUICK = {"quarantine_s": 0.2, "retry_s": 0.05, "handshake_s": 15.0, "liveness_s": 15.0, "claim_s": 15.0}
PROMPT = [(i * 31 + i * i) % 1000 for i in range(50)]
OTHER = [(i * 17 + 5 * i * i) % 1000 for i in range(37)]
DECODE = {"do_remote_decode": True}


class FaultyShm(ShmTransport):
    """Shared memory on which transfers hang, fail half way, or end nobody knows how, as its class attributes say."""

    is_held = threading.Event()  # while set, nothing moves
    fails = 0
    forgets = 0

    def _advance(self, transfer: Transfer) -> Step:
        cls = type(self)
        if cls.is_held.is_set():
            return Step.WAITING
        if cls.fails:
            cls.fails -= 1
            super()._advance(transfer)  # some bytes are there
            raise TransferError("boom")
        if cls.forgets:
            cls.forgets -= 1
            raise RuntimeError("the library broke")
        return super()._advance(transfer)


class Cluster:
    """Engines, stepped together."""

    def __init__(self) -> None:
        self.engines: list[LLM] = []
        self.outputs: dict[str, RequestOutput] = {}
        self.handed: list[tuple[LLM, dict[str, Any]]] = []

    def start(
        self, name: str = "P2PConnector", *, role: str = "kv_both", policy: str = "recompute", model: Any = None,
        num_kv_blocks: int = 65, block_size: int = BLOCK, **extra: Any,
    ) -> LLM:  # fmt: skip
        transfer = {
            "kv_connector": name, "kv_role": role, "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"transport": "shm"} | QUICK | extra,
        }  # fmt: skip
        llm = LLM(
            model or StubModel(), kv_transfer_config=transfer, num_kv_blocks=num_kv_blocks, block_size=block_size,
            max_num_batched_tokens=16,
        )  # fmt: skip
        self.engines.append(llm)
        return llm

    def add(
        self, llm: LLM, request_id: str, params: dict[str, Any] | None, prompt: list[int] = PROMPT, *,
        cache_salt: str | None = None, **sampling: Any,
    ) -> None:  # fmt: skip
        extra = None if params is None else {"kv_transfer_params": params}
        options = {"temperature": 0.0, "max_tokens": 8} | sampling
        sampling_params = SamplingParams(extra_args=extra, **options)
        llm.add_request(prompt, sampling_params, request_id=request_id, cache_salt=cache_salt)

    def step(self, *engines: LLM) -> None:
        for llm in engines or self.engines:
            for output in llm.step():
                self.outputs[output.request_id] = output
        time.sleep(0.0005)

    def until(self, holds: Callable[[], Any], *engines: LLM, timeout_s: float = 60.0) -> None:
        """Step (these, or all engines) until something holds."""
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline_s, f"{[books(llm) for llm in self.engines]}"
            self.step(*engines)

    def finish(self, *request_ids: str, only: tuple[LLM, ...] = ()) -> list[RequestOutput]:
        self.until(lambda: all(name in self.outputs and self.outputs[name].finished for name in request_ids), *only)
        return [self.outputs[name] for name in request_ids]

    def prefill(self, llm: LLM, request_id: str, prompt: list[int] = PROMPT, **options: Any) -> dict[str, Any]:
        """The parameters that a prefill request answers."""
        params = DECODE | options.pop("params", {})
        self.add(llm, request_id, params, prompt, **({"max_tokens": 1} | options))
        (output,) = self.finish(request_id)
        assert output.kv_transfer_params is not None
        self.handed.append((llm, output.kv_transfer_params))
        return output.kv_transfer_params

    def give_back(self) -> None:
        """Nobody comes for what was handed out, as the proxy tells prefill engines."""
        for number, (llm, params) in enumerate(self.handed):
            ids = {name: params.get(name) for name in ("transfer_id", "remote_lease_id")}
            self.add(llm, f"back{number}", {"do_release": True} | ids, [1], max_tokens=1)
        self.finish(*(f"back{number}" for number in range(len(self.handed))))

    def check_idle(self) -> None:
        """Nothing is left anywhere: blocks, leases, loads, pins."""
        self.until(lambda: not any(llm.has_requests() or scheduler_side(llm)._pins for llm in self.engines))
        for llm in self.engines:
            llm.scheduler.check_integrity()
            scheduler_side(llm).check_integrity()
            pool = llm.scheduler.manager.block_pool
            assert pool.get_num_free_blocks() == len(pool.blocks) - 1
            assert not books(llm)["producer"]
            assert not books(llm)["consumer"]
            assert not scheduler_side(llm)._pins
            assert not scheduler_side(llm)._loads
            assert llm.counters.hook_errors == llm.counters.contract_errors == {}
            assert llm.counters.unknown_completions == llm.counters.late_completions == 0

    def stop(self, llm: LLM) -> None:
        self.engines.remove(llm)
        llm.shutdown()
        llm.scheduler.check_integrity()


def scheduler_side(llm: LLM) -> P2PSchedulerSide:
    side = llm.connector.side  # type: ignore[union-attr]
    assert isinstance(side, P2PSchedulerSide)
    return side


def books(llm: LLM) -> dict[str, Any]:
    return scheduler_side(llm).agent.use(lambda core, now: core.snapshot())


def engine_id(llm: LLM) -> str:
    return scheduler_side(llm).host.engine_id


def kv_bytes(llm: LLM, block_ids: list[int], num_tokens: int, layer: int) -> bytes:
    """[tokens, heads, K then V] of a layer, read through a block table."""
    pages = llm.kv_caches[layer_name(layer)][block_ids]
    rows = pages.permute(0, 2, 1, 3).flatten(0, 1)[:num_tokens].contiguous()
    return rows.numpy().tobytes()


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    return StubModel().expected_tokens(prompt, num_tokens)


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    for llm in made.engines:
        llm.shutdown()
        llm.scheduler.check_integrity()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyShm]]:
    monkeypatch.setattr(shm, "ShmTransport", FaultyShm)
    monkeypatch.setattr(FaultyShm, "is_held", threading.Event())
    yield FaultyShm
    FaultyShm.is_held.clear()
    FaultyShm.fails = FaultyShm.forgets = 0


# ---- what must work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_hand_over_gives_the_answer_of_one_engine_and_equal_bytes(cluster: Cluster, mode: str) -> None:
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    params = cluster.prefill(prefill, "p")
    source = params["remote_block_ids"][0]
    before = [kv_bytes(prefill, source, 50, layer) for layer in range(2)]
    assert before == [StubModel().expected_kv(PROMPT, layer) for layer in range(2)]
    cluster.add(decode, "d", params)
    cluster.until(lambda: "d" in cluster.outputs)
    (table,) = decode.scheduler.manager.get_block_ids("d")
    for layer in range(2):
        assert kv_bytes(decode, table, 50, layer) == StubModel().expected_kv(PROMPT, layer)
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(PROMPT, 8)
    assert (output.num_cached_tokens, output.external_hit_sources) == (50, {"p2p": 50})
    assert decode.runner.num_forwards == 7  # the first token was handed over, the prompt's last not computed again
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_counted_are_the_tokens_that_were_not_local(cluster: Cluster, mode: str) -> None:
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    cluster.add(decode, "warm", None, PROMPT[:20], max_tokens=1)
    cluster.finish("warm")
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(PROMPT, 8)
    assert (output.num_cached_tokens, output.num_external_tokens) == (50, 30)
    cluster.check_idle()
    mover = (decode if mode == "pull" else prefill).connector_stats
    moved = mover.media["shm"]  # type: ignore[union-attr]
    num_bytes = 30 * 2 * StubModel().token_bytes
    assert (moved.loaded_bytes, moved.stored_bytes) == ((num_bytes, 0) if mode == "pull" else (0, num_bytes))
    assert decode.connector_stats.hit_tokens == {"p2p": 30}  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", MODES)
def test_many_at_once_both_ways(cluster: Cluster, mode: str) -> None:
    first, second = (cluster.start(mode=mode, num_kv_blocks=129) for _ in range(2))
    prompts = {f"r{i}": [(i * 97 + j * 7 + j * j) % 1000 for j in range(5 + 6 * i)] for i in range(8)}
    sides = {name: (first, second) if i % 2 else (second, first) for i, name in enumerate(prompts)}
    for name, prompt in prompts.items():
        cluster.add(sides[name][0], f"p{name}", DECODE, prompt, max_tokens=1)
    for output in cluster.finish(*(f"p{name}" for name in prompts)):
        name = output.request_id[1:]
        cluster.add(sides[name][1], name, output.kv_transfer_params, prompts[name])
    for name, output in zip(prompts, cluster.finish(*prompts), strict=True):
        assert tokens(output) == expected(prompts[name], 8)
        assert output.num_external_tokens == len(prompts[name])
    cluster.check_idle()


def test_push_may_be_registered_before_the_prefill_has_ended_or_begun(cluster: Cluster) -> None:
    prefill, decode = cluster.start(mode="push"), cluster.start(mode="push")
    address = scheduler_side(prefill).agent.address
    params = {
        "do_remote_prefill": True, "transfer_mode": "push", "transfer_id": "t1",
        "remote_host": address.host, "remote_port": address.port,
    }  # fmt: skip
    cluster.add(decode, "d", params)
    cluster.until(lambda: books(prefill)["producer"])  # it has registered
    cluster.add(prefill, "p", DECODE | {"transfer_id": "t1"}, max_tokens=1)
    assert tokens(cluster.finish("p", "d")[1]) == expected(PROMPT, 8)
    cluster.check_idle()


def test_a_busy_prefill_engine_serves_pulls(cluster: Cluster) -> None:
    prefill, decode = cluster.start(), cluster.start()
    params = cluster.prefill(prefill, "p")
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d", only=(decode,))  # the other does not step at all
    assert tokens(output) == expected(PROMPT, 8)
    cluster.check_idle()


def test_the_users_parameters_stay_as_they_are(cluster: Cluster) -> None:
    prefill, decode = cluster.start(), cluster.start()
    asked = {"do_remote_decode": True, "transfer_id": "t", "remote_engine_id": None}
    cluster.add(prefill, "p", asked, max_tokens=1)
    (output,) = cluster.finish("p")
    params = output.kv_transfer_params
    before = copy.deepcopy(params)
    cluster.add(decode, "d", params)
    cluster.finish("d")
    assert params == before
    assert asked == {"do_remote_decode": True, "transfer_id": "t", "remote_engine_id": None}
    cluster.check_idle()


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.7, "seed": 3, "top_k": 50}]
)
def test_tokens_are_those_of_a_single_engine(cluster: Cluster, sampling: dict[str, Any]) -> None:
    single = LLM(StubModel(), num_kv_blocks=65, block_size=BLOCK)
    options = {"temperature": 0.0, "max_tokens": 12} | sampling
    (alone,) = single.generate(PROMPT, SamplingParams(**options))
    prefill, decode = cluster.start(), cluster.start()
    params = cluster.prefill(prefill, "p", **sampling)
    assert params["remote_first_token_ids"] == tokens(alone)[:1]
    cluster.add(decode, "d", params, **options)
    assert tokens(cluster.finish("d")[0]) == tokens(alone)
    cluster.check_idle()


def test_a_step_that_takes_a_token_over_has_moved_and_one_that_waits_has_not(cluster: Cluster) -> None:
    prefill, decode = cluster.start(), cluster.start()
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    moved: list[bool] = []
    deadline_s = time.monotonic() + 60
    while not decode.scheduler.loaded:
        assert time.monotonic() < deadline_s, books(decode)
        decode.step()
        moved.append(decode.has_moved)
        time.sleep(0.0005)
    assert moved[-1]
    assert not any(moved[:-1])
    decode.step()
    assert decode.has_moved
    cluster.finish("d")
    cluster.check_idle()


def test_the_seconds_of_a_transfer_are_those_of_the_transport(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those until a step has looked, which would make every link look as slow as the model."""
    monkeypatch.setattr(links, "time", SimpleNamespace(perf_counter=lambda: 100.0))
    monkeypatch.setattr(threaded, "Completion", partial(Completion, ended_s=103.5))
    prefill, decode = cluster.start(), cluster.start()
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    cluster.finish("d")
    cluster.check_idle()
    stats = decode.connector_stats
    assert stats is not None
    assert stats.media["shm"].load_s == 3.5


def test_tokens_are_taken_only_from_a_prefill_engine(cluster: Cluster) -> None:
    llm = cluster.start()
    handed = {name: value for name, value in cluster.prefill(llm, "p").items() if name != "do_remote_prefill"}
    for params in ({}, {"do_remote_prefill": False}, {"do_remote_decode": True}, {"do_remote_prefill": True}):
        sampling = SamplingParams(temperature=0.0, extra_args={"kv_transfer_params": handed | params})
        request = llm._make_request(PromptInput(token_ids=PROMPT), sampling, None)
        assert request.handed_over_token_ids == (tuple(expected(PROMPT, 1)) if params.get("do_remote_prefill") else ())


def test_log_probabilities_are_computed_where_they_are_asked_for(cluster: Cluster) -> None:
    prefill, decode = cluster.start(), cluster.start()
    cluster.add(decode, "d", cluster.prefill(prefill, "p"), logprobs=2)
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(PROMPT, 8)
    assert len(output.outputs[0].logprobs or ()) == 8
    assert decode.runner.num_forwards == 8
    cluster.check_idle()


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_a_prefill_that_went_further_hands_over_all_its_tokens(cluster: Cluster, num_tokens: int) -> None:
    prefill, decode = cluster.start(), cluster.start()
    params = cluster.prefill(prefill, "p", max_tokens=num_tokens)
    assert params["remote_num_tokens"] == 50 + num_tokens - 1
    cluster.add(decode, "d", params)
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    assert decode.runner.num_forwards == 8 - num_tokens
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["stop", "length"])
def test_a_handed_over_token_may_be_the_last(cluster: Cluster, mode: str, kind: str) -> None:
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    first = expected(PROMPT, 1)
    options: dict[str, Any] = {"stop_token_ids": first} if kind == "stop" else {"max_tokens": 1}
    params = cluster.prefill(prefill, "p", **options)
    assert cluster.outputs["p"].outputs[0].finish_reason == kind
    cluster.add(decode, "d", params, **options)
    (output,) = cluster.finish("d")
    assert (tokens(output), output.outputs[0].finish_reason) == (first, kind)
    assert decode.runner.num_forwards == 0
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_prompts_of_less_than_a_block(cluster: Cluster, mode: str, length: int) -> None:
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    cluster.add(decode, "d", cluster.prefill(prefill, "p", PROMPT[:length]), PROMPT[:length])
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT[:length], 8)
    cluster.check_idle()


def test_two_engines_full_of_blocks_that_the_other_has_claimed_go_on(cluster: Cluster) -> None:
    """Each prefills for the other; no load gets blocks until one of them gives the other's back."""
    engines = [cluster.start(num_kv_blocks=25, load_s=2.0) for _ in range(2)]
    prompts = {f"{i}{j}": [7 * i + j, *PROMPT[:39]] for i in range(2) for j in range(2)}
    handed = {name: cluster.prefill(engines[int(name[0])], f"p{name}", prompt) for name, prompt in prompts.items()}
    for name, params in handed.items():
        cluster.add(engines[1 - int(name[0])], name, params, prompts[name])
    started_s = time.monotonic()
    outputs = cluster.finish(*prompts)
    assert time.monotonic() - started_s > 1.5, "they did not wait for each other"
    assert [tokens(output) for output in outputs] == [expected(prompt, 8) for prompt in prompts.values()]
    told = [(output.kv_transfer_params or {}).get("load_error", "") for output in outputs]
    assert sum("other engines have claimed blocks" in reason for reason in told) in (1, 2)
    cluster.check_idle()


def test_what_is_local_already_is_not_asked_for(cluster: Cluster) -> None:
    """The peer has one block's tokens, and the decode engine too: nothing to transfer."""
    prefill, decode = cluster.start(), cluster.start()
    params = cluster.prefill(prefill, "p", PROMPT[:4])
    cluster.add(decode, "warm", None, max_tokens=1)
    cluster.finish("warm")
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (expected(PROMPT, 8), 0)
    cluster.give_back()
    cluster.check_idle()


def test_a_longer_prompt_takes_what_the_peer_has(cluster: Cluster) -> None:
    prefill, decode = cluster.start(), cluster.start()
    cluster.add(decode, "d", cluster.prefill(prefill, "p", PROMPT[:30]))
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (expected(PROMPT, 8), 28)  # whole blocks
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4)])
def test_block_sizes_may_differ(cluster: Cluster, mode: str, sizes: tuple[int, int]) -> None:
    prefill, decode = (cluster.start(mode=mode, block_size=size) for size in sizes)
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (expected(PROMPT, 8), 50)
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(4, 4), (8, 4)])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_groups_with_windows(cluster: Cluster, mode: str, sizes: tuple[int, int], logprobs: int | None) -> None:
    model = StubModel(windows=[None, 6, 10])
    prefill, decode = (cluster.start(mode=mode, block_size=size, model=model, num_kv_blocks=150) for size in sizes)
    for number in range(6):  # windows that begin with a block, and in the middle of one
        prompt = PROMPT[number : number + 40 + number]
        cluster.add(decode, f"d{number}", cluster.prefill(prefill, f"p{number}", prompt), prompt, logprobs=logprobs)
        (output,) = cluster.finish(f"d{number}")
        assert tokens(output) == model.expected_tokens(prompt, 8)
        if logprobs is None:
            assert output.num_external_tokens == len(prompt)
        cluster.add(decode, f"again{number}", None, prompt)  # what is found in the prefix cache is right, too
        assert tokens(cluster.finish(f"again{number}")[0]) == model.expected_tokens(prompt, 8)
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_groups_whose_windows_may_begin_within_a_block_are_refused(cluster: Cluster, mode: str) -> None:
    model = StubModel(windows=[None, 6, 10])
    prefill, decode = (
        cluster.start(mode=mode, block_size=size, model=model, num_kv_blocks=150, lease_s=1.0) for size in (4, 8)
    )
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (model.expected_tokens(PROMPT, 8), 0)
    assert "block size of layers with a window" in output.kv_transfer_params["load_error"]
    cluster.check_idle()


# ---- a hand-over is bound to its tokens ------------------------------------------------------------------------


def edits(rng: random.Random, prompt: list[int]) -> Iterator[tuple[list[int], str | None]]:
    """Prompts that are related to one, and their salt, without an end; about half of them are the start of it, or it
    of them.
    """
    while True:
        at = rng.randrange(len(prompt))
        roll = rng.randrange(6)
        if roll < 2:
            yield prompt[: max(2, at + 1)], None  # one token alone is computed in any case
        elif roll < 4:
            yield prompt + [rng.randrange(1000) for _ in range(rng.choice((1, 2, 3, 4, 5, 17)))], None
        elif roll == 4:
            yield [*prompt[:at], (prompt[at] + 1) % 1000, *prompt[at + 1 :]], None
        else:
            yield prompt, "another tenant"


def num_common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("windows", [None, (None, 6, 10)], ids=["full", "windows"])
def test_prompts_that_differ_by_edits(
    cluster: Cluster, mode: str, policy: str, windows: tuple[int | None, ...] | None
) -> None:
    """Right tokens or a refusal, whatever a router mixes up; right also from the prefix cache afterwards."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = StubModel(windows=list(windows)) if windows else StubModel()
    prefill = cluster.start(mode=mode, model=model, num_kv_blocks=300)
    decode = cluster.start(mode=mode, policy=policy, model=model, num_kv_blocks=300)
    num_loaded = num_refused = 0
    for number in range(25):
        prompt = [rng.randrange(1000) for _ in range(rng.choice((15, 16, 17, 31, 32, 33, 48, 50)))]
        wanted, salt = next(edits(rng, prompt))
        if windows and len(wanted) != len(prompt):
            wanted = prompt  # at another length, a window has dropped what would be asked for
        params = cluster.prefill(prefill, f"p{number}", prompt)
        cluster.add(decode, f"d{number}", params, wanted, cache_salt=salt)
        (output,) = cluster.finish(f"d{number}")
        # Loaded is what both have in common, if that is all that is asked for: all of the prompt, or the blocks of it.
        asked = len(wanted) if len(wanted) <= len(prompt) else len(prompt) // BLOCK * BLOCK
        is_right = salt is None and num_common(prompt, wanted) >= asked
        what = f"{number}: {wanted} of {prompt}, salt {salt}"
        assert tokens(output) == (model.expected_tokens(wanted, 8) if is_right or policy == "recompute" else []), what
        assert output.num_external_tokens == (asked if is_right else 0), what
        num_loaded, num_refused = num_loaded + is_right, num_refused + (not is_right)
        if not is_right:
            told = output.error or output.kv_transfer_params["load_error"]
            assert policy == "fail" or "the KV of other tokens" in told
        cluster.add(decode, f"again{number}", None, wanted, cache_salt=salt)
        assert tokens(cluster.finish(f"again{number}")[0]) == model.expected_tokens(wanted, 8), what
    assert num_loaded, "nothing was handed over"
    assert num_refused, "nothing was refused"
    cluster.give_back()
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [31, 32, 33, 48, 50])
@pytest.mark.parametrize("change", [-17, -2, -1, 0, 1, 2, 17])
def test_shorter_and_longer_prompts_get_what_they_have_in_common(
    cluster: Cluster, mode: str, length: int, change: int
) -> None:
    """No first token is taken over but at equal length, where it is."""
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    prompt, wanted = (PROMPT + OTHER)[:length], (PROMPT + OTHER)[: length + change]
    cluster.add(decode, "d", cluster.prefill(prefill, "p", prompt), wanted)
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(wanted, 8)
    assert output.num_external_tokens == (len(wanted) if change <= 0 else length // BLOCK * BLOCK)
    if change == 0:
        assert decode.runner.num_forwards == 7
    cluster.check_idle()


def is_taken_over(llm: LLM, params: dict[str, Any], prompt: list[int] = PROMPT, **sampling: Any) -> bool:
    """Whether a request with this hand-over would begin with its first tokens."""
    options = SamplingParams(**({"temperature": 0.0} | sampling), extra_args={"kv_transfer_params": params})
    request = llm._make_request(PromptInput(token_ids=prompt), options, None)
    assert request.handed_over_token_ids in ((), tuple(params["remote_first_token_ids"]))
    return bool(request.handed_over_token_ids)


def test_first_tokens_are_bound_to_prompt_and_choice(cluster: Cluster) -> None:
    """What the peer chose behind another prompt of equal length is nobody's first token here."""
    prefill, decode = cluster.start(), cluster.start()
    params = cluster.prefill(prefill, "p")
    other = params | {"remote_first_token_ids": [(expected(PROMPT, 1)[0] + 1) % 1000]}
    two = params | {"remote_first_token_ids": [*expected(PROMPT, 1), 7]}
    assert is_taken_over(decode, params)
    assert not is_taken_over(decode, params, [*PROMPT[:-1], (PROMPT[-1] + 1) % 1000])
    assert not is_taken_over(decode, other)
    assert not is_taken_over(decode, two)
    cluster.add(decode, "d", other)
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    cluster.give_back()
    cluster.check_idle()


def test_first_tokens_chosen_by_more_than_the_request_says_are_not_taken_over(cluster: Cluster) -> None:
    """As vLLM chooses them with logits processors of the whole engine."""
    prefill, decode = cluster.start(), cluster.start()
    side = scheduler_side(prefill)
    side.host = dataclasses.replace(side.host, chosen_by='{"logits_processors":["fleet:Force"]}')
    assert not is_taken_over(decode, cluster.prefill(prefill, "p"))
    cluster.give_back()
    cluster.check_idle()


SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "top_p": 0.9, "top_k": 7, "min_p": 0.01}
CHANGES: dict[str, Any] = {
    "temperature": 0.7, "seed": 0, "top_p": 0.8, "top_k": 0, "min_p": 0.02, "repetition_penalty": 1.1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1,
}  # fmt: skip
ANSWER: dict[str, Any] = {
    "max_tokens": 3, "ignore_eos": True, "stop_token_ids": [7], "skip_special_tokens": False,
    "include_stop_str_in_output": True, "output_kind": RequestOutputKind.DELTA,
}  # fmt: skip


def test_first_tokens_are_taken_over_under_the_settings_they_were_chosen_with_and_no_others(cluster: Cluster) -> None:
    known = {*CHANGES, *ANSWER, "stop", "logprobs", "n", "extra_args"}
    assert known == {field.name for field in dataclasses.fields(SamplingParams)}, "say what a new setting changes"
    prefill, decode = cluster.start(), cluster.start()
    params = cluster.prefill(prefill, "p", **SAMPLED)
    assert is_taken_over(decode, params, **SAMPLED)
    assert is_taken_over(decode, params, **SAMPLED | ANSWER)
    for name, value in CHANGES.items():
        assert not is_taken_over(decode, params, **SAMPLED | {name: value}), name
    assert not is_taken_over(decode, params, **{name: SAMPLED[name] for name in SAMPLED if name != "seed"})
    greedy = cluster.prefill(prefill, "g", seed=3)
    assert is_taken_over(decode, greedy), "where nothing is drawn"
    assert is_taken_over(decode, greedy, top_p=0.5, top_k=-1, temperature=1e-6)
    assert not is_taken_over(decode, greedy, temperature=1.0)
    cluster.give_back()
    cluster.check_idle()


@pytest.mark.parametrize("is_refused", [True, False], ids=["refused", "not asked"])
def test_first_tokens_of_an_engine_that_proved_nothing_are_not_taken_over_with_kv_from_elsewhere(
    cluster: Cluster, is_refused: bool
) -> None:
    """An engine of other weights chose another token, and host memory has the whole prompt's KV."""
    prompt = (PROMPT + OTHER)[:64]
    other = StubModel(num_layers=3)
    prefill = cluster.start(model=other)
    params = cluster.prefill(prefill, "p", prompt)
    assert params["remote_first_token_ids"] == other.expected_tokens(prompt, 1) != expected(prompt, 1)
    extra = {"transport": "shm"} | QUICK
    children = [
        {"kv_connector": "P2PConnector", "kv_connector_extra_config": extra},
        {
            "kv_connector": "OffloadingConnector",
            "kv_connector_extra_config": {"weights_version": "1", "cpu_bytes_to_use": 1 << 20},
        },
    ]
    if is_refused:
        params["remote_host"] = "10.1.2.3"  # which is not in allowed_peers
    transfer = {
        "kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": children if is_refused else children[::-1]},
    }  # fmt: skip
    decode = LLM(StubModel(), kv_transfer_config=transfer, num_kv_blocks=65, block_size=16)
    try:
        decode.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1))
        cluster.until(lambda: not step_into(cluster, decode))
        assert decode.reset_prefix_cache()
        decode.add_request(
            prompt, SamplingParams(temperature=0.0, max_tokens=8, extra_args={"kv_transfer_params": params}),
            request_id="d",
        )  # fmt: skip
        cluster.until(lambda: not step_into(cluster, decode))
        output = cluster.outputs["d"]
        assert tokens(output) == expected(prompt, 8)
        assert output.external_hit_sources == {"host": 64}, "it went the way that this is about"
        assert decode.reset_prefix_cache(reset_connector=True), "P2P, which stores nothing, has nothing to forget"
    finally:
        decode.shutdown()


def step_into(cluster: Cluster, llm: LLM) -> bool:
    """One step of an engine that is none of the cluster's; whether it has something to do."""
    for output in llm.step():
        cluster.outputs[output.request_id] = output
    return llm.has_requests()


@pytest.mark.parametrize("mode", MODES)
def test_who_asks_for_other_tokens_leaves_the_lease_to_the_one_it_was_made_for(cluster: Cluster, mode: str) -> None:
    prefill, decode, other = (cluster.start(mode=mode) for _ in range(3))
    params = cluster.prefill(prefill, "p")
    for name, engine in (("wrong here", decode), ("wrong there", other)):
        cluster.add(engine, name, params, OTHER)
        (refused,) = cluster.finish(name)
        assert (tokens(refused), refused.num_external_tokens) == (expected(OTHER, 8), 0)
        assert "the KV of other tokens" in refused.kv_transfer_params["load_error"]
    cluster.add(decode, "right", params)
    (output,) = cluster.finish("right")
    assert (tokens(output), output.num_external_tokens) == (expected(PROMPT, 8), 50)
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_may_be_known_by_several_names(cluster: Cluster, mode: str) -> None:
    """A request names the host. Links to one engine under two names do not put each other out."""
    prefill, decode = cluster.start(mode=mode), cluster.start(policy="fail", mode=mode)
    for number, host in enumerate(("127.0.0.1", "localhost", "127.0.0.1", "LOCALHOST", "localhost", "127.0.0.1")):
        cluster.add(decode, f"d{number}", cluster.prefill(prefill, f"p{number}") | {"remote_host": host})
        (output,) = cluster.finish(f"d{number}")
        assert tokens(output) == expected(PROMPT, 8), output.error
        assert decode.reset_prefix_cache()
    assert len(books(decode)["peers"]) == 2, "letters of another case make no other name"
    cluster.check_idle()


# ---- what goes wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_port": "many"}, {"remote_port": 0}, {"remote_host": None}, {"remote_lease_id": "x"},
        {"remote_lease_id": "0" * 32}, {"remote_generation": "0" * 32}, {"remote_generation": "\ud800"},
        {"transfer_mode": "throw"},
        {"remote_host": "10.1.2.3"}, {"remote_num_tokens": -1}, {"remote_first_token_ids": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_bad_parameters_end_or_slow_down_one_request(cluster: Cluster, policy: str, wrong: dict[str, Any]) -> None:
    prefill, decode = cluster.start(), cluster.start(policy=policy)
    params = cluster.prefill(prefill, "p")
    cluster.add(decode, "d", params | wrong)
    cluster.add(decode, "fine", None, OTHER)
    bad, fine = cluster.finish("d", "fine")
    assert tokens(fine) == expected(OTHER, 8)
    if policy == "recompute":
        assert tokens(bad) == expected(PROMPT, 8)
        told = bad.kv_transfer_params  # which a strict proxy looks at
        assert told["load_error"]
        assert told["num_recomputed_tokens"] == len(PROMPT) - 1
    else:
        assert (tokens(bad), bad.outputs[0].finish_reason) == ([], "error")
        assert bad.error is not None
    cluster.give_back()
    cluster.check_idle()


@pytest.mark.parametrize(
    ("wrong", "blamed"),
    [
        ({"remote_port": "many"}, "kv_transfer_params"),
        ({"remote_host": "10.1.2.3"}, "kv_transfer_params"),
        ({"remote_host": "10.1.2.3", "peer_token": "v1.7.x"}, "kv_transfer_params"),
        ({"remote_host": "10.1.2.3", "peer_token": f"v1.7.{'x' * 43}"}, "kv_transfer_params"),
        ({"remote_port": 9}, None),
        ({"remote_lease_id": "0" * 32}, None),
    ],
    ids=str,
)
def test_an_error_says_whether_the_requests_own_parameters_are_to_blame(
    cluster: Cluster, tmp_path: Path, wrong: dict[str, Any], blamed: str | None
) -> None:
    (tmp_path / "key").write_text("k" * 40)
    (tmp_path / "key").chmod(0o600)
    prefill, decode = (cluster.start(policy="fail", key_file=str(tmp_path / "key")) for _ in range(2))
    sent = cluster.prefill(prefill, "p", params={"transfer_id": "t"}) | wrong
    cluster.add(decode, "d", sent)
    (output,) = cluster.finish("d")
    assert output.error
    assert output.error_param == blamed, output.error
    cluster.give_back()
    cluster.check_idle()


class OtherWeights(StubModel):
    """The same KV, and other tokens behind it."""

    def _token(self, digest: bytes) -> int:
        return (super()._token(digest) + 1) % 1000


@pytest.mark.parametrize("mode", MODES)
def test_first_tokens_of_another_engine_are_not_taken_over_with_this_ones_kv(cluster: Cluster, mode: str) -> None:
    """They were chosen behind this prompt and under these settings, and their own digest comes with them."""
    prefill, decode, other = (cluster.start(mode=mode, model=cls()) for cls in (StubModel, StubModel, OtherWeights))
    sent, others = cluster.prefill(prefill, "p"), cluster.prefill(other, "o")
    sent |= {name: value for name, value in others.items() if name.startswith("remote_first_token")}
    assert sent["remote_first_token_ids"] != expected(PROMPT, 1)
    cluster.add(decode, "d", sent)
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (expected(PROMPT, 8), 50)
    cluster.give_back()
    cluster.check_idle()


@pytest.mark.parametrize("tokens_", [[1000], [-1], [True], "7", [7.0]])
def test_tokens_that_are_none_are_not_taken_over(cluster: Cluster, tokens_: Any) -> None:
    prefill, decode = cluster.start(), cluster.start()
    cluster.add(decode, "d", cluster.prefill(prefill, "p") | {"remote_first_token_ids": tokens_})
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    cluster.give_back()
    cluster.check_idle()


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_lease_that_expired_is_refused(cluster: Cluster, policy: str, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = cluster.start(lease_s=0.2), cluster.start(policy=policy)
    params = cluster.prefill(prefill, "p")
    cluster.until(lambda: not prefill.has_requests())
    cluster.add(prefill, "reuse", None, OTHER)  # the blocks hold another's KV now
    cluster.add(decode, "d", params)
    output, _ = cluster.finish("d", "reuse")
    assert tokens(output) == (expected(PROMPT, 8) if policy == "recompute" else [])
    assert output.outputs[0].finish_reason == ("length" if policy == "recompute" else "error")
    assert "refused the claim: expired" in caplog.text
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_that_is_gone_is_no_end(cluster: Cluster, mode: str) -> None:
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode, load_s=3.0)
    params = cluster.prefill(prefill, "p")
    cluster.stop(prefill)
    cluster.add(decode, "d", params)
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    cluster.check_idle()


def test_a_peer_that_goes_during_a_pull(cluster: Cluster, faulty: type[FaultyShm]) -> None:
    prefill, decode = cluster.start(), cluster.start()
    faulty.is_held.set()
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    cluster.until(lambda: is_transferring(decode))
    cluster.stop(prefill)
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    faulty.is_held.clear()
    cluster.check_idle()


@pytest.mark.parametrize("is_reached", [True, False], ids=["reached", "not reached"])
def test_a_peer_that_goes_during_a_push(cluster: Cluster, faulty: type[FaultyShm], is_reached: bool) -> None:
    prefill, decode = cluster.start(mode="push"), cluster.start(mode="push")
    faulty.is_held.set()
    cluster.add(prefill, "p", DECODE, max_tokens=1)
    (output,) = cluster.finish("p")
    cluster.add(decode, "d", output.kv_transfer_params)
    cluster.step(decode)
    cluster.until(lambda: any(x["claims"] for x in books(prefill)["producer"]), prefill)
    if is_reached:
        cluster.step(decode)  # its worker looks at the writer's life sign
    cluster.stop(prefill)
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    cluster.check_idle()


def is_transferring(llm: LLM) -> bool:
    return any(load["state"] == "transferring" for load in books(llm)["consumer"])


def test_unlike_caches_are_refused_in_readable_words(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = cluster.start(model=StubModel(head_size=8)), cluster.start()
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    words = [f"{engine_id(decode)} k 4, v 4, its peer k 8, v 8", f"{engine_id(prefill)} k 8, v 8, its peer k 4, v 4"]
    layers = "('model.layers.0.self_attn.attn' and 1 more)"
    assert any(f"cannot exchange KV: content: {text} {layers}; computing it here" in caplog.text for text in words)
    cluster.give_back()
    cluster.check_idle()


def test_other_weights_are_refused(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    prefill = cluster.start(weights_version="a")
    decode = cluster.start(weights_version="b")
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    words = [
        f"{engine_id(decode)} version:b, its peer version:a",
        f"{engine_id(prefill)} version:a, its peer version:b",
    ]
    assert any(f"weights: {text}" in caplog.text for text in words)
    cluster.give_back()
    cluster.check_idle()


class ScaledModel(StubModel):
    """A stub with a configuration, of which one key is given."""

    def __init__(self, **rope: Any) -> None:
        super().__init__()
        keys = {"transformers_version": "5", "hidden_size": 8, "rope_parameters": {"rope_type": "default"}, **rope}
        self.hf_config = SimpleNamespace(to_dict=lambda: keys, architectures=["Stub"])


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, ['{"rope_type":"default"}', '{"rope_type":"yarn"}']),
        ({"rope_scaling": 2.0}, ["nothing", "2.0"]),
    ],
)
def test_other_settings_of_the_model_are_refused_by_name(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, rope: dict[str, Any], words: list[str]
) -> None:
    prefill, decode = cluster.start(model=ScaledModel()), cluster.start(model=ScaledModel(**rope))
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    (name,) = rope
    sides = [
        f"{engine_id(decode)} {words[1]}, its peer {words[0]}",
        f"{engine_id(prefill)} {words[0]}, its peer {words[1]}",
    ]
    assert any(f"cannot exchange KV: hf_config.{name}: {text}; computing it here" in caplog.text for text in sides)
    cluster.give_back()
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["fails", "forgets"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_transfers_that_break(cluster: Cluster, faulty: type[FaultyShm], mode: str, fault: str, policy: str) -> None:
    prefill, decode = cluster.start(mode=mode, lease_s=5.0), cluster.start(mode=mode, policy=policy)
    params = cluster.prefill(prefill, "p")
    setattr(faulty, fault, 1)
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert tokens(output) == (expected(PROMPT, 8) if policy == "recompute" else [])
    cluster.check_idle()
    for name in ("again", "and again"):  # a decode engine may learn of a connection's end with its next request
        cluster.add(decode, name, cluster.prefill(prefill, f"p {name}", OTHER), OTHER)
        (output,) = cluster.finish(name)
        assert tokens(output) == (expected(OTHER, 8) if policy == "recompute" or output.error is None else [])
        cluster.check_idle()
        decode.reset_prefix_cache()
    assert (tokens(output), output.num_external_tokens) == (expected(OTHER, 8), 37)
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_a_transfer_that_hangs_is_given_up_and_its_blocks_stay_out_of_use(
    cluster: Cluster, faulty: type[FaultyShm], mode: str
) -> None:
    prefill, decode = (cluster.start(mode=mode, load_s=0.5) for _ in range(2))
    params = cluster.prefill(prefill, "p")
    faulty.is_held.set()
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(PROMPT, 8)
    cluster.check_idle()  # closing the connection was the fence


@pytest.mark.parametrize(("mode", "quarantine_s"), [("pull", 15.0), ("push", 15.0), ("push", 0.05)])
def test_blocks_of_a_load_given_up_are_not_handed_out(
    cluster: Cluster, faulty: type[FaultyShm], mode: str, quarantine_s: float
) -> None:
    """The late bytes of a hanging transfer land in blocks that nobody has, however full the engine is.

    Where the peer writes, closing our own end is no fence: they stay out of use until it says that it has ended.
    """
    settings: dict[str, Any] = {"mode": mode, "quarantine_s": quarantine_s, "liveness_s": 60.0}
    prefill = cluster.start(load_s=20.0, **settings)
    decode = cluster.start(load_s=2.0, num_kv_blocks=40, **settings)
    params = cluster.prefill(prefill, "p")
    faulty.is_held.set()
    cluster.add(decode, "d", params)
    cluster.until(lambda: scheduler_side(decode)._pins)
    pinned = {block.block_id for block in scheduler_side(decode)._pins["d"]}
    assert len(pinned) == 13
    cluster.add(decode, "other", None, OTHER)
    cluster.until(lambda: "other" in cluster.outputs)
    (table,) = decode.scheduler.manager.get_block_ids("other")
    assert not pinned & set(table)
    if quarantine_s < 1:
        cluster.until(lambda: scheduler_side(decode)._closing)
        for _ in range(100):
            cluster.step()
        assert scheduler_side(decode)._pins
    faulty.is_held.clear()  # the bytes land
    output, other = cluster.finish("d", "other")
    assert (tokens(output), tokens(other)) == (expected(PROMPT, 8), expected(OTHER, 8))
    cluster.check_idle()
    cluster.add(decode, "again", cluster.prefill(prefill, "p2", OTHER[5:]), OTHER[5:])
    (output,) = cluster.finish("again")
    assert tokens(output) == expected(OTHER[5:], 8)
    cluster.check_idle()


class FenceLess(FakeTransport):
    """Under shared memory's name: hangs, and what hung lands long after its connection was closed."""

    def __init__(self, network: FakeNetwork) -> None:
        super().__init__(network, "shm")
        self.faults = TransportFaults(hangs=True, lands_late_s=0.3)


def test_where_closing_is_no_fence_blocks_are_lost_rather_than_handed_out(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = FakeNetwork()
    monkeypatch.setattr(
        shm, "ShmTransport", SimpleNamespace(from_config=lambda setup: FenceLess(network), uses_pool=True)
    )
    prefill, decode = (cluster.start(load_s=2.0, quarantine_s=0.1) for _ in range(2))
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(PROMPT, 8)
    cluster.until(lambda: "could not be destroyed" in caplog.text)
    cluster.until(lambda: network.ends[1].bytes_moved[TransferOp.READ])  # late, into blocks that nobody has
    assert len(scheduler_side(decode)._pins["d"]) == 13
    cluster.add(decode, "other", None, OTHER)
    assert tokens(cluster.finish("other")[0]) == expected(OTHER, 8)
    assert decode.connector_stats.held_blocks == 13  # type: ignore[union-attr]
    decode.scheduler.check_integrity()


def test_where_closing_is_no_fence_the_end_of_the_peer_is(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = FakeNetwork()
    monkeypatch.setattr(
        shm, "ShmTransport", SimpleNamespace(from_config=lambda setup: FenceLess(network), uses_pool=True)
    )
    waits: dict[str, Any] = {"mode": "push", "load_s": 2.0, "quarantine_s": 0.1, "claim_s": 2.0, "liveness_s": 2.0}
    prefill, decode = cluster.start(**waits), cluster.start(**waits)
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(PROMPT, 8)
    cluster.until(lambda: "could not be destroyed" in caplog.text)
    cluster.until(lambda: network.ends[0].bytes_moved[TransferOp.WRITE])  # late, into blocks that nobody has
    for _ in range(50):
        cluster.step()
    assert prefill.connector_stats.held_blocks == 13  # type: ignore[union-attr]
    cluster.stop(decode)
    cluster.check_idle()


# ---- given back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_computed_whole_although_it_was_handed_over_is_told(
    cluster: Cluster, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vLLM a request for log-probabilities of the prompt: it was computed again, and nobody heard of that."""
    prefill, decode = (cluster.start(mode=mode, lease_s=5.0) for _ in range(2))  # which nobody fetches
    params = cluster.prefill(prefill, "p")
    monkeypatch.setattr(Request, "get_skip_reading_prefix_cache", lambda self: True)
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (expected(PROMPT, 8), 0)
    told = output.kv_transfer_params or {}
    assert told.get("num_recomputed_tokens") == len(PROMPT) - 1
    assert "every prompt token computed" in told["load_error"]
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["remote_lease_id", "transfer_id"])
def test_a_hand_over_that_is_given_back_frees_its_blocks_at_once(cluster: Cluster, mode: str, name: str) -> None:
    prefill, decode = (cluster.start(mode=mode, lease_s=600.0) for _ in range(2))
    params = cluster.prefill(prefill, "p", params={"transfer_id": "t1"})
    kept = cluster.prefill(prefill, "kept", OTHER, params={"transfer_id": "t2"})
    cluster.add(prefill, "stranger", {"do_release": True, "remote_lease_id": "0" * 32, "transfer_id": 7}, [1])
    cluster.finish("stranger")
    assert prefill.connector_stats.held_blocks == 23  # type: ignore[union-attr]
    cluster.add(prefill, "back", {"do_release": True, name: params[name]}, [1], max_tokens=1)
    cluster.finish("back")
    cluster.until(lambda: prefill.connector_stats.held_blocks == 10)  # type: ignore[union-attr]
    cluster.add(decode, "late", params)
    assert tokens(cluster.finish("late")[0]) == expected(PROMPT, 8)
    cluster.add(decode, "d", kept, OTHER)
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (expected(OTHER, 8), 37)
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_a_hand_over_that_is_given_back_before_its_prefill_has_ended_holds_nothing(cluster: Cluster, mode: str) -> None:
    prefill, decode = (cluster.start(mode=mode, lease_s=600.0) for _ in range(2))
    cluster.add(prefill, "p", DECODE | {"transfer_id": "t1"}, max_tokens=4)
    cluster.step(prefill)
    cluster.add(prefill, "back", {"do_release": True, "transfer_id": "t1"}, [1], max_tokens=1)
    output, _ = cluster.finish("p", "back")
    cluster.until(lambda: prefill.connector_stats.held_blocks == 0)  # type: ignore[union-attr]
    cluster.add(decode, "late", output.kv_transfer_params)
    assert tokens(cluster.finish("late")[0]) == expected(PROMPT, 8)
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_a_hand_over_that_is_given_back_while_it_is_fetched_arrives(
    cluster: Cluster, faulty: type[FaultyShm], mode: str
) -> None:
    prefill, decode = (cluster.start(mode=mode, lease_s=600.0) for _ in range(2))
    params = cluster.prefill(prefill, "p")
    faulty.is_held.set()
    cluster.add(decode, "d", params)
    cluster.until(lambda: any(x["claims"] for x in books(prefill)["producer"]) and is_transferring(decode))
    cluster.add(prefill, "back", {"do_release": True, "remote_lease_id": params["remote_lease_id"]}, [1], max_tokens=1)
    cluster.finish("back")
    assert prefill.connector_stats.held_blocks == 13  # type: ignore[union-attr]
    faulty.is_held.clear()
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_external_tokens) == (expected(PROMPT, 8), 50)
    cluster.check_idle()


# ---- aborts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_abort_at_the_decode_engine_before_it_loads(cluster: Cluster, mode: str) -> None:
    prefill, decode = (cluster.start(mode=mode, lease_s=1.0) for _ in range(2))
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    decode.abort_request("d")
    (output,) = cluster.finish("d")
    assert output.outputs[0].finish_reason == "abort"
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_abort_while_it_loads_keeps_the_blocks_until_the_bytes_have_landed(
    cluster: Cluster, faulty: type[FaultyShm], mode: str
) -> None:
    prefill, decode = (cluster.start(mode=mode, quarantine_s=15.0) for _ in range(2))
    params = cluster.prefill(prefill, "p")
    faulty.is_held.set()
    cluster.add(decode, "d", params)
    cluster.until(lambda: is_transferring(decode))
    for _ in range(20):
        cluster.step()
    decode.abort_request("d")
    cluster.finish("d")
    for _ in range(20):
        cluster.step()
    assert decode.scheduler.stats().num_held_blocks == {"loading": 13}
    faulty.is_held.clear()
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_abort_while_it_decodes(cluster: Cluster, mode: str) -> None:
    prefill, decode = (cluster.start(mode=mode) for _ in range(2))
    cluster.add(decode, "d", cluster.prefill(prefill, "p"), max_tokens=100)
    cluster.until(lambda: "d" in cluster.outputs)
    decode.abort_request("d")
    cluster.finish("d")
    cluster.check_idle()


def test_abort_at_the_prefill_engine_fails_a_waiting_push(cluster: Cluster) -> None:
    prefill, decode = cluster.start(mode="push"), cluster.start(mode="push")
    address = scheduler_side(prefill).agent.address
    params = {
        "do_remote_prefill": True, "transfer_id": "t1", "remote_host": address.host, "remote_port": address.port,
    }  # fmt: skip
    cluster.add(prefill, "p", DECODE | {"transfer_id": "t1"}, max_tokens=1)
    cluster.add(decode, "d", params)
    cluster.until(lambda: any(x["claims"] for x in books(prefill)["producer"]), decode)
    prefill.abort_request("p")
    aborted, output = cluster.finish("p", "d")
    assert aborted.kv_transfer_params is None
    assert tokens(output) == expected(PROMPT, 8)
    cluster.check_idle()


# ---- settings, roles, what is told ------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_roles_are_kept_apart(cluster: Cluster, role: str) -> None:
    llm = cluster.start(role=role)
    cluster.add(llm, "p", DECODE, max_tokens=1)
    (output,) = cluster.finish("p")
    assert (output.kv_transfer_params is not None) == (role == "kv_producer")
    other = cluster.start()
    cluster.add(llm, "d", cluster.prefill(other, "p2", OTHER), OTHER)
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(OTHER, 8)
    assert output.num_external_tokens == (37 if role == "kv_consumer" else 0)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"transprot": "shm"}, r"transprot is unknown \(did you mean 'transport'"),
        ({"transport": "shmem"}, "did you mean 'shm'"),
        ({"lease_s": 0.0}, "lease_s=0.0 must be above 0"),
        ({"host": "0.0.0.0"}, "can be reached from other machines"),
        ({"key_file": "/no/such"}, "key_file='/no/such' cannot be read"),
        ({"key_file": "/dev/null"}, "key_file='/dev/null' is empty"),
        ({"allowed_peers": [7]}, r"allowed_peers=\[7\] must be a list of texts"),
        ({"ucx": {"num_threads": [4]}}, r"ucx\.num_threads=\[4\] must be a text or a whole number"),
    ],
)
def test_wrong_settings_name_the_key_and_the_remedy(cluster: Cluster, extra: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cluster.start(**extra)


def test_names_say_the_mode(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="the connector's name says 'push'"):
        cluster.start("NixlPushConnector", mode="pull")
    for name, mode in (("NixlPullConnector", "pull"), ("NixlPushConnector", "push"), ("NixlConnector", "pull")):
        assert scheduler_side(cluster.start(name)).config.mode == mode


def test_ucx_settings_reach_nixl_as_texts(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: object, engine_id: str, ucx_params: dict[str, str]) -> None:
        raise ConfigError(f"NIXL with {ucx_params}")

    monkeypatch.setattr(nixl.NixlTransport, "__init__", init)
    monkeypatch.setattr(nixl, "load_nixl", lambda: None)  # as where it is installed
    with pytest.raises(ConfigError, match=r"NIXL with \{'num_threads': '4', 'ucx_devices': 'lo'\}"):
        cluster.start("NixlConnector", transport="nixl", ucx={"num_threads": 4, "ucx_devices": "lo"})


def test_what_is_told(cluster: Cluster, faulty: type[FaultyShm], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prefill, decode = cluster.start(), cluster.start()
    params = cluster.prefill(prefill, "p")
    assert prefill.connector_stats.held_blocks == 13  # type: ignore[union-attr]
    faulty.is_held.set()
    cluster.add(decode, "d", params)
    cluster.until(lambda: is_transferring(decode))
    peer = f"{params['remote_host']}:{params['remote_port']}"
    (row,) = decode.explain("d")["ranges"]  # type: ignore[index]
    assert row == {
        "tokens": [0, 50], "place": peer, "reason": "on its way from a prefill engine", "loaded": True,
    }  # fmt: skip
    faulty.is_held.clear()
    cluster.finish("d")
    assert f"KV between {peer} (rank 0) and this engine (rank 0) moves over shm" in caplog.text
    cluster.check_idle()
    assert prefill.connector_stats.held_blocks == 0  # type: ignore[union-attr]


def test_engines_with_a_key_talk_only_to_each_other(cluster: Cluster, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "other").write_text("fedcba9876543210fedcba9876543210\n")
    prefill = cluster.start(key_file=str(tmp_path / "key"))
    decode = cluster.start(key_file=str(tmp_path / "key"))
    stranger = cluster.start(key_file=str(tmp_path / "other"))
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    cluster.add(stranger, "s", cluster.prefill(prefill, "p2", OTHER), OTHER)
    ours, theirs = cluster.finish("d", "s")
    assert (tokens(ours), ours.num_external_tokens) == (expected(PROMPT, 8), 50)
    assert (tokens(theirs), theirs.num_external_tokens) == (expected(OTHER, 8), 0)
    scheduler_side(prefill).agent.use(lambda core, now: core.abort("p2", now))  # nobody comes for it
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_whole_batches_do_not_wait_for_consumers_and_an_interrupt_ends_at_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    prefill, decode = (cluster.start(mode=mode, lease_s=60.0) for _ in range(2))
    started_s = time.monotonic()
    sampling = SamplingParams(temperature=0.0, max_tokens=1, extra_args={"kv_transfer_params": DECODE})
    (output,) = prefill.generate(PROMPT, sampling)
    assert time.monotonic() - started_s < 20.0
    assert prefill.has_requests(), "its blocks are held"
    cluster.add(decode, "d", output.kv_transfer_params)
    assert tokens(cluster.finish("d")[0]) == expected(PROMPT, 8)
    cluster.check_idle()
    prefill.generate(OTHER, sampling)  # a lease that nobody comes for
    monkeypatch.setattr(StubModel, "forward", interrupted)
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        prefill.generate(PROMPT[5:], sampling)
    cluster.stop(prefill)
    assert time.monotonic() - started_s < 20.0


def interrupted(*arguments: Any) -> None:
    """Ctrl-C at a moment that is always the same."""
    raise KeyboardInterrupt
