"""Several KV groups in the embedded engine: every token is right, and window groups keep no more than their windows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.engine.outputs import RequestOutput
from kvferry.engine.request import Request
from kvferry.errors import ConfigError
from kvferry.testing.faulty import forget_media, media
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

BLOCK = 16
WINDOW = 40
MiB = 1 << 20
LAYERS = (WINDOW, WINDOW, None)
"""Three groups, of which only the last sees everything, as in Gemma 3."""


def model(windows: tuple[int | None, ...] = LAYERS) -> StubModel:
    return StubModel(windows=windows)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    engines: list[LLM] = []
    torch.set_num_threads(1)
    forget_media()

    def make(transfer: dict[str, Any] | None = None, windows: tuple[int | None, ...] = LAYERS, **options: Any) -> LLM:
        settings = {"block_size": BLOCK, "num_kv_blocks": 256, "max_num_batched_tokens": 128, **options}
        engines.append(LLM(model(windows), kv_transfer_config=transfer, **settings))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()
        llm.scheduler.check_integrity()


def run(llm: LLM, tokens: list[int], max_tokens: int = 5) -> RequestOutput:
    """Generate, check every token against the model's definition, check all invariants."""
    output = llm.generate(tokens, greedy(max_tokens))[0]
    check(llm, output)
    return output


def settle(llm: LLM) -> None:
    """Let sends end, forget what is cached, and spoil what is free."""
    while llm.has_requests():
        llm.step()
    assert llm.reset_prefix_cache()
    poison_free_blocks(llm)


def check(llm: LLM, output: RequestOutput) -> None:
    tokens = output.outputs[0].token_ids
    assert output.error is None
    assert tokens == llm._model.expected_tokens(output.prompt_token_ids, len(tokens))
    llm.scheduler.check_integrity()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


def tables(llm: LLM) -> list[tuple[list[int], ...]]:
    return [llm.scheduler.manager.get_block_ids(request["request_id"]) for request in llm.live_requests()]


def poison_free_blocks(llm: LLM) -> None:
    """What is free and cannot be found again may hold anything."""
    blocks = llm.scheduler.manager.block_pool.blocks
    free = [b.block_id for b in blocks if not b.is_null and b.ref_cnt == 0 and b.block_hash is None]
    for view in llm.kv_caches.values():
        view[free] = float("nan")


# ---- groups and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ((40, 40, None) * 2, [(40, [0, 3]), (40, [1, 4]), (None, [2, 5])]),  # vLLM's groups of such a model
        ((None, 40), [(None, [0]), (40, [1])]),
        ((40, 40, 40, 40, 40, None, 40, 40), [(40, [i]) for i in (0, 1, 2, 3, 4, 6, 7)] + [(None, [5])]),
        ((40, 40, None, None, 40), [(40, [0, 4]), (40, [1]), (None, [2, 3])]),
        ((40,) * 5 + (None,) * 4, [(40, [0, 2, 4]), (40, [1, 3]), (None, [5, 6, 7, 8])]),
        ((40, 60, None), [(40, [0]), (60, [1]), (None, [2])]),
        ((40, 40), [(40, [0, 1])]),
        ((None, None), [(None, [0, 1])]),
    ],
    ids=str,
)
def test_layers_are_grouped_and_overlaid(make_llm: Any, windows: Any, groups: Any) -> None:
    llm = make_llm(windows=windows)
    config = llm.kv_cache_config
    found = [
        (getattr(group.kv_cache_spec, "sliding_window", None), [int(n.split(".")[2]) for n in group.layer_names])
        for group in config.kv_cache_groups
    ]
    if windows == (40,) * 5 + (None,) * 4:  # five are a quarter more than four: two groups of windows
        assert found == groups
    assert sorted(found, key=str) == sorted(groups, key=str)
    page = 16 * 2 * 8 * 4
    for group in config.kv_cache_groups:  # layer i of every group lies at the same place of a block
        for i, name in enumerate(group.layer_names):
            assert llm.kv_caches[name].storage_offset() * 4 == i * page
    total = llm._hosted.kv.storage.numel()
    assert total == 256 * page * max(len(layers) for _, layers in groups)


