"""Both sides of the P2P connector for engines of several workers, driven hook by hook as a host does it.

Every message between the sides goes through pickle, as in vLLM. Each KV element has a value of its own, so that what
arrives is compared element by element, without the planner.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.contract.host import HostInfo
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.views import RequestView, StepView
from kvferry.errors import ConfigError
from kvferry.p2p import scheduler_side as scheduler_module
from kvferry.p2p.scheduler_side import P2PSchedulerSide
from kvferry.p2p.step_messages import P2PHandshake
from kvferry.p2p.transports import nixl, shm
from kvferry.p2p.worker_side import P2PWorkerSide
from kvferry.testing.transports import FakeNetwork, FakeTransport
from kvferry.types import AttentionKind, GroupInfo

HEADS, WIDTH, LAYERS, NUM_BLOCKS = 4, 8, ("a", "b"), 20
PROMPT = list(range(30))


def host_of(rank: int, tp_size: int, block_size: int, **extra: Any) -> HostInfo:
    config = {"transport": "shm", "handshake_s": 30.0, "retry_s": 0.05, "claim_s": 30.0, **extra}
    return HostInfo(
        engine_id="tp", model="none", weights_are_random=True, max_model_len=100, num_blocks=NUM_BLOCKS,
        groups=(GroupInfo(0, LAYERS, block_size, AttentionKind.FULL),), tp_size=tp_size, pp_size=1, rank=rank,
        load_failure_policy="recompute", extra_config=config, numerics={},
        total_kv_heads=dict.fromkeys(LAYERS, HEADS), key_elements=dict.fromkeys(LAYERS, WIDTH // 2),
    )  # fmt: skip


class Engine:
    """A scheduler side and its workers."""

    def __init__(self, tp_size: int, block_size: int, **extra: Any) -> None:
        self.tp_size, self.block_size = tp_size, block_size
        self.workers = [P2PWorkerSide(host_of(rank, tp_size, block_size, **extra)) for rank in range(tp_size)]
        self.kv = [self.allocate(worker) for worker in self.workers]
        self.scheduler = P2PSchedulerSide(host_of(0, tp_size, block_size, **extra))
        shakes = {rank: through_pickle(worker.get_handshake_metadata()) for rank, worker in enumerate(self.workers)}
        self.scheduler.set_xfer_handshake_metadata_pp_aware({(0, rank): shake for rank, shake in shakes.items()})
        self.sent: list[str] = []
        self.received: list[str] = []
        self.failed: list[str] = []

    def allocate(self, worker: P2PWorkerSide) -> dict[str, torch.Tensor]:
        heads = max(1, HEADS // self.tp_size)
        shape = (NUM_BLOCKS, heads, self.block_size, WIDTH)
        layer_bytes = NUM_BLOCKS * heads * self.block_size * WIDTH * 4
        context = worker.get_mem_pool_context()
        assert context is not None
        with context:
            pool = torch.zeros(len(LAYERS) * layer_bytes, dtype=torch.int8)
        layers = {
            name: pool[i * layer_bytes : (i + 1) * layer_bytes].view(torch.float32).view(shape)
            for i, name in enumerate(LAYERS)
        }
        worker.register_kv_caches(layers)
        return layers

    def at(self, rank: int, layer: str, head: int, token: int, table: list[int]) -> torch.Tensor:
        """The place of one token's KV of one of this worker's heads."""
        return self.kv[rank][layer][table[token // self.block_size], head, token % self.block_size]

    def heads(self, rank: int) -> list[int]:
        count = max(1, HEADS // self.tp_size)
        first = rank * HEADS // self.tp_size
        return list(range(first, first + count))

    def step(self) -> None:
        metadata = through_pickle(self.scheduler.build_connector_meta(StepView()))
        results, reports = [], []
        for worker in self.workers:
            worker.handle_preemptions(metadata)
            worker.start_load_kv(metadata)
            results.append(worker.get_transfer_results(set()))
            reports.append(through_pickle(worker.build_connector_worker_meta()))
        assert all(result == results[0] for result in results), "each worker reports each id, in the same step"
        self.sent += sorted(results[0].finished_sending)
        self.received += sorted(results[0].finished_recving)
        self.failed += sorted(results[0].failed_recving)
        reports = [report for report in reports if report is not None]
        if reports:
            merged = reduce(lambda one, other: one.aggregate(other), reports)
            self.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=merged))

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def value(layer: str, head: int, token: int) -> torch.Tensor:
    return torch.arange(WIDTH) + 10.0 * token + 1000.0 * head + 10000.0 * LAYERS.index(layer)


def request(name: str, params: dict[str, Any], **fields: Any) -> RequestView:
    status = SimpleNamespace(name=fields.pop("status", "WAITING"))
    ids = PROMPT + fields.pop("outputs", [])
    raw = {
        "request_id": name, "kv_transfer_params": params, "all_token_ids": ids, "num_tokens": len(ids),
        "num_prompt_tokens": len(PROMPT), "num_computed_tokens": 0, "status": status,
    }  # fmt: skip
    return RequestView(SimpleNamespace(**(raw | fields)))


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(*arguments: Any, **extra: Any) -> Engine:
        made.append(Engine(*arguments, **extra))
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(holds: Callable[[], Any], *engines: Engine) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        for each in engines:
            each.step()
        time.sleep(0.001)


@pytest.mark.parametrize("mode", ["pull", "push"])
@pytest.mark.parametrize(
    ("source", "destination"), [((1, 4), (2, 4)), ((2, 4), (1, 8)), ((2, 8), (2, 4)), ((4, 4), (8, 4))]
)
def test_every_rank_gets_its_heads(
    engine: Callable[..., Engine], mode: str, source: tuple[int, int], destination: tuple[int, int]
) -> None:
    prefill, decode = engine(*source, mode=mode), engine(*destination, mode=mode)
    table = [5, 3, 9, 11, 2, 7, 8, 1][: -(-30 // prefill.block_size)]
    for rank in range(prefill.tp_size):
        for layer in LAYERS:
            for local, head in enumerate(prefill.heads(rank)):
                for token in range(30):
                    prefill.at(rank, layer, local, token, table)[:] = value(layer, head, token)
    asked = {"do_remote_decode": True}
    prefill.scheduler.on_new_request(request("p", asked))
    done = request("p", asked, status="FINISHED_LENGTH_CAPPED", outputs=[77], num_computed_tokens=30)
    keeps, params = prefill.scheduler.request_finished(done, (table,))
    assert keeps
    assert params is not None
    assert (params["tp_size"], params["remote_first_token_ids"]) == (source[0], [77])

    wanted = request("d", params)
    decode.scheduler.on_new_request(wanted)
    assert decode.scheduler.get_num_new_matched_tokens(wanted, 8) == (22, True)
    own = [4, 6, 10, 12, 14, 13, 19, 18][: -(-30 // decode.block_size)]
    decode.scheduler.update_state_after_alloc(wanted, (own,), 22)
    until(lambda: decode.received and prefill.sent, prefill, decode)
    assert (decode.received, decode.failed, prefill.sent) == (["d"], [], ["p"])
    for rank in range(decode.tp_size):
        for layer in LAYERS:
            for local, head in enumerate(decode.heads(rank)):
                for token in range(30):
                    expected = value(layer, head, token) if token >= 8 else torch.zeros(WIDTH)
                    assert torch.equal(decode.at(rank, layer, local, token, own), expected)
    for _ in range(20):
        prefill.step()
        decode.step()
    ends = prefill.scheduler, decode.scheduler
    until(lambda: not any(end.has_pending_push_work() for end in ends), prefill, decode)
    assert (decode.received, prefill.sent) == (["d"], ["p"]), "each id is told once"
    assert not decode.scheduler._jobs
    assert not prefill.scheduler._jobs


def hand_over(prefill: Engine, decode: Engine) -> None:
    """Up to where the decode engine waits for all of the prompt."""
    asked = {"do_remote_decode": True}
    prefill.scheduler.on_new_request(request("p", asked))
    done = request("p", asked, status="FINISHED_STOPPED", outputs=[7], num_computed_tokens=30)
    _, params = prefill.scheduler.request_finished(done, (list(range(1, 9)),))
    wanted = request("d", params or {})
    decode.scheduler.on_new_request(wanted)
    assert decode.scheduler.get_num_new_matched_tokens(wanted, 0) == (30, True)
    decode.scheduler.update_state_after_alloc(wanted, (list(range(1, 9)),), 30)


def test_a_producer_says_which_requests_it_can_hand_to_nobody(engine: Callable[..., Engine]) -> None:
    """A router need not blame the engine for them, nor ask another one."""
    prefill = engine(1, 4)
    for asked, is_said in (({"do_remote_decode": True}, True), ({}, False)):
        embedded = request("p", asked, prompt_embeds=object())
        prefill.scheduler.on_new_request(embedded)
        keeps, told = prefill.scheduler.request_finished(embedded, (list(range(1, 9)),))
        assert (keeps, "prompt embeddings" in (told or {}).get("not_handed_over", "")) == (False, is_said)


def test_engines_that_listen_on_ipv6_alone_hand_over(engine: Callable[..., Engine]) -> None:
    prefill, decode = (engine(1, 4, host="::1") for _ in range(2))
    hand_over(prefill, decode)
    until(lambda: decode.received and prefill.sent, prefill, decode)
    assert (decode.received, decode.failed, prefill.sent) == (["d"], [], ["p"])


def test_an_engine_starts_without_room_in_shared_memory(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(shm, "SHM_DIRECTORY", tmp_path / "file" / "no folder")
    monkeypatch.setattr(nixl.NixlTransport, "from_config", lambda setup: FakeTransport(FakeNetwork(), "nixl"))
    assert list(engine(1, 4, transport="auto").workers[0].transports) == ["nixl"]
    with pytest.raises(ConfigError, match="no room for a shared KV pool"):
        engine(1, 4, transport="shm")


def test_a_connection_counts_as_closed_when_it_is_on_every_rank(engine: Callable[..., Engine]) -> None:
    prefill, decode = engine(1, 4), engine(2, 4)
    hand_over(prefill, decode)
    until(lambda: decode.received, decode, prefill)
    prefill.close()
    until(lambda: decode.scheduler.agent.has_events)
    metadata = decode.scheduler.build_connector_meta(StepView())
    assert len(metadata.closes) == 1
    for worker in decode.workers:
        worker.handle_preemptions(metadata)
    for rank, still in ((0, True), (1, False)):
        decode.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=report_of(decode, rank)))
        assert bool(decode.scheduler._closing) is still
        assert decode.scheduler.has_pending_push_work() is still


def report_of(engine: Engine, rank: int) -> Any:
    """A worker's next report."""
    reports: list[Any] = []
    until(lambda: reports.append(engine.workers[rank].build_connector_worker_meta()) or reports[-1])
    return reports[-1]


