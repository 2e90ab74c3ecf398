"""MultiConnector driven directly, over scripted children: every merge rule, every fault of one child, every count."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.clock import FakeClock
from kvferry.config import KVTransferConfig
from kvferry.contract import (
    CacheHitSource,
    ConnectorStats,
    FullAttentionSpec,
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    LoadFailure,
    MediumStats,
    PrefixRange,
    SupportsHMA,
    make_kv_cache_config,
)
from kvferry.contract.hooks import HOOKS, HookSide
from kvferry.contract.multi import MultiConnector, ResetOutcome
from kvferry.contract.multi_child import MAX_ERRORS
from kvferry.contract.multi_messages import SourcedEvent
from kvferry.errors import ConfigError, ConnectorNotFound, ContractError

BLOCK = 4


@dataclass
class Meta(KVConnectorMetadata):
    name: str


@dataclass
class Shake(KVConnectorHandshakeMetadata):
    name: str


@dataclass
class Report(KVConnectorWorkerMetadata):
    items: list[str]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        assert isinstance(other, Report)
        return Report(self.items + other.items)


DEFAULTS: dict[str, Any] = {
    "get_num_new_matched_tokens": (0, False),
    "request_finished": (False, None),
    "request_finished_all_groups": (False, None),
    "get_loaded_kv_cache_group_ids": (0,),
    "get_block_ids_with_load_errors": set(),
    "get_transfer_results": KVConnectorTransferResults(),
}


def _scripted(name: str) -> Callable[..., Any]:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, args))
        if name == "bind_connector_metadata":
            self._connector_metadata = args[0]
        if name == "clear_connector_metadata":
            self._connector_metadata = None
        default = Meta(self.name) if name == "build_connector_meta" else DEFAULTS.get(name)
        answer = self.answers.get(name, default)
        if isinstance(answer, Exception):
            raise answer
        return answer(*args) if callable(answer) else answer

    return hook


class _Named:
    """Keeps its calls, answers as its test says; `name` in its settings identifies it."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        extra = self._kv_transfer_config.kv_connector_extra_config  # type: ignore[attr-defined]
        self.name: str = extra.get("name", "")
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: dict[str, Any] = {}
        if extra.get("fails_to_start"):
            raise ConfigError("cpu_bytes is missing")

    def called(self, hook: str) -> list[tuple[Any, ...]]:
        return [args for name, args in self.calls if name == hook]


_INSTANCE_HOOKS = {
    hook.name: _scripted(hook.name)
    for hook in HOOKS
    if hook.side is not HookSide.CLASS and not hook.is_property and hook.name != "has_connector_metadata"
}
PLAIN_HOOKS = {name: hook for name, hook in _INSTANCE_HOOKS.items() if name != "request_finished_all_groups"}

Plain = type("Plain", (_Named, KVConnectorBase_V1), {**PLAIN_HOOKS, "__module__": __name__})
Hybrid = type("Hybrid", (_Named, KVConnectorBase_V1, SupportsHMA), {**_INSTANCE_HOOKS, "__module__": __name__})


class WantsNHD(Plain):  # type: ignore[misc, valid-type]
    layout: ClassVar[str] = "NHD"

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str:
        assert vllm_config.kv_transfer_config.kv_connector == cls.__name__
        return cls.layout

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(extra_config.get("piecewise"))


class WantsLBNHC(WantsNHD):
    layout = "LBNHC"


class WantsHND(WantsNHD):
    layout = "HND"


class V2(Hybrid):  # type: ignore[misc, valid-type]
    supports_v2_model_runner = True

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any) -> Any:
        seen: list[Any] = []
        return SimpleNamespace(seen=seen, observe=lambda stats, engine: seen.append((stats, engine)))


def child(name: str = "a", cls: str = "Hybrid", **more: Any) -> dict[str, Any]:
    return {
        "kv_connector": cls,
        "kv_connector_module_path": __name__,
        "kv_connector_extra_config": {"name": name},
        **more,
    }


def nested(*children: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": list(children), **more}}


def transfer(children: Any, **more: Any) -> KVTransferConfig:
    return KVTransferConfig(
        "MultiConnector",
        engine_id="parent",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": children, **more},
    )


def host_config(config: KVTransferConfig, tp: int = 1) -> Any:
    return SimpleNamespace(
        kv_transfer_config=config,
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=1),
    )


def cache_config(num_groups: int = 1) -> Any:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32)
    return make_kv_cache_config(64, [{f"layer{i}": spec} for i in range(num_groups)])