def test_a_long_request_keeps_a_window_and_the_saving_is_what_was_promised(make_llm: Any) -> None:
    """Bytes held by one request of 1,200 tokens, at the end of its prefill and while it decodes."""
    held = {}
    for disabled in (True, False):
        llm = make_llm(num_kv_blocks=400, disable_hybrid_kv_cache_manager=disabled)
        llm.add_request(prompt(1200), greedy(8))
        pool = llm.scheduler.manager.block_pool
        peak = 0
        while llm.has_unfinished_requests():
            for output in llm.step():
                check(llm, output)
            poison_free_blocks(llm)
            peak = max(peak, len(pool.blocks) - 1 - pool.get_num_free_blocks())
        block_bytes = llm._hosted.kv.storage.numel() // len(pool.blocks)
        held[disabled] = peak * block_bytes
    # In one group: 76 blocks of three layers. In three: 76 of one, and per window what 39 + 128 tokens touch.
    page = BLOCK * 2 * 8 * 4
    assert held[True] == 76 * 3 * page
    assert held[False] <= (76 + 2 * 12) * page
    print(f"peak KV of a request of 1,200 tokens: {held[True]} bytes in one group, {held[False]} in three")


def test_tables_hold_null_blocks_before_the_window(make_llm: Any) -> None:
    llm = make_llm(max_num_batched_tokens=64)
    llm.add_request(prompt(200), greedy(4))
    for _ in range(4):
        llm.step()
    ((first, second, full),) = tables(llm)
    # 200 tokens are computed: the next one sees 161 to 200, so blocks 10 to 12 stay, and the next one joins them.
    for table in (first, second):
        assert [bool(block) for block in table] == [False] * 10 + [True] * 3
    assert all(full)
    assert len(full) == 13
    assert not set(first) & set(second) - {0}


def test_many_requests_in_a_small_pool_are_right_whatever_is_preempted(make_llm: Any) -> None:
    seed = 20
    print(f"seed {seed}")
    rng = random.Random(seed)
    num_preemptions = num_hits = 0
    for windows in ((40, 40, None), (33, None), (2, 50)):
        llm = make_llm(windows=windows, num_kv_blocks=48, max_num_batched_tokens=48, max_num_seqs=6)
        longest = llm.config.model_config.max_model_len
        for i in range(20):
            num_tokens = rng.randrange(1, min(240, longest - 60))
            llm.add_request(prompt(num_tokens, rng.randrange(3)), greedy(rng.randrange(1, 60)))
            for _ in range(rng.randrange(6) if i < 19 else 2000):
                for output in llm.step():
                    if output.finished:
                        check(llm, output)
                        num_hits += output.num_cached_tokens > 0
                poison_free_blocks(llm)
                if not llm.has_unfinished_requests():
                    break
        num_preemptions += llm.scheduler.num_preemptions
        assert not llm.has_unfinished_requests()
    assert num_preemptions > 5
    assert num_hits > 5


# ---- the engine's own prefix cache ----------------------------------------------------------------------------------


def test_hits_end_where_every_group_has_its_tail(make_llm: Any) -> None:
    llm = make_llm()
    tokens = prompt(330)
    run(llm, tokens)
    assert run(llm, tokens).num_cached_tokens == 320
    hashes = Request("x", tokens, SamplingParams(), block_size=BLOCK).block_hashes
    pool = llm.scheduler.manager.block_pool

    def hit_without(group: int, block: int) -> int:
        pool.evict_blocks([pool._cached[group, hashes[block]].block_id])
        return run(llm, tokens).num_cached_tokens  # computes what is missing and enters it again

    assert hit_without(0, 19) == 304  # a window's last block: what ends before it can do without
    assert hit_without(1, 17) == 272  # the first block of its tail: every hit that ends behind it needs it
    assert hit_without(1, 16) == 320  # before the tail: of no use
    assert hit_without(2, 10) == 160  # the full group needs every block


@pytest.mark.parametrize("num_shared", [15, 16, 17, 47, 48, 49, 127, 128, 129])
@pytest.mark.parametrize("windows", [(WINDOW, None), (33, None), (17, 33), (16, None)], ids=str)
def test_hits_at_block_boundaries(make_llm: Any, num_shared: int, windows: Any) -> None:
    llm = make_llm(windows=windows)
    run(llm, prompt(150))
    poison_free_blocks(llm)
    output = run(llm, [*prompt(num_shared), 7, 8, 9])
    assert output.num_cached_tokens == num_shared // BLOCK * BLOCK


# ---- connectors -----------------------------------------------------------------------------------------------------


def offloading(**extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"weights_version": "1", "cpu_bytes_to_use": 4 * MiB, **extra},
    }


def faulty(name: str = "a", load_async: bool = True, policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "FaultyConnector",
        "kv_connector_module_path": "kvferry.testing.faulty",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"medium": name, "load_async": load_async, **extra},
    }