def test_a_worker_that_says_nothing_is_a_config_error(engine: Callable[..., Engine]) -> None:
    scheduler = P2PSchedulerSide(host_of(0, 2, 4))
    with pytest.raises(ConfigError, match=r"workers \[1\] of 2 described their KV cache"):
        scheduler.set_xfer_handshake_metadata({1: P2PHandshake(1, b"", {})})
    scheduler.shutdown()


def test_a_geometry_that_is_seen_again_is_not_checked_again(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bool] = []
    check = scheduler_module.check_geometries

    def count(local: bytes, remote: bytes, is_from_remote: bool, sides: tuple[str, str]) -> list[str]:
        checked.append(is_from_remote)
        return check(local, remote, is_from_remote, sides)

    monkeypatch.setattr(scheduler_module, "check_geometries", count)
    prefill, decode = engine(1, 4), engine(1, 4)
    hand_over(prefill, decode)
    until(lambda: decode.received and prefill.sent, prefill, decode)
    assert sorted(checked) == [False, True], "each looks at the other once, whether it asks or answers"


def test_what_peers_would_refuse_for_its_size_is_a_config_error(engine: Callable[..., Engine]) -> None:
    geometry = engine(1, 4).scheduler._geometry
    scheduler = P2PSchedulerSide(host_of(0, 1, 4))
    shakes = [P2PHandshake(0, geometry, {"shm": bytes(num_bytes)}) for num_bytes in (65537, 65536)]
    with pytest.raises(ConfigError, match=r"`bytes` of length <= 65536.*'shm': 65537.*kv_connector_extra_config"):
        scheduler.set_xfer_handshake_metadata({0: shakes[0]})
    scheduler.set_xfer_handshake_metadata({0: shakes[1]})
    scheduler.shutdown()