class Pair:
    """Both roles of one MultiConnector with children `a`, `b`, ... and a fake clock."""

    def __init__(self, num: int = 2, *, children: Any = None, groups: int = 1, tp: int = 1, **more: Any) -> None:
        config = host_config(transfer(children or [child(name) for name in "abcdef"[:num]], **more), tp)
        self.clock = FakeClock()
        self.scheduler = MultiConnector(config, KVConnectorRole.SCHEDULER, cache_config(groups), self.clock)
        self.worker = MultiConnector(config, KVConnectorRole.WORKER, cache_config(groups), self.clock)
        self.s: list[Any] = [c.connector for c in self.scheduler.children]
        self.w: list[Any] = [c.connector for c in self.worker.children]

    def claims(self, *answers: Any) -> None:
        for connector, answer in zip(self.s, answers, strict=True):
            connector.answers["get_num_new_matched_tokens"] = answer

    def match(self, req: Any, num_local: int = 0) -> Any:
        return self.scheduler.get_num_new_matched_tokens(req, num_local)

    def step(self) -> KVConnectorOutput:
        """One step as the embedded engine runs it, without layers."""
        worker = self.worker
        meta = self.scheduler.build_connector_meta(object())
        meta = pickle.loads(pickle.dumps(meta))  # hosts send it to other processes
        worker.handle_preemptions(meta)
        worker.bind_connector_metadata(meta)
        worker.start_load_kv(None)
        worker.wait_for_save()
        return self.report()

    def report(self) -> KVConnectorOutput:
        worker = self.worker
        results = worker.get_transfer_results(set())
        output = KVConnectorOutput(results.finished_sending, results.finished_recving, results.failed_recving)
        output.invalid_block_ids = worker.get_block_ids_with_load_errors()
        output.kv_connector_stats = worker.get_kv_connector_stats()
        output.kv_cache_events = worker.get_kv_connector_kv_cache_events()
        output.kv_connector_worker_meta = pickle.loads(pickle.dumps(worker.build_connector_worker_meta()))
        worker.clear_connector_metadata()
        self.scheduler.update_connector_output(output)
        return output


def request(name: str = "r", num_tokens: int = 100) -> Any:
    return SimpleNamespace(request_id=name, num_tokens=num_tokens, kv_transfer_params=None)