def multi(*parts: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": list(parts), **extra},
    }


CONNECTORS = {
    "offloading": (offloading(), 320),
    "offloading, sync": (offloading(load_async=False), 320),
    "faulty": (faulty(), 320),
    "faulty, sync": (faulty(load_async=False), 320),
    "multi": (multi(offloading(), faulty()), 320),
    "multi, sync": (multi(faulty(load_async=False), offloading(load_async=False)), 320),
    "sends at the end": (faulty(send_on_finish=True), 320),
}


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("windows", [LAYERS, (None, 17), (33, 50, None), (40, 40)], ids=str)
def test_every_capable_connector_brings_back_what_the_engine_forgot(make_llm: Any, name: str, windows: Any) -> None:
    transfer, num_external = CONNECTORS[name]
    llm = make_llm(transfer, windows=windows)
    tokens = prompt(330)
    assert run(llm, tokens).num_external_tokens == 0
    for more in ([], [1, 2, 3]):
        settle(llm)
        assert run(llm, tokens + more).num_external_tokens == num_external
    assert run(llm, tokens[:200] + more).num_external_tokens in (0, 192)  # window tails there: stored, not in the pool
    assert llm.counters.hook_errors == llm.counters.contract_errors == {}
    assert llm.counters.load_failures == 0


def test_nobody_is_preempted_for_blocks_that_left_a_window_and_are_still_stored(make_llm: Any) -> None:
    """The pool has room for one request; what its windows leave comes free only when it is copied."""
    llm = make_llm(offloading(), num_kv_blocks=130, max_num_batched_tokens=64)
    llm._hosted.scheduler._guard.connector.side._clock = FakeClock()  # no store is ever late
    worker = llm._hosted.worker._guard.connector.side
    run_order = worker._run
    worker._run = lambda order: (time.sleep(0.002), run_order(order))[1]  # the model needs less for a chunk
    run(llm, prompt(1580), 15)
    assert llm.scheduler.num_preemptions == 0
    assert llm.counters.hook_errors == {}


@pytest.mark.parametrize("windows", [LAYERS, (WINDOW, WINDOW), (33, 50)], ids=str)
def test_what_was_loaded_is_not_explained_as_local(make_llm: Any, windows: Any) -> None:
    """The null blocks before a window's tail are no hits."""
    llm = make_llm(offloading(), windows=windows, explain_requests=True)
    run(llm, prompt(330))
    settle(llm)
    found = llm.explain(run(llm, prompt(330)).request_id)
    assert found["tokens"]["from_device"] == 0
    assert {item["place"] for item in found["ranges"] if item["loaded"]} == {"host"}
    assert "device" not in {item["place"] for item in found["ranges"]}


def test_only_the_tail_of_a_window_is_loaded(make_llm: Any) -> None:
    llm = make_llm(faulty())
    tokens = prompt(330)
    run(llm, tokens)
    assert llm.reset_prefix_cache()
    loaded: list[tuple[int, int]] = []
    worker = media("a").workers[-1]
    load = worker._load
    worker._load = lambda job: (loaded.extend((key[0], index) for key, index, _ in job.pages), load(job))
    run(llm, tokens)
    # Behind 320 tokens the next one sees 281 to 319, which lie in blocks 17 to 19.
    assert sorted(loaded) == [(0, 17), (0, 18), (0, 19), (1, 17), (1, 18), (1, 19)] + [(2, i) for i in range(20)]


