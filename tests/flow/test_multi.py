"""Engine + MultiConnector + stub model: two tiers of host memory, nested, beside a faulty child of a third party."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.contract import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorTransferResults, SupportsHMA
from kvferry.engine.outputs import RequestOutput
from kvferry.errors import ConfigError
from kvferry.multi.child import MAX_ERRORS
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

BLOCK_SIZE = 16
CHUNK_BYTES = 8192
SMALL, LARGE = 5 * CHUNK_BYTES, 128 * CHUNK_BYTES


def offloading(cpu_bytes: int, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {"weights_version": "1", "cpu_bytes_to_use": cpu_bytes, **extra},
    }


def multi(*children: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": list(children), **extra}}


class Orders(KVConnectorMetadata):
    pass


class ThirdParty(KVConnectorBase_V1, SupportsHMA):
    """An external child: delays every free, reports it late and twice; can claim what it never loads, or raise."""

    raises_in = ""
    claims_sync = False
    made: list[ThirdParty]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)
        self.told: dict[str, int] = {}
        self.claimed: set[str] = set()

    def _do(self, hook: str) -> None:
        if hook == self.raises_in:
            raise RuntimeError(f"boom in {hook}")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._do("get_num_new_matched_tokens")
        if not self.claims_sync or request.request_id in self.claimed:
            return 0, False
        left = (request.num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE - num_computed_tokens
        return max(0, left), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.claimed.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        self._do("build_connector_meta")
        return Orders()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        raise AssertionError("asked for all groups")

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return True, {"third": request.request_id}

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._do("start_load_kv")

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._do("wait_for_layer_load")

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self._do("save_kv_layer")

    def wait_for_save(self) -> None:
        self._do("wait_for_save")

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        self.told.update(dict.fromkeys(finished_req_ids, 0))
        for request_id in self.told:
            self.told[request_id] += 1
        return KVConnectorTransferResults({name for name, steps in self.told.items() if steps in (3, 5)})


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(ThirdParty, "made", [], raising=False)
    return {"kv_connector": "ThirdParty", "kv_connector_module_path": __name__}


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    engines: list[LLM] = []
    torch.set_num_threads(1)

    def make(transfer: dict[str, Any], policy: str = "recompute", **settings: Any) -> LLM:
        transfer = {"kv_role": "kv_both", "kv_load_failure_policy": policy, **transfer}
        settings = {"block_size": BLOCK_SIZE, "num_kv_blocks": 128, **settings}
        engines.append(LLM(StubModel(), kv_transfer_config=transfer, **settings))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()
        llm.check_integrity()


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


def run(llm: LLM, tokens: list[int], max_tokens: int = 5) -> RequestOutput:
    """Generate, check every token against the model's definition, check all invariants, and come to rest."""
    output = llm.generate(tokens, SamplingParams(max_tokens=max_tokens, temperature=0))[0]
    assert output.error is None
    assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, max_tokens)
    deadline_s = time.monotonic() + 60
    while llm.has_requests():
        assert time.monotonic() < deadline_s, "something never comes to rest"
        llm.step()
        llm.check_integrity()
        time.sleep(0.0005)
    return output


@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize(("policy", "num_loaded"), [("first", 192), ("longest", 512)])
def test_two_host_tiers_of_different_size(make_llm: Any, policy: str, num_loaded: int, load_async: bool) -> None:
    """The first tier knows 3 chunks of 64 tokens, the second all 8: order or length decides who loads."""
    small, large = offloading(SMALL, load_async=load_async), offloading(LARGE, load_async=load_async)
    llm = make_llm(multi(small, large, load_policy=policy))
    tokens = prompt(530)
    run(llm, tokens)
    assert llm.connector.children[0].connector.reset_cache()
    assert llm.reset_prefix_cache()
    assert run(llm, tokens[:200]).num_external_tokens == 192, "the second loads, and the first stores what was loaded"
    assert llm.reset_prefix_cache()
    assert run(llm, tokens).num_external_tokens == num_loaded
    assert llm.reset_prefix_cache(), "no block is held at rest"


def test_the_second_child_serves_what_the_first_has_lost(make_llm: Any) -> None:
    llm = make_llm(multi(offloading(SMALL), offloading(LARGE)))
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.connector.children[0].connector.reset_cache()
    assert llm.reset_prefix_cache()
    output = run(llm, tokens)
    assert output.num_external_tokens == 256
    assert output.external_hit_sources == {"host": 256}
    assert llm.reset_prefix_cache(reset_connector=True)
    assert run(llm, tokens).num_external_tokens == 0


def test_nested_and_external_children(make_llm: Any, third_party: Any) -> None:
    llm = make_llm(multi(third_party, multi(offloading(SMALL), multi(offloading(LARGE)))))
    tokens = prompt(300)
    assert run(llm, tokens).num_external_tokens == 0
    assert llm.reset_prefix_cache(), "the late and repeated reports freed every block, once"
    output = run(llm, tokens)
    assert output.num_external_tokens == 256
    request_id = output.request_id
    assert output.kv_transfer_params == {"third": request_id, "children": {"ThirdParty": {"third": request_id}}}
    assert llm.counters.unknown_completions == 0
    assert llm.counters.hook_errors == {}
    assert llm.reset_prefix_cache()