def blocks(*ids: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


def results(sent: str = "", received: str = "", failed: str = "") -> KVConnectorTransferResults:
    return KVConnectorTransferResults(set(sent), set(received), set(failed))


# ---- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_every_hook_is_implemented_here(hook: Any) -> None:
    own = [cls for cls in MultiConnector.__mro__ if cls.__module__.startswith("kvferry.contract.multi")]
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
        ({"connectors": "Hybrid"}, r"connectors must be a list of objects"),
        ({"connectors": [child(), 3]}, r"connectors must be a list of objects"),
        ({"connectors": [child()], "conectors": []}, r"conectors is unknown \(did you mean 'connectors'\?\)"),
        ({"connectors": [child()], "load_policy": "longst"}, r"load_policy='longst'.*did you mean 'longest'"),
        ({"connectors": [child()], "load_policy": 1}, r"load_policy must be str"),
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
    assert Pair(children=[child(cls="V2")]).scheduler.supports_v2_model_runner
    assert not Pair(children=[child(cls="V2"), child()]).scheduler.supports_v2_model_runner


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
    manager = SimpleNamespace(block_pool=pool)
    pair.scheduler.bind_kv_cache_manager(manager)
    pair.scheduler.bind_gpu_block_pool(pool)
    pair.worker.register_kv_caches({"layer0": torch.zeros(1)})
    pair.worker.set_host_xfer_buffer_ops(len)
    pair.worker.reset_capture_state()
    for s, w in zip(pair.s, pair.w, strict=True):
        assert s.calls == [("bind_kv_cache_manager", (manager,)), ("bind_gpu_block_pool", (pool,))]
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
    with pytest.raises(ConfigError, match="Hybrid.*Plain"):
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


# ---- which claim is taken -----------------------------------------------------------------------------------------

NO = (0, False)
LOOKING = (None, False)


@pytest.mark.parametrize(
    ("policy", "answers", "answer"),
    [
        ("first", [NO, (8, True), (16, False)], (8, True)),
        ("longest", [(4, True), (8, True), (16, False)], (16, False)),
        ("longest", [(4, True), (16, True), (16, False)], (16, True)),
        ("first", [NO, NO, NO], NO),
        ("first", [LOOKING, NO, NO], LOOKING),
        ("first", [LOOKING, (8, True), NO], LOOKING),
        ("first", [(8, True), LOOKING, LOOKING], (8, True)),
        ("longest", [(8, True), LOOKING, NO], LOOKING),
        # answers that break the contract are none
        ("first", [(-5, False), (8, True), NO], (8, True)),
        ("first", [(0, True), (8, True), NO], (8, True)),
        ("first", [(101, True), (8, True), NO], (8, True)),
        ("first", [(100, False), (8, True), NO], (8, True)),
        ("longest", [(1000, True), (8, True), NO], (8, True)),
        ("first", ["8", (8, True), NO], (8, True)),
        ("first", [(8.0, True), None, NO], NO),
        ("first", [RuntimeError("boom"), (8, True), NO], (8, True)),
    ],
)
def test_load_policy(policy: str, answers: Any, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(3, load_policy=policy)
    pair.claims(*answers)
    assert pair.match(request()) == answer
    assert all(connector.called("get_num_new_matched_tokens") for connector in pair.s), "all are asked"


def test_a_bad_claim_is_logged_with_the_childs_label_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(children=[child("a"), child("b")])
    pair.claims(NO, (-5, False))
    assert pair.match(request()) == NO
    assert "Hybrid#2" in caplog.text
    assert "must not be negative" in caplog.text
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children["Hybrid#2"].fallbacks == {"answer broke the contract": 1}


@pytest.mark.parametrize("policy", ["first", "longest"])
def test_looking_delays_anothers_hit_by_the_deadline_at_most(policy: str) -> None:
    pair = Pair(load_policy=policy, lookup_wait_s=2)
    pair.claims(LOOKING, NO)
    assert pair.match(request()) == LOOKING
    pair.clock.advance(10)
    assert pair.match(request()) == LOOKING, "with no hit at hand nothing is lost by waiting"
    pair.claims(LOOKING, (8, True))
    assert pair.match(request()) == LOOKING
    pair.clock.advance(1.9)
    assert pair.match(request()) == LOOKING
    assert pair.match(request("other")) == LOOKING
    pair.clock.advance(0.1)
    assert pair.match(request()) == (8, True)
    assert pair.match(request("other")) == LOOKING, "each request has its own time"
    pair.claims((4, True), (8, True))
    assert pair.match(request("other")) == ((4, True) if policy == "first" else (8, True))


def test_the_deadline_starts_anew_after_an_admission() -> None:
    pair = Pair(lookup_wait_s=2)
    pair.claims(LOOKING, (8, True))
    pair.match(request())
    pair.clock.advance(2)
    assert pair.match(request()) == (8, True)
    pair.scheduler.update_state_after_alloc(request(), blocks(1, 2), 8)
    assert pair.match(request()) == LOOKING
    pair.clock.advance(2)
    assert pair.match(request()) == (8, True)


# ---- the load owner -----------------------------------------------------------------------------------------------


def test_the_owner_gets_the_tokens_and_speaks_for_the_load() -> None:
    pair = Pair(3)
    pair.claims(NO, (8, True), (16, True))
    pair.s[1].answers |= {
        "get_loaded_kv_cache_group_ids": (7,),
        "get_external_cache_hit_sources": {CacheHitSource.DISK: 8},
    }
    req, allocated = request(), blocks(1, 2)
    assert pair.match(req) == (8, True)
    assert pair.scheduler.get_loaded_kv_cache_group_ids(req) == (7,)
    pair.scheduler.update_state_after_alloc(req, allocated, 8)
    assert [c.called("update_state_after_alloc")[0][1:] for c in pair.s] == [
        (allocated, 0), (allocated, 8), (allocated, 0)
    ]  # fmt: skip
    assert pair.scheduler.get_external_cache_hit_sources(req, 8) == {CacheHitSource.DISK: 8}
    pair.s[1].answers["get_external_cache_hit_sources"] = {CacheHitSource.DISK: 9}
    assert pair.scheduler.get_external_cache_hit_sources(req, 8) == {CacheHitSource.EXTERNAL_UNSPECIFIED: 8}
    pair.scheduler.update_state_after_alloc(req, allocated, 0)
    assert [c.called("update_state_after_alloc")[1][2] for c in pair.s] == [0, 0, 0]


def test_a_later_miss_or_the_end_clears_the_owner() -> None:
    pair = Pair()
    for clear in (
        lambda: (pair.claims(NO, NO), pair.match(request())),
        lambda: pair.scheduler.request_finished(request(), [1]),
    ):
        pair.claims(NO, (8, True))
        pair.match(request())
        clear()
        assert pair.scheduler.get_loaded_kv_cache_group_ids(request()) == (0,)
        with pytest.raises(ContractError, match="no child claims"):
            pair.scheduler.update_state_after_alloc(request(), blocks(1), 4)
        assert len(pair.scheduler._claims) == 0


def test_the_owners_exception_reaches_the_host_after_all_were_told() -> None:
    pair = Pair(3)
    pair.claims((8, True), NO, NO)
    pair.match(request())
    for connector in pair.s:
        connector.answers["update_state_after_alloc"] = RuntimeError(connector.name)
    with pytest.raises(RuntimeError, match=r"^a$"):
        pair.scheduler.update_state_after_alloc(request(), blocks(1, 2), 8)
    assert all(connector.called("update_state_after_alloc") for connector in pair.s)
    pair.s[0].answers.clear()
    pair.claims((8, True), NO, NO)
    pair.match(request())
    pair.scheduler.update_state_after_alloc(request(), blocks(1, 2), 8)  # others' faults stay here


# ---- completions --------------------------------------------------------------------------------------------------


def finish(pair: Pair, *delays: bool, name: str = "r") -> Any:
    for connector, delay in zip(pair.s, delays, strict=True):
        connector.answers["request_finished_all_groups"] = (delay, None)
    return pair.scheduler.request_finished(request(name), [1, 2])


def test_one_saver_of_two() -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request())
    assert finish(pair, True, False) == (True, None)
    pair.w[1].answers["get_transfer_results"] = results(sent="r")
    assert pair.step().finished_sending == set(), "the other child promised nothing"
    pair.w[0].answers["get_transfer_results"] = results(sent="r")
    assert pair.step().finished_sending == {"r"}
    assert pair.step().finished_sending == set(), "once"


@given(data=st.data(), num=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_k_savers_are_counted_exactly(data: st.DataObject, num: int) -> None:
    """Reports in any order, early or late, repeated, also of children that promised nothing: one completion."""
    pair = Pair(num)
    promised = data.draw(st.sets(st.integers(0, num - 1)))
    needed = [(data.draw(st.integers(0, 6)), index) for index in sorted(promised)]
    noise = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, num - 1)), max_size=8))
    finish_step = data.draw(st.integers(0, 4))
    reports = {*needed, *noise}
    pair.scheduler.on_new_request(request())
    forwarded: list[int] = []
    for step in range(10):
        if step == finish_step:
            assert finish(pair, *(i in promised for i in range(num)))[0] is bool(promised)
        for i, connector in enumerate(pair.w):
            connector.answers["get_transfer_results"] = results(sent="r" if (step, i) in reports else "")
        output = pair.step()
        forwarded += [step] * len(output.finished_sending or ())
    first = [min(step for step, index in reports if index == i) for i in promised]
    assert forwarded == ([max(*first, finish_step, 0)] if promised else [])


