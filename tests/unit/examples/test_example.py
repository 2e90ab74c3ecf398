"""ExampleConnector's sides alone: several ranks, kernel blocks, adapters, saves beside failed loads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.config import KVTransferConfig
from kvferry.contract import FullAttentionSpec, LoadFailure, make_kv_cache_config
from kvferry.contract.host import host_info
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.views import RequestView, ScheduledRequest, StepView
from kvferry.examples.example import ExampleSchedulerSide, ExampleWorkerSide

LAYERS = ("a", "b")
TOKENS = list(range(70))
TABLE = [3, 9, 4, 7]


class Host:
    """Two ranks with pools of random KV, each block split into two kernel blocks, heads outermost in memory."""

    def __init__(self, path: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=4, dtype=dtype)
        cache = make_kv_cache_config(12, dict.fromkeys(LAYERS, spec))
        extra = {"shared_storage_path": str(path), "weights_version": "w"}
        transfer = KVTransferConfig("ExampleConnector", kv_role="kv_both", kv_connector_extra_config=extra)
        infos = [host_info(self.config(transfer, rank), cache) for rank in range(2)]
        self.side = ExampleSchedulerSide(infos[0])
        self.workers = [ExampleWorkerSide(info) for info in infos]
        self.pools = [{name: torch.randn(24, 2, 8, 8).to(dtype) for name in LAYERS} for _ in infos]
        for worker, pool in zip(self.workers, self.pools, strict=True):
            worker.register_kv_caches(pool)

    @staticmethod
    def config(transfer: KVTransferConfig, rank: int) -> Any:
        return SimpleNamespace(
            kv_transfer_config=transfer,
            model_config=SimpleNamespace(model="m", max_model_len=512),
            parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1, rank=rank),
        )

    def add(self, request_id: str, **fields: Any) -> RequestView:
        fields = {"request_id": request_id, "all_token_ids": TOKENS, "num_tokens": len(TOKENS), **fields}
        view = RequestView(SimpleNamespace(**fields))
        self.side.on_new_request(view)
        return view

    def work(self, metadata: Any, skipped_layer: str = "", **output: Any) -> None:
        """Run a step on both ranks, and tell the scheduler side; rank 1 may leave a layer out."""
        for worker in self.workers:
            worker.handle_preemptions(metadata)
            worker.start_load_kv(metadata)
            for name in LAYERS:
                if worker is self.workers[0] or name != skipped_layer:
                    worker.wait_for_layer_load(name)
                    worker.save_kv_layer(name, torch.empty(0), None)
            worker.wait_for_save(metadata)
        reports = [worker.build_connector_worker_meta() for worker in self.workers]
        merged = reports[0].aggregate(reports[1])
        self.side.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=merged, **output))

    def order_saves(self, view: RequestView) -> Any:
        scheduled = [ScheduledRequest(view.request_id, 0, len(TOKENS), ([*TABLE, 11],))]
        return self.side.build_connector_meta(StepView(scheduled))

    def load(self, view: RequestView, table: list[int]) -> Any:
        num_tokens, is_async = self.side.get_num_new_matched_tokens(view, 0)
        assert (num_tokens, is_async) == (64, False)
        self.side.update_state_after_alloc(view, (table,), num_tokens)
        return self.side.build_connector_meta(StepView())

    def hit(self, view: RequestView) -> int:
        return self.side.get_num_new_matched_tokens(view, 0)[0]


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "kv")


def block(pool, name, block_id):
    return pool[name][2 * block_id : 2 * block_id + 2]


def test_every_rank_gets_its_own_bytes_back(host, tmp_path):
    host.work(host.order_saves(host.add("one")))
    other, table = Host(tmp_path / "kv"), [1, 2, 10, 6]
    before = [{name: pool[name].clone() for name in LAYERS} for pool in other.pools]
    other.work(other.load(other.add("two"), table))
    for rank in range(2):
        assert other.workers[rank].get_block_ids_with_load_errors() == set()
        for name in LAYERS:
            for old, new in zip(TABLE, table, strict=True):
                assert torch.equal(block(other.pools[rank], name, new), block(host.pools[rank], name, old))
            for untouched in set(range(12)) - set(table):
                assert torch.equal(block(other.pools[rank], name, untouched), block(before[rank], name, untouched))


def test_a_block_that_one_rank_has_not_saved_is_no_hit(host):
    view = host.add("one")
    host.work(host.order_saves(view), skipped_layer="b")
    assert host.hit(view) == 0
    assert list(host.side._root.iterdir()) == [host.side._tmp], "nothing of it was published"
    host.work(host.order_saves(view))
    assert host.hit(view) == 64


def test_a_layer_that_was_not_asked_for_is_a_failed_load(host):
    view = host.add("one")
    host.work(host.order_saves(view))
    host.work(host.load(view, TABLE), skipped_layer="a")
    assert host.workers[0].get_block_ids_with_load_errors() == set()
    assert host.workers[1].get_block_ids_with_load_errors() == set(TABLE)
    assert host.hit(view) == 0


@pytest.mark.parametrize(
    "failure", [{"invalid_block_ids": {5}}, {"failed_recving": {"x"}}, {"failed_blocks": {LoadFailure("x", 0, 0)}}]
)
def test_saves_beside_any_failed_load_are_dropped(host, failure):
    view = host.add("one")
    now, next_step = host.order_saves(view), host.order_saves(view)
    host.work(now, **failure)
    host.work(next_step)
    assert host.hit(view) == 0, "the next step had been ordered already, and may have read what was computed"
    assert list(host.side._tmp.iterdir()) == []
    host.work(host.order_saves(view))
    assert host.hit(view) == 64


def test_two_requests_may_save_one_block_in_one_step(host):
    views = [host.add("one"), host.add("two")]
    scheduled = [ScheduledRequest("one", 0, 64, (TABLE,)), ScheduledRequest("two", 0, 64, ([1, 2, 5, 6],))]
    host.work(host.side.build_connector_meta(StepView(scheduled)))
    assert [host.hit(view) for view in views] == [64, 64]
    assert list(host.side._tmp.iterdir()) == []


@pytest.fixture
def adapter(tmp_path_factory, monkeypatch):
    """Weights of an adapter that is older than the engine."""
    folder = tmp_path_factory.mktemp("adapter")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    (folder / "adapter.safetensors").write_bytes(bytes(100))
    return folder / "adapter.safetensors"


def test_adapters_media_and_embeddings_separate(adapter, host):
    weights = adapter
    lora = SimpleNamespace(lora_path=str(adapter.parent))
    host.work(host.order_saves(host.add("one", lora_request=lora)))
    assert host.hit(host.add("two")) == 0
    assert host.hit(host.add("three", lora_request=lora)) == 64
    picture = SimpleNamespace(identifier="p", mm_position=SimpleNamespace(offset=20, length=4))
    assert host.hit(host.add("five", lora_request=lora, mm_features=[picture])) == 16, "the block before it"
    assert host.hit(host.add("salted", lora_request=lora, cache_salt="s")) == 0
    assert host.hit(host.add("six", prompt_embeds=object())) == 0
    weights.write_bytes(bytes(99) + b"x")
    assert host.hit(host.add("four", lora_request=lora)) == 0, "another content under the same path"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kv_that_is_not_finite_is_not_stored(host, value):
    good = host.pools[1]["b"].clone()
    block(host.pools[1], "b", TABLE[2])[1, 1, 7, 7] = value
    view = host.add("one")
    host.work(host.order_saves(view))
    assert host.hit(view) == 32, "the blocks before it"
    host.pools[1]["b"].copy_(good)
    host.work(host.order_saves(view))
    assert host.hit(view) == 64


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_8_bit_kv_is_stored(tmp_path, dtype):
    """torch.isfinite raises for some of these types."""
    host = Host(tmp_path, dtype)
    view = host.add("one")
    host.work(host.order_saves(view))
    assert host.hit(view) == 64


def test_never_a_negative_claim(host):
    view = host.add("one")
    host.work(host.order_saves(view))
    assert [host.side.get_num_new_matched_tokens(view, n)[0] for n in (0, 48, 64, 69)] == [64, 16, 0, 0]
    assert host.hit(host.add("two", skip_reading_prefix_cache=True)) == 0


def test_seeded_requests_are_no_hits_where_a_second_draw_is_another(host):
    first = host.add("a")
    host.work(host.order_saves(first))
    drawn = SimpleNamespace(temperature=1.0, seed=3)
    assert host.side.get_num_new_matched_tokens(host.add("b", sampling_params=drawn), 0) == (0, False)
    greedy = SimpleNamespace(temperature=0.0, seed=3)
    assert host.side.get_num_new_matched_tokens(host.add("c", sampling_params=greedy), 0) == (64, False)