def test_connectors_are_told_of_every_group_with_null_blocks(make_llm: Any) -> None:
    llm = make_llm(faulty())
    connector = media("a").schedulers[-1]
    told: dict[str, list[Any]] = {"alloc": [], "finish": [], "new": []}
    alloc, finish, build = (
        connector.update_state_after_alloc, connector.request_finished_all_groups, connector.build_connector_meta
    )  # fmt: skip

    def update_state_after_alloc(request: Any, blocks: Any, num_external: int) -> None:
        told["alloc"].append((num_external, blocks.get_block_ids()))
        alloc(request, blocks, num_external)

    def request_finished_all_groups(request: Any, block_ids: Any) -> Any:
        told["finish"].append(block_ids)
        return finish(request, block_ids)

    def build_connector_meta(output: Any) -> Any:
        told["new"] += [new.block_ids for new in output.scheduled_new_reqs]
        told["new"] += output.scheduled_cached_reqs.new_block_ids
        return build(output)

    connector.update_state_after_alloc = update_state_after_alloc
    connector.request_finished_all_groups = request_finished_all_groups
    connector.build_connector_meta = build_connector_meta
    run(llm, prompt(330), 2)

    def real(tables: Any) -> list[list[int]]:
        return [[i for i, block in enumerate(table) if block] for table in tables]

    assert [num_external for num_external, _ in told["alloc"]] == [0]
    # 128 tokens in each of two steps, 74 in the third, and one to decode, which needs no new block.
    assert [blocks if blocks is None else [len(ids) for ids in blocks] for blocks in told["new"]] == [
        [8, 8, 8], [8, 8, 8], [5, 5, 5], None,
    ]  # fmt: skip
    assert not any(0 in ids for blocks in told["new"][:3] for ids in blocks)
    # 331 tokens have KV at the end; a later one sees 292 and up.
    assert real(told["finish"][0]) == [[18, 19, 20], [18, 19, 20], [*range(21)]]
    settle(llm)
    run(llm, prompt(330), 2)
    _, (_, loading), (_, promoted) = told["alloc"]
    assert real(loading) == [[17, 18, 19], [17, 18, 19], [*range(20)]]
    assert real(promoted) == [[17, 18, 19, 20], [17, 18, 19, 20], [*range(21)]]  # and one for the tokens to compute


def test_a_whole_prompt_that_a_window_ends_with_is_computed_rather_than_guessed(make_llm: Any) -> None:
    """Window 33, blocks of 16: behind 320 tokens nothing before 288 is loaded, but token 319 sees 287."""
    llm = make_llm(faulty(), windows=(33, None))
    tokens = prompt(320)
    run(llm, tokens)
    settle(llm)
    assert run(llm, tokens).num_external_tokens == 0  # this connector claims all 320, more than can be used
    polite = make_llm(offloading(), windows=(33, None))
    run(polite, tokens)
    assert polite.reset_prefix_cache()
    assert run(polite, tokens).num_external_tokens == 304


def test_restart_over_one_folder_loads_window_tails_from_disk(make_llm: Any, tmp_path: Path) -> None:
    tokens = prompt(330)
    transfer = offloading(secondary_tiers=[{"type": "fs", "path": str(tmp_path / "kv")}])
    first = make_llm(transfer)
    run(first, tokens)
    first.shutdown()
    output = run(make_llm(transfer), tokens)
    assert output.num_external_tokens == 320
    assert output.external_hit_sources == {"disk": 320}


def test_decode_bench_fills_each_groups_own_blocks(make_llm: Any) -> None:
    transfer = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both",
                "kv_connector_extra_config": {"fill_mean": 3.0, "fill_std": 0}}  # fmt: skip
    llm = make_llm(transfer)
    llm.add_request(prompt(330), greedy(3))
    llm.step()
    ((first, second, full),) = tables(llm)  # the step went on to 330 tokens: block 17 has left the windows
    views = list(llm.kv_caches.values())
    for table, filled, view in (
        (first, range(18, 20), views[0]),
        (second, range(18, 20), views[1]),
        (full, range(20), views[2]),
    ):
        assert [i for i, block in enumerate(table) if block] == [*filled, 20]
        assert all(torch.all(view[table[i]] == 3.0) for i in filled)
        last = view[table[20]]  # all made up but the one token that was computed
        assert (last == 3.0).sum() * 16 == last.numel() * 15
    while llm.has_unfinished_requests():
        (*_, output) = llm.step() or [None]
    assert output is not None
    assert output.num_external_tokens == 329


@pytest.mark.parametrize("setting", [None, True, False])
def test_a_connector_without_support_gets_one_group_or_is_refused(make_llm: Any, tmp_path: Path, setting: Any) -> None:
    extra = {"shared_storage_path": str(tmp_path), "weights_version": "1"}
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    for windows in (LAYERS, (40, 40)):
        if setting is False and windows == LAYERS:
            with pytest.raises(ConfigError, match="ExampleConnector does not support hybrid KV caches"):
                make_llm(transfer, windows=windows, disable_hybrid_kv_cache_manager=False)
            continue
        llm = make_llm(transfer, windows=windows, disable_hybrid_kv_cache_manager=setting)
        (group,) = llm.kv_cache_config.kv_cache_groups
        assert type(group.kv_cache_spec).__name__ == "FullAttentionSpec", "null blocks would be stored as KV"
        run(llm, prompt(100, seed=len(windows)))
        assert llm.reset_prefix_cache()
        assert run(llm, prompt(100, seed=len(windows))).num_external_tokens > 0