def test_partial_tails_count_with_the_other_promises() -> None:
    pair = Pair(3)
    pair.scheduler.on_new_request(request())
    for connector in pair.s[:2]:
        connector.answers["register_finished_partial_tail"] = True
    assert pair.scheduler.register_finished_partial_tail(request(), None, None) is True
    assert finish(pair, True, False, True) == (True, None)
    forwarded = []
    for index in (0, 2, 1):
        pair.w[index].answers["get_transfer_results"] = results(sent="r")
        forwarded.append(pair.step().finished_sending)
    assert forwarded == [set(), set(), {"r"}]


def test_a_reused_id_is_counted_anew() -> None:
    pair = Pair()
    for _ in range(2):
        pair.scheduler.on_new_request(request())
        pair.step()
        finish(pair, True, True)
        pair.step()
        pair.w[0].answers["get_transfer_results"] = results(sent="r")
        assert pair.step().finished_sending == set()
        pair.w[1].answers["get_transfer_results"] = results(sent="r")
        assert pair.step().finished_sending == {"r"}
        assert pair.step().finished_sending == set()
        for connector in pair.w:
            connector.answers.clear()
        pair.step()


def start_load(pair: Pair, owner: int, *, is_async: bool = True, name: str = "r") -> None:
    pair.claims(*((8, is_async) if i == owner else NO for i in range(len(pair.s))))
    pair.match(request(name), BLOCK)
    pair.scheduler.update_state_after_alloc(request(name), blocks(10, 11, 12, 13), 8)


def test_a_load_is_forwarded_once_and_only_from_its_owner() -> None:
    pair = Pair()
    start_load(pair, 1)
    pair.w[0].answers["get_transfer_results"] = results(received="rx", failed="r")
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == (set(), set())
    pair.w[1].answers["get_transfer_results"] = results(received="r")
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == ({"r"}, set())
    assert pair.step().finished_recving == set(), "a duplicate"
    start_load(pair, 0)
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == ({"r"}, {"r"}), "another load of that request"


def test_a_failure_told_before_the_end_is_remembered() -> None:
    pair = Pair()
    start_load(pair, 0)
    pair.w[0].answers["get_transfer_results"] = results(failed="r")
    assert pair.step().failed_recving == set()
    pair.w[0].answers["get_transfer_results"] = results(received="r")
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == ({"r"}, {"r"})


