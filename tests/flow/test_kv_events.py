"""An engine that publishes: a subscriber who joins late and replays knows what is in the engine and in every tier."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kv_event_client import Fold, Subscriber

from kvferry import LLM, SamplingParams
from kvferry.errors import ConfigError
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

EVENTS = {"enable_kv_cache_events": True, "endpoint": "tcp://127.0.0.1:0", "replay_endpoint": "tcp://127.0.0.1:0"}


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


def transfer(folder: Path) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "weights_version": "1",
            "cpu_bytes_to_use": 10 << 12,
            "secondary_tiers": [{"type": "fs", "path": str(folder), "max_bytes": 16 << 13}],
        },
    }


@pytest.fixture
def make_router() -> Iterator[Callable[[LLM], Router]]:
    """Routers that are closed at the end."""
    made: list[Router] = []

    def make(llm: LLM) -> Router:
        made.append(Router(llm))
        return made[-1]

    yield make
    for router in made:
        router.subscriber.close()


class Router:
    """What a router would do: listen, replay what it missed, fold."""

    def __init__(self, llm: LLM) -> None:
        publisher = llm.event_publisher
        assert publisher is not None
        assert publisher.replay_endpoint is not None
        self.publisher = publisher
        self.subscriber = Subscriber(publisher.endpoint, publisher.replay_endpoint)
        self.fold = Fold()
        self.next = 0
        self.batches: list[Any] = []

    def catch_up(self) -> None:
        deadline_s = time.monotonic() + 20
        while self.next < self.publisher.num_messages and time.monotonic() < deadline_s:  # its thread may be behind
            for number, (_, events, _) in self.subscriber.replay(self.next):
                assert number == self.next
                self.next += 1
                self.batches.append(events)
                self.fold.take(events)
        assert self.next == self.publisher.num_messages


def check(llm: LLM, router: Router) -> None:
    router.catch_up()
    pool = llm.scheduler.manager.block_pool
    assert router.fold.at("GPU") == {block_hash for _, block_hash in pool._cached}
    side: Any = llm.connector.side  # type: ignore[union-attr]
    for medium, tier, place in (("CPU", None, "host"), ("STORAGE", "fs", "fs")):
        known = router.fold.at(medium, tier)
        assert all(side.store.has(place, value + bytes(4)) for value in known)
        num_there = side.store.stats().num_host_chunks if tier is None else len(side.store._lanes[0].tier.keys())
        assert len(known) == num_there


def test_a_router_knows_every_tier(make_router: Any, tmp_path: Path) -> None:
    rng = random.Random(5)
    with LLM(
        StubModel(), num_kv_blocks=60, kv_transfer_config=transfer(tmp_path / "kv"), kv_events_config=EVENTS
    ) as llm:
        router = make_router(llm)
        stems = [[rng.randrange(1000) for _ in range(300)] for _ in range(6)]
        for _ in range(25):
            prompts = [[*rng.choice(stems)[: rng.randrange(20, 300)], rng.randrange(1000)] for _ in range(3)]
            llm.generate(prompts, greedy(4))
            if rng.random() < 0.2:
                llm.reset_prefix_cache()
            side: Any = llm.connector.side  # type: ignore[union-attr]
            side.store.flush(20)
            llm.step()  # tells what the tiers did since
            check(llm, router)
        seen = {(event["type"], event.get("medium")) for batch in router.batches for event in batch}
        for medium in ("GPU", "CPU", "STORAGE"):
            assert {("BlockStored", medium), ("BlockRemoved", medium)} <= seen
        assert llm.reset_prefix_cache(reset_connector=True)
        llm.step()
        router.catch_up()
        assert not any(router.fold.known.values())


@pytest.mark.parametrize("with_tokens", [False, True])
def test_blocks_of_the_engine_form_chains_and_tokens_are_told_only_when_asked(
    make_router: Any, with_tokens: bool
) -> None:
    config = EVENTS | {"include_token_ids": with_tokens}
    prompt = [3 * i % 1000 for i in range(70)]
    with LLM(StubModel(), num_kv_blocks=60, kv_events_config=config, max_num_batched_tokens=40) as llm:
        router = make_router(llm)
        llm.generate(prompt, greedy(1))
        llm.generate(prompt[:40] + [9] * 30, greedy(1))
        router.catch_up()
        events = [event for batch in router.batches for event in batch]
        assert [len(event["block_hashes"]) for event in events] == [
            2,
            2,
            2,
        ]  # two steps, and what differs of the second
        first, second, third = events
        assert first["parent_block_hash"] is None
        assert second["parent_block_hash"] == third["parent_block_hash"] == first["block_hashes"][1]
        told = [event["token_ids"] for event in events]
        expected = [prompt[:32], prompt[32:64], prompt[32:40] + [9] * 24]
        assert told == (expected if with_tokens else [[], [], []])
        assert {(event["block_size"], event["medium"], event["lora_id"]) for event in events} == {(16, "GPU", None)}
        assert llm.reset_prefix_cache()
        router.catch_up()
        assert [event["type"] for event in router.batches[-1]] == ["BlockRemoved", "AllBlocksCleared"]
        assert not router.fold.known


def test_an_endpoint_in_use_stops_the_start_and_a_failed_start_frees_it() -> None:
    with LLM(StubModel(), num_kv_blocks=60, kv_events_config=EVENTS) as llm:
        assert llm.event_publisher is not None
        endpoint = llm.event_publisher.endpoint
        with pytest.raises(ConfigError, match="cannot be published on"):
            LLM(StubModel(), num_kv_blocks=60, kv_events_config=EVENTS | {"endpoint": endpoint})
    config = EVENTS | {"endpoint": endpoint}
    with pytest.raises(ConfigError, match="too small"):
        LLM(StubModel(), num_kv_blocks=1, kv_events_config=config)
    LLM(StubModel(), num_kv_blocks=60, kv_events_config=config).shutdown()


def test_off_means_off() -> None:
    with LLM(StubModel(), num_kv_blocks=60, kv_events_config=EVENTS | {"enable_kv_cache_events": False}) as llm:
        llm.generate([1] * 40, greedy(2))
        assert llm.event_publisher is None
        assert llm.scheduler.manager.on_cached is None
