"""MultiConnector: its settings, its children, what is asked of the class, and the start of an engine."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.multi_children import (
    NO,
    Hybrid,
    Pair,
    Shake,
    cache_config,
    child,
    host_config,
    nested,
    request,
    results,
    start_load,
    transfer,
)

from kvferry.config import KVTransferConfig
from kvferry.contract import (
    ConnectorStats,
    KVConnectorRole,
    MediumStats,
    PrefixRange,
)
from kvferry.contract.hooks import HOOKS
from kvferry.errors import ConfigError, ConnectorNotFound
from kvferry.multi.connector import MultiConnector

# ---- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_every_hook_is_implemented_here(hook: Any) -> None:
    own = [cls for cls in MultiConnector.__mro__ if cls.__module__.startswith("kvferry.multi")]
    assert any(hook.name in vars(cls) for cls in own)


# ---- settings and children ----------------------------------------------------------------------------------------


def test_children_inherit_what_they_do_not_set_and_nobodys_dict_is_changed() -> None:
    dicts = [child("a"), child("b", engine_id="own", kv_role="kv_producer", kv_load_failure_policy="fail")]
    before = [dict(d) for d in dicts]
    pair = Pair(children=dicts)
    a, b = (connector._kv_transfer_config for connector in pair.s)
    assert (a.engine_id, a.kv_role, a.kv_load_failure_policy) == ("parent", "kv_both", "recompute")
    assert (b.engine_id, b.kv_role, b.kv_load_failure_policy) == ("own", "kv_producer", "fail")
    assert a.kv_connector_extra_config == {"name": "a"}
    assert dicts == before
    assert pair.scheduler._vllm_config.kv_transfer_config.kv_connector == "MultiConnector"


def test_labels_are_unique_and_in_order() -> None:
    pair = Pair(children=[child(), child(cls="Plain"), child(), nested(child()), child()])
    labels = [c.label for c in pair.scheduler.children]
    assert labels == ["Hybrid", "Plain", "Hybrid#2", "MultiConnector", "Hybrid#3"]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({}, r"kv_connector_extra_config\.connectors is missing"),
        ({"connectors": []}, r"connectors is empty"),
        ({"connectors": "Hybrid"}, r"connectors=.* must be a list of objects"),
        ({"connectors": [child(), 3]}, r"connectors=.* must be a list of objects"),
        ({"connectors": [child()], "conectors": []}, r"conectors is unknown \(did you mean 'connectors'\?\)"),
        ({"connectors": [child()], "load_policy": "longst"}, r"load_policy='longst'.*did you mean 'longest'"),
        ({"connectors": [child()], "load_policy": 1}, r"load_policy=1 must be text"),
        ({"connectors": [child()], "lookup_wait_s": -1}, r"lookup_wait_s=-1 must be at least 0"),
        ({"connectors": [child(), child(kv_role="both")]}, r"connectors\[1\]\.kv_role='both' is not one of"),
        ({"connectors": [child(kv_rol="x")]}, r"connectors\[0\]\.kv_rol is not a known key \(did you mean 'kv_role'"),
        ({"connectors": [{"kv_role": "kv_both"}]}, r"connectors\[0\]\.kv_connector=None must be the name"),
        ({"connectors": [child(kv_load_failure_policy="x")]}, r"connectors\[0\]\.kv_load_failure_policy='x'"),
        ({"connectors": [child(kv_connector_extra_config=[])]}, r"connectors\[0\]\.kv_connector_extra_config=\[\]"),
        ({"connectors": [child(), nested()]}, r"connectors\[1\] \(MultiConnector\): .*connectors is empty"),
        (
            {"connectors": [child(), child(kv_connector_extra_config={"fails_to_start": True})]},
            r"connectors\[1\] \(Hybrid#2\): cpu_bytes is missing",
        ),
    ],
)
def test_wrong_settings_are_named_by_their_path(extra: Any, text: str) -> None:
    config = KVTransferConfig("MultiConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    with pytest.raises(ConfigError, match=text):
        MultiConnector(host_config(config), KVConnectorRole.WORKER, cache_config())


def test_an_unknown_child_says_which_one() -> None:
    with pytest.raises(ConnectorNotFound, match=r"connectors\[1\]: .*'Ofloading' is not registered"):
        Pair(children=[child(), {"kv_connector": "Ofloading"}])


def test_a_child_that_cannot_start_shuts_the_others_down(monkeypatch: pytest.MonkeyPatch) -> None:
    shut: list[str] = []
    monkeypatch.setattr(Hybrid, "shutdown", lambda self: shut.append(self.name))
    with pytest.raises(ConfigError):
        Pair(children=[child("a"), child("b", kv_connector_extra_config={"fails_to_start": True})])
    assert shut == ["a"]


def test_a_frozen_host_configuration_is_copied_too() -> None:
    @dataclass(frozen=True)
    class Frozen:
        kv_transfer_config: Any

    config = Frozen(transfer([child("a")]))
    multi = MultiConnector(config, KVConnectorRole.SCHEDULER, cache_config())
    inner = multi.children[0].connector
    assert type(inner._vllm_config) is Frozen
    assert inner._vllm_config.kv_transfer_config.kv_connector == "Hybrid"
    assert config.kv_transfer_config.kv_connector == "MultiConnector"


# ---- asked of the class -------------------------------------------------------------------------------------------


def test_hma_is_decided_by_all_children_recursively() -> None:
    assert MultiConnector.supports_hma_config(transfer([child(), nested(child(), child())]))
    assert not MultiConnector.supports_hma_config(transfer([child(), child(cls="Plain")]))
    assert not MultiConnector.supports_hma_config(transfer([child(), nested(child(), nested(child(cls="Plain")))]))


@pytest.mark.parametrize("wrap", [lambda c: c, nested])
def test_several_groups_with_a_child_without_support_are_refused(wrap: Any) -> None:
    with pytest.raises(ConfigError, match=r"connectors\[1\].*disable_hybrid_kv_cache_manager, or remove"):
        Pair(children=[child(), wrap(child(cls="Plain"))], groups=2)
    Pair(children=[child(), wrap(child())], groups=2)
    Pair(children=[child(), wrap(child(cls="Plain"))], groups=1)


def test_layouts_must_agree_by_meaning() -> None:
    def layout(*classes: str) -> str | None:
        return MultiConnector.get_required_kvcache_layout(host_config(transfer([child(cls=name) for name in classes])))

    assert layout("Plain", "Hybrid") is None
    assert layout("Plain", "WantsHND") == "HND"
    assert layout("WantsNHD", "WantsLBNHC") == "NHD"
    with pytest.raises(ConfigError, match="WantsNHD needs KV layout NHD and WantsHND needs KV layout HND"):
        layout("WantsNHD", "WantsHND")


def test_piecewise_when_any_child_needs_it() -> None:
    plain = {**child(cls="WantsNHD"), "kv_connector_extra_config": {}}
    needy = {**child(cls="WantsNHD"), "kv_connector_extra_config": {"piecewise": True}}
    assert not MultiConnector.requires_piecewise_for_cudagraph({"connectors": [plain, child()]})
    assert MultiConnector.requires_piecewise_for_cudagraph({"connectors": [child(), nested(needy)]})


def test_second_model_runner_when_all_children_support_it() -> None:
    both = transfer([child(cls="V2"), nested(child(cls="V2"))])
    assert MultiConnector.supports_v2_model_runner_config(both)
    assert not MultiConnector.supports_v2_model_runner_config(transfer([child(cls="V2"), child()]))


def test_prometheus_metrics_and_statistics_of_a_child_without_them() -> None:
    config = host_config(transfer([child(), child(cls="V2")]))
    metrics = MultiConnector.build_prom_metrics(config, None, [], {})
    assert metrics is not None
    own = ConnectorStats(held_blocks=2)
    metrics.observe(ConnectorStats(children={"Hybrid": ConnectorStats(), "V2": own}), 3)
    assert metrics.children["V2"].seen == [(own, 3)]
    assert MultiConnector.build_prom_metrics(host_config(transfer([child()])), None, [], {}) is None


def test_statistics_are_rebuilt_from_their_dict() -> None:
    stats = ConnectorStats(children={"A": ConnectorStats(media={"host": MediumStats(num_loads=3)}, held_blocks=1)})
    assert MultiConnector.build_kv_connector_stats(asdict(stats)) == stats
    assert MultiConnector.build_kv_connector_stats() is None


# ---- engine start -------------------------------------------------------------------------------------------------


def test_start_hooks_reach_every_child_and_errors_end_the_start() -> None:
    pair = Pair()
    pool = object()
    manager = SimpleNamespace(block_pool=pool, num_groups=1)
    pair.scheduler.bind_kv_cache_manager(manager)
    pair.scheduler.bind_gpu_block_pool(pool)
    pair.worker.register_kv_caches({"layer0": torch.zeros(1)})
    pair.worker.set_host_xfer_buffer_ops(len)
    pair.worker.reset_capture_state()
    for s, w in zip(pair.s, pair.w, strict=True):
        assert [name for name, _ in s.calls] == ["bind_kv_cache_manager", "bind_gpu_block_pool"]
        assert s.calls[0][1][0].num_groups == 1, "a view of the manager"
        names = [name for name, _ in w.calls]
        assert names == ["register_kv_caches", "set_host_xfer_buffer_ops", "reset_capture_state"]
    pair.w[0].answers["register_kv_caches"] = RuntimeError("no room")
    with pytest.raises(RuntimeError, match="no room"):
        pair.worker.register_kv_caches({})


def test_at_most_one_memory_pool() -> None:
    pair = Pair(children=[child(), child(cls="Plain")])
    assert pair.worker.get_mem_pool_context() is None
    context = object()
    pair.w[1].answers["get_mem_pool_context"] = context
    assert pair.worker.get_mem_pool_context() is context
    pair.w[0].answers["get_mem_pool_context"] = object()
    with pytest.raises(ConfigError, match="Hybrid and Plain"):
        pair.worker.get_mem_pool_context()


@pytest.mark.parametrize(("answers", "count"), [((None, None), None), ((4, None), 4), ((None, 4), 4), ((2, 2), 2)])
def test_finished_counts_that_agree(answers: Any, count: Any) -> None:
    pair = Pair(tp=4)
    for connector, answer in zip(pair.s, answers, strict=True):
        connector.answers["get_finished_count"] = answer
    assert pair.scheduler.get_finished_count() == count


@pytest.mark.parametrize("answers", [(1, 2), (2, None), (None, 1)])
def test_finished_counts_that_differ_are_refused(answers: Any) -> None:
    pair = Pair(tp=4, children=[child(), child(cls="Plain")])
    for connector, answer in zip(pair.s, answers, strict=True):
        connector.answers["get_finished_count"] = answer
    with pytest.raises(ConfigError, match=r"Hybrid.*Plain"):
        pair.scheduler.get_finished_count()


def test_each_child_gets_only_its_own_workers_handshakes() -> None:
    pair = Pair(3)
    assert pair.worker.get_handshake_metadata() is None
    for connector in pair.w[1:]:
        connector.answers["get_handshake_metadata"] = Shake(connector.name)
    shake = pickle.loads(pickle.dumps(pair.worker.get_handshake_metadata()))
    pair.scheduler.set_xfer_handshake_metadata({0: shake, 1: shake})
    pair.scheduler.set_xfer_handshake_metadata_pp_aware({(0, 1): shake})
    got = [connector.called("set_xfer_handshake_metadata") for connector in pair.s]
    assert got == [[({},)], [({0: Shake("b"), 1: Shake("b")},)], [({0: Shake("c"), 1: Shake("c")},)]]
    assert pair.s[2].called("set_xfer_handshake_metadata_pp_aware") == [({(0, 1): Shake("c")},)]
    with pytest.raises(ConfigError, match="worker 1 sent a Shake"):
        pair.scheduler.set_xfer_handshake_metadata({1: Shake("x")})


def test_properties() -> None:
    pair = Pair(children=[child(kv_role="kv_consumer"), child(kv_role="kv_consumer")])
    assert not pair.scheduler.requires_kv_delivery
    assert Pair(children=[child(kv_role="kv_consumer"), child()]).scheduler.requires_kv_delivery
    assert not pair.scheduler.supports_divergent_local_hybrid_hits


@pytest.mark.parametrize("has_arrived", [False, True])
def test_children_are_not_shown_blocks_that_another_child_still_loads(has_arrived: bool) -> None:
    """The host passes an aborted request's blocks, but nothing is in them yet."""
    pair = Pair()
    pair.scheduler.on_new_request(request())
    start_load(pair, 0)
    if has_arrived:
        pair.w[0].answers["get_transfer_results"] = results(received="r")
    pair.step()
    pair.scheduler.request_finished_all_groups(request(), ([10, 11, 12, 13],))
    owner, other = (side.called("request_finished_all_groups")[0][1] for side in pair.s)
    assert owner == ([10, 11, 12, 13],)
    assert other == (owner if has_arrived else ([10],))


def test_explanations_say_which_child_loads() -> None:
    pair = Pair()
    for side in pair.s:
        side.answers["explain_prefix"] = [PrefixRange(0, 8, "host", "in host memory")]
    told = pair.scheduler.explain_prefix(request(), 0)
    assert [(found.source, found.is_claimed) for found in told] == [("Hybrid", False), ("Hybrid#2", False)]
    pair.claims(NO, (8, True))
    pair.match(request())
    told = pair.scheduler.explain_prefix(request(), 0)
    assert [(found.source, found.is_claimed) for found in told] == [("Hybrid", False), ("Hybrid#2", True)]