def test_failed_blocks_are_joined() -> None:
    pair = Pair()
    failures = [LoadFailure("r", 0, i) for i in range(2)]
    for i, connector in enumerate(pair.w):
        connector.answers["get_transfer_results"] = KVConnectorTransferResults(failed_blocks={failures[i]})
        connector.answers["get_block_ids_with_load_errors"] = {i + 3}
    assert pair.worker.get_transfer_results(set()).failed_blocks == set(failures)
    assert pair.worker.get_transfer_results(set()).failed_blocks == set(failures)
    assert pair.worker.get_block_ids_with_load_errors() == {3, 4}
    assert pair.worker.get_finished({"x"}) == (None, None)
    assert pair.w[1].called("get_transfer_results")[-1] == ({"x"},)


# ---- each child's own view of the reports -------------------------------------------------------------------------


def test_each_child_hears_of_its_own_reports_only() -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request("s"))
    finish(pair, True, True, name="s")
    start_load(pair, 1)
    stats, event = ConnectorStats(held_blocks=3), object()
    pair.w[0].answers |= {
        "get_transfer_results": results(sent="s", received="r"),
        "get_kv_connector_stats": stats,
        "build_connector_worker_meta": Report(["a"]),
        "get_block_ids_with_load_errors": {4},
    }
    pair.w[1].answers |= {
        "get_transfer_results": results(received="r"),
        "get_kv_connector_kv_cache_events": event,
    }
    output = pair.step()
    assert output.finished_sending == set()
    a, b = (connector.called("update_connector_output")[0][0] for connector in pair.s)
    assert (a.finished_sending, a.finished_recving, a.kv_connector_stats) == ({"s"}, set(), stats)
    assert (a.kv_connector_worker_meta, a.kv_cache_events) == (Report(["a"]), None)
    assert (b.finished_sending, b.finished_recving, b.kv_connector_stats) == (set(), {"r"}, None)
    assert b.kv_connector_worker_meta is None
    assert type(b.kv_cache_events) is object
    assert a.invalid_block_ids == b.invalid_block_ids == {4}, "bad blocks concern everyone who may have read them"


def test_worker_reports_of_several_ranks_are_merged_by_child() -> None:
    pair = Pair(tp=2)
    other = MultiConnector(pair.worker._vllm_config, KVConnectorRole.WORKER, cache_config())
    start_load(pair, 0)
    meta = pair.scheduler.build_connector_meta(object())
    rank1: Any = other.children[0].connector
    pair.w[0].answers |= {"build_connector_worker_meta": Report(["rank0"]), "get_transfer_results": results("", "r")}
    rank1.answers |= {
        "build_connector_worker_meta": Report(["rank1"]),
        "get_transfer_results": results("", "r", "r"),
        "get_kv_connector_kv_cache_events": [1, 2],
    }
    seen = []
    for ranks in ([pair.worker], [other]):
        reports = []
        for worker in ranks:
            worker.bind_connector_metadata(meta)
            worker.get_transfer_results(set())
            worker.get_kv_connector_kv_cache_events()
            reports.append(worker.build_connector_worker_meta())
        pair.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=reports[0]))
        seen.append(pair.s[0].called("update_connector_output")[-1][0])
    assert [out.finished_recving for out in seen] == [set(), {"r"}], "complete when both ranks have reported"
    assert [out.failed_recving for out in seen] == [set(), {"r"}]
    pair.worker._events[0], other._events[0] = [[1]], [[2, 3]]
    merged = pair.worker.build_connector_worker_meta().aggregate(other.build_connector_worker_meta())
    pair.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=merged))
    out = pair.s[0].called("update_connector_output")[-1][0]
    assert out.kv_connector_worker_meta == Report(["rank0", "rank1"])
    assert out.kv_cache_events == [1, 2, 3]
    with pytest.raises(ContractError, match="same children"):
        merged.aggregate(Report([]))


def test_statistics_by_child_and_strangers_left_out() -> None:
    pair = Pair(children=[child(), nested(child(), child()), child()])
    assert pair.worker.get_kv_connector_stats() is None
    inner: Any = pair.worker.children[1].connector
    deep, own = ConnectorStats(held_blocks=1), ConnectorStats(held_blocks=2)
    inner.children[1].connector.answers["get_kv_connector_stats"] = deep
    pair.w[0].answers["get_kv_connector_stats"] = own
    pair.w[2].answers["get_kv_connector_stats"] = {"a": 1}
    assert pair.worker.get_kv_connector_stats() == ConnectorStats(
        children={"Hybrid": own, "MultiConnector": ConnectorStats(children={"Hybrid#2": deep})}
    )


@dataclass(frozen=True)
class Stored:
    block: int
    source: str = ""