@pytest.mark.parametrize(
    "hook",
    ["get_num_new_matched_tokens", "build_connector_meta", "start_load_kv", "wait_for_layer_load", "wait_for_save"],
)
def test_a_child_that_raises_costs_only_itself(make_llm: Any, third_party: Any, monkeypatch: Any, hook: str) -> None:
    llm = make_llm(multi(third_party, offloading(LARGE)))
    monkeypatch.setattr(ThirdParty, "raises_in", hook)
    tokens = prompt(300)
    run(llm, tokens, max_tokens=MAX_ERRORS + 1)
    assert llm.reset_prefix_cache()
    assert run(llm, tokens).num_external_tokens == 256
    stats = llm.connector.get_kv_connector_stats()
    if hook != "get_num_new_matched_tokens":
        assert stats.children["ThirdParty"].fallbacks == {"hook raised": MAX_ERRORS, "switched off": 1}
    assert llm.counters.hook_errors == {}


@pytest.mark.parametrize("hook", ["build_connector_meta", "start_load_kv", "wait_for_layer_load"])
def test_a_broken_synchronous_load_is_computed_again_and_stored_by_nobody(
    make_llm: Any, third_party: Any, monkeypatch: Any, hook: str
) -> None:
    """The other child saves in the very step whose KV never came: what it saved must not be found again."""
    llm = make_llm(multi(third_party, offloading(LARGE)))
    monkeypatch.setattr(ThirdParty, "claims_sync", True)
    monkeypatch.setattr(ThirdParty, "raises_in", hook)
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.counters.load_failures == 1
    monkeypatch.setattr(ThirdParty, "claims_sync", False)
    monkeypatch.setattr(ThirdParty, "raises_in", "")
    for _ in range(2):  # the first store may still be given up while the tokens are computed again
        assert llm.reset_prefix_cache()
        loaded = run(llm, tokens).num_external_tokens
    assert loaded == 256, "stored anew, and right"


def test_a_child_that_is_still_looking_delays_a_hit_by_the_deadline(make_llm: Any, third_party: Any) -> None:
    clock = FakeClock()
    llm = make_llm(multi(third_party, offloading(LARGE), lookup_wait_s=5), clock=clock)
    tokens = prompt(300)
    run(llm, tokens)
    assert llm.reset_prefix_cache()
    llm.connector._claims._clock = clock
    scheduler = llm.connector.children[0].connector
    scheduler.get_num_new_matched_tokens = lambda request, num: (None, False)
    request_id = llm.add_request(tokens, SamplingParams(max_tokens=3, temperature=0))
    for _ in range(20):
        assert llm.step() == []
    clock.advance(5)
    outputs = []
    for _ in range(10_000):
        outputs += llm.step()
        if not llm.has_unfinished_requests():
            break
    assert outputs[-1].request_id == request_id
    assert outputs[-1].num_external_tokens == 256
    assert outputs[-1].outputs[0].token_ids == StubModel().expected_tokens(tokens, 3)


def test_abort_and_preemption_leave_nothing_behind(make_llm: Any, third_party: Any) -> None:
    llm = make_llm(multi(offloading(SMALL), third_party, offloading(LARGE)), num_kv_blocks=40)
    wanted = {}
    outputs: dict[str, RequestOutput] = {}
    for seed in range(24):
        tokens = prompt(64 * (seed % 5 + 1), seed % 3) + prompt(seed, seed)
        wanted[llm.add_request(tokens, SamplingParams(max_tokens=20, temperature=0))] = tokens
        for _ in range(3):
            outputs.update((output.request_id, output) for output in llm.step())
            llm.check_integrity()
        if seed % 6 == 5:
            llm.abort_request(list(wanted)[seed - 1])
    for _ in range(100_000):
        if not llm.has_requests():
            break
        outputs.update((output.request_id, output) for output in llm.step())
        llm.check_integrity()
    assert set(outputs) == set(wanted)
    for request_id, tokens in wanted.items():
        done = outputs[request_id].outputs[0]
        if done.finish_reason != "abort":
            assert done.token_ids == StubModel().expected_tokens(tokens, 20)
    assert any(output.num_external_tokens for output in outputs.values())
    assert llm.reset_prefix_cache(), "no block may be held at rest"
    assert llm.counters.contract_errors == {}
    assert llm.counters.hook_errors == {}


def test_wrong_children_stop_the_engine_before_it_starts(make_llm: Any) -> None:
    with pytest.raises(ConfigError, match=r"connectors\[1\] \(OffloadingConnector#2\): .*cpu_bytes_to_use is missing"):
        make_llm(multi(offloading(LARGE), {"kv_connector": "OffloadingConnector"}))


@pytest.mark.parametrize(
    "child",
    [{"kv_connector": "P2PConnector", "kv_connector_extra_config": {"transport": "shm", "weights_version": "1"}},
     {"kv_connector": "DecodeBenchConnector"}],
    ids=lambda child: str(child["kv_connector"]),
)  # fmt: skip
def test_a_child_that_stores_nothing_does_not_spoil_a_reset(make_llm: Any, child: dict[str, Any]) -> None:
    llm = make_llm(multi(offloading(LARGE), child) | {"kv_role": "kv_both"})
    assert llm.reset_prefix_cache(reset_connector=True)