def test_events_are_joined_with_their_source() -> None:
    pair = Pair(children=[child(), nested(child())])
    inner: Any = pair.scheduler.children[1].connector.children[0].connector
    pair.s[0].answers["take_events"] = lambda: (Stored(i) for i in range(2))
    inner.answers["take_events"] = [Stored(9), "text"]
    assert list(pair.scheduler.take_events()) == [
        Stored(0, "Hybrid"),
        Stored(1, "Hybrid"),
        Stored(9, "MultiConnector/Hybrid"),
        SourcedEvent("MultiConnector/Hybrid", "text"),
    ]
    pair.w[0].answers["get_kv_connector_kv_cache_events"] = lambda: iter([Stored(4)])
    assert pair.worker.get_kv_connector_kv_cache_events() == [Stored(4, "Hybrid")]
    pair.w[0].answers.clear()
    assert pair.worker.get_kv_connector_kv_cache_events() is None


def test_explanations_name_their_child() -> None:
    pair = Pair(children=[child(), nested(child())])
    inner: Any = pair.scheduler.children[1].connector.children[0].connector
    found = PrefixRange(0, 16, "host", "stored")
    pair.s[0].answers["explain_prefix"] = [found]
    inner.answers["explain_prefix"] = [found]
    assert pair.scheduler.explain_prefix(request(), 0) == [
        replace(found, source="Hybrid"),
        replace(found, source="MultiConnector/Hybrid"),
    ]


# ---- ends ---------------------------------------------------------------------------------------------------------


def test_parameters_flat_and_by_child_without_touching_anyones_dict(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(children=[child(), child(cls="Plain"), nested(child())])
    a, b, c = {"host": "h", "port": 1}, {"port": 2, "id": "x"}, {"deep": True}
    inner: Any = pair.scheduler.children[2].connector.children[0].connector
    pair.s[0].answers["request_finished_all_groups"] = (False, a)
    pair.s[1].answers["request_finished"] = (True, b)
    inner.answers["request_finished_all_groups"] = (False, c)
    answer = pair.scheduler.request_finished_all_groups(request(), ([1, 2],))
    assert answer == (
        True,
        {
            "host": "h",
            "id": "x",
            "deep": True,
            "children": {
                "Hybrid": {"host": "h", "port": 1},
                "Plain": {"port": 2, "id": "x"},
                "MultiConnector": {"deep": True, "children": {"Hybrid": {"deep": True}}},
            },
        },
    )
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "port" in warning
    answer[1]["children"]["Hybrid"]["host"] = "other"
    assert (a, b, c) == ({"host": "h", "port": 1}, {"port": 2, "id": "x"}, {"deep": True})
    assert [args[1] for args in pair.s[1].called("request_finished")] == [[1, 2]], "one group: the flat list"


def test_both_forms_of_finishing_are_one() -> None:
    pair = Pair()
    pair.scheduler.request_finished(request("x"), [1])
    pair.scheduler.request_finished_all_groups(request("y"), ([1],))
    assert [args[1] for args in pair.s[0].called("request_finished_all_groups")] == [([1],), ([1],)]


def test_several_groups_reaching_a_child_of_one_are_never_dropped() -> None:
    pair = Pair(children=[child(), child(cls="Plain")])
    with pytest.raises(ContractError, match="Plain supports one KV cache group, the host passed 2"):
        pair.scheduler.request_finished_all_groups(request(), ([1], [2]))
    assert not pair.s[0].called("request_finished_all_groups"), "none is asked: nothing is half done"


@pytest.mark.parametrize("answer", [RuntimeError("boom"), True, (1, None), (True, [])])
def test_a_bad_end_of_one_child_is_no_promise(answer: Any) -> None:
    pair = Pair()
    pair.s[0].answers["request_finished_all_groups"] = answer
    pair.s[1].answers["request_finished_all_groups"] = (False, {"k": 1})
    assert pair.scheduler.request_finished(request(), [1]) == (False, {"k": 1, "children": {"Hybrid#2": {"k": 1}}})


@pytest.mark.parametrize(
    ("answers", "outcomes", "is_done"),
    [
        ((True, True), ("done", "done"), True),
        ((True, None), ("done", "not implemented"), False),
        ((False, True), ("failed", "done"), False),
        ((RuntimeError("x"), True), ("failed", "done"), False),
        ((NotImplementedError(), False), ("not implemented", "failed"), False),
    ],
)
def test_reset_gives_a_receipt_per_child(answers: Any, outcomes: Any, is_done: bool) -> None:
    pair = Pair()
    for connector, answer in zip(pair.s, answers, strict=True):
        connector.answers["reset_cache"] = answer
    assert pair.scheduler.reset_cache() is is_done
    labels = ("Hybrid", "Hybrid#2")
    assert pair.scheduler.last_reset == dict(zip(labels, map(ResetOutcome, outcomes), strict=True))


def test_shutdown_reaches_all_and_raises_the_last_error() -> None:
    pair = Pair(3)
    for connector in pair.w[:2]:
        connector.answers["shutdown"] = RuntimeError(connector.name)
    with pytest.raises(RuntimeError, match=r"^b$"):
        pair.worker.shutdown()
    assert all(connector.called("shutdown") for connector in pair.w)
    pair.scheduler.shutdown()


# ---- a child that breaks ------------------------------------------------------------------------------------------


def test_pending_questions_are_any() -> None:
    pair = Pair()
    pair.s[0].answers |= {"has_pending_push_work": RuntimeError(), "has_pending_block_frees": False}
    assert not pair.scheduler.has_pending_push_work()
    pair.s[1].answers |= {"has_pending_push_work": True, "has_pending_block_frees": True}
    assert pair.scheduler.has_pending_push_work()
    assert pair.scheduler.has_pending_block_frees()


def test_a_step_binds_each_childs_own_orders() -> None:
    pair = Pair()
    assert not pair.worker.has_connector_metadata()
    meta = pair.scheduler.build_connector_meta("output")
    pair.worker.handle_preemptions(meta)
    pair.worker.bind_connector_metadata(meta)
    assert pair.worker.has_connector_metadata()
    pair.worker.start_load_kv("context", num_tokens=3)
    pair.worker.wait_for_layer_load("layer0")
    pair.worker.save_kv_layer("layer0", torch.zeros(1), None, more=1)
    pair.worker.finish_forward()
    pair.worker.wait_for_save()
    pair.worker.clear_connector_metadata()
    assert not pair.worker.has_connector_metadata()
    for connector in pair.w:
        assert [args for name, args in connector.calls if name in ("handle_preemptions", "bind_connector_metadata")] == [
            (Meta(connector.name),)
        ] * 2
        assert [name for name, _ in connector.calls[2:]] == [
            "start_load_kv", "wait_for_layer_load", "save_kv_layer", "finish_forward", "wait_for_save",
            "clear_connector_metadata",
        ]  # fmt: skip
    with pytest.raises(ContractError, match="Meta"):
        pair.worker.bind_connector_metadata(Meta("foreign"))


LOAD_HOOKS = ["handle_preemptions", "bind_connector_metadata", "start_load_kv", "wait_for_layer_load"]
REPORT_HOOKS = ["get_transfer_results", "get_block_ids_with_load_errors"]


def layered_step(pair: Pair) -> Counter[str]:
    """A step in which a host goes on after errors, as the embedded engine does; hooks that raised."""
    raised: Counter[str] = Counter()

    def call(hook: str, *args: Any) -> Any:
        try:
            return getattr(pair.worker, hook)(*args)
        except Exception:
            raised[hook] += 1

    meta = pair.scheduler.build_connector_meta(object())
    for hook, args in [
        ("handle_preemptions", (meta,)),
        ("bind_connector_metadata", (meta,)),
        ("start_load_kv", (None,)),
        *[("wait_for_layer_load", (f"layer{i}",)) for i in range(9)],
        *[("save_kv_layer", (f"layer{i}", torch.zeros(1), None)) for i in range(9)],
        ("wait_for_save", ()),
        ("get_transfer_results", (set(),)),
        ("get_block_ids_with_load_errors", ()),
    ]:
        call(hook, *args)
    output = KVConnectorOutput(kv_connector_worker_meta=call("build_connector_worker_meta"))
    call("clear_connector_metadata")
    pair.scheduler.update_connector_output(output)
    return raised


@pytest.mark.parametrize("hook", LOAD_HOOKS + REPORT_HOOKS)
@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_while_loading_reaches_the_host_and_all_others_are_called(hook: str, is_async: bool) -> None:
    pair = Pair(3)
    start_load(pair, 1, is_async=is_async)
    pair.w[1].answers[hook] = RuntimeError("boom")
    assert layered_step(pair)[hook] == 1
    for connector in (pair.w[0], pair.w[2]):
        assert len(connector.called("wait_for_layer_load")) == len(connector.called("save_kv_layer")) == 9
        assert connector.called(hook)
        (output,) = pair.s[0].called("update_connector_output")[-1]
        assert output.invalid_block_ids == (set() if is_async else {11, 12}), "its blocks were never proved"


@pytest.mark.parametrize("hook", [*LOAD_HOOKS, *REPORT_HOOKS, "save_kv_layer", "wait_for_save"])
def test_an_exception_of_a_child_that_loads_nothing_is_its_own(hook: str) -> None:
    pair = Pair()
    start_load(pair, 0, is_async=False)
    pair.w[1].answers[hook] = RuntimeError("boom")
    assert not layered_step(pair)
    assert len(pair.w[1].called(hook)) == 1, "one layer is enough to know"
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children == {"Hybrid#2": ConnectorStats(fallbacks={"hook raised": 1})}


def test_results_survive_another_childs_exception() -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request("s"))
    finish(pair, True, False, name="s")
    start_load(pair, 1)
    pair.w[0].answers["get_transfer_results"] = results(sent="s")
    pair.w[1].answers["get_transfer_results"] = RuntimeError("boom")
    assert layered_step(pair)["get_transfer_results"] == 1
    pair.w[0].answers.clear()
    pair.w[1].answers.clear()
    assert pair.worker.get_transfer_results(set()).finished_sending == {"s"}


def test_lost_orders_of_a_synchronous_load_are_an_error_in_the_step() -> None:
    pair = Pair()
    start_load(pair, 0, is_async=False)
    pair.s[0].answers["build_connector_meta"] = RuntimeError("boom")
    assert layered_step(pair)["start_load_kv"] == 1
    assert pair.w[1].called("start_load_kv"), "the other child works on"
    assert not pair.w[0].called("bind_connector_metadata")


def test_a_child_that_keeps_raising_on_the_scheduler_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request("s"))
    finish(pair, True, True, name="s")
    pair.s[0].answers["get_num_new_matched_tokens"] = RuntimeError("boom")
    pair.s[1].answers["get_num_new_matched_tokens"] = (8, True)
    for _ in range(MAX_ERRORS + 3):
        assert pair.match(request()) == (8, True)
    assert len(pair.s[0].called("get_num_new_matched_tokens")) == MAX_ERRORS
    assert "Hybrid is switched off" in caplog.text
    pair.s[0].calls.clear()
    for connector in pair.w:
        connector.answers["get_transfer_results"] = results(sent="s")
    assert pair.step().finished_sending == {"s"}, "what it had under way is still reported"
    assert [name for name, _ in pair.s[0].calls] == ["update_connector_output"], "no orders any more"
    worker_hooks = [name for name, _ in pair.w[0].calls]
    assert not {"bind_connector_metadata", "start_load_kv", "wait_for_save"} & set(worker_hooks)
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children["Hybrid"].fallbacks == {"hook raised": MAX_ERRORS, "switched off": 1}


def test_a_child_that_keeps_raising_on_the_worker_claims_nothing_any_more() -> None:
    pair = Pair()
    pair.w[0].answers["wait_for_save"] = RuntimeError("boom")
    for _ in range(MAX_ERRORS):
        pair.step()
    pair.claims((8, True), NO)
    assert pair.match(request()) == NO
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children["Hybrid"].fallbacks == {"hook raised": MAX_ERRORS, "switched off": 1}


@pytest.mark.parametrize("is_async", [True, False])
def test_a_load_planned_while_its_child_was_switched_off_fails_at_once(is_async: bool) -> None:
    pair = Pair()
    start_load(pair, 0, is_async=is_async)
    pair.worker.children[0].switch_off("test")
    if is_async:
        output = pair.step()
        assert (output.finished_recving, output.failed_recving) == ({"r"}, {"r"})
    else:
        assert layered_step(pair)["start_load_kv"] == 1
    assert not pair.w[0].called("start_load_kv")


def test_a_switched_off_child_never_holds_up_the_others_reports() -> None:
    pair = Pair()
    start_load(pair, 0)
    pair.w[0].answers["get_transfer_results"] = RuntimeError("boom")
    raised = sum((layered_step(pair) for _ in range(MAX_ERRORS + 2)), Counter())
    assert raised == {"get_transfer_results": MAX_ERRORS - 1}
    pair.scheduler.on_new_request(request("s"))
    finish(pair, False, True, name="s")
    pair.w[1].answers["get_transfer_results"] = results(sent="s")
    assert pair.step().finished_sending == {"s"}


def test_nested_pairs_count_completions_through_both_levels() -> None:
    pair = Pair(children=[child(), nested(child(), child())])
    inner_s: Any = [c.connector for c in pair.scheduler.children[1].connector.children]
    inner_w: Any = [c.connector for c in pair.worker.children[1].connector.children]
    pair.scheduler.on_new_request(request())
    for connector in (pair.s[0], *inner_s):
        connector.answers["request_finished_all_groups"] = (True, None)
    assert pair.scheduler.request_finished(request(), [1]) == (True, None)
    forwarded = []
    for connector in (inner_w[1], pair.w[0], inner_w[0]):
        connector.answers["get_transfer_results"] = results(sent="r")
        forwarded.append(pair.step().finished_sending)
    assert forwarded == [set(), set(), {"r"}]
    assert [c.called("update_connector_output")[-1][0].finished_sending for c in inner_s] == [{"r"}, set()]
