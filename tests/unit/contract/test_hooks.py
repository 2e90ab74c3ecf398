"""The hook table against the base class, and the facade made from it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.config import KVTransferConfig
from kvferry.contract import (
    CacheHitSource,
    FullAttentionSpec,
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
    make_kv_cache_config,
)
from kvferry.contract.facade import facade_mixin
from kvferry.contract.hooks import HOOKS, HOOKS_BY_NAME, Hook, HookSide
from kvferry.contract.sides import SchedulerSide, WorkerSide
from kvferry.contract.views import RequestView, StepView
from kvferry.errors import ContractError

NO_HOOKS = {"role", "CONNECTOR_API", "supports_v2_model_runner"}  # what an instance is, and what a class declares


def public_names(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")} - NO_HOOKS


def test_every_hook_of_the_base_has_a_row() -> None:
    assert set(HOOKS_BY_NAME) == public_names(KVConnectorBase_V1) | public_names(SupportsHMA)
    assert len(HOOKS_BY_NAME) == len(HOOKS)


def test_rows_agree_with_the_base_on_properties_and_class_hooks() -> None:
    for hook in HOOKS:
        if hook.name == "request_finished_all_groups":
            continue
        static = inspect.getattr_static(KVConnectorBase_V1, hook.name)
        assert isinstance(static, property) == hook.is_property, hook.name
        assert isinstance(static, classmethod) == (hook.side is HookSide.CLASS), hook.name


def test_sides_implement_what_the_table_delegates() -> None:
    for hook in HOOKS:
        if hook.bound_by_facade or hook.side is HookSide.CLASS:
            continue
        if hook.side in (HookSide.SCHEDULER, HookSide.BOTH):
            assert hasattr(SchedulerSide, hook.method), hook.name
        if hook.side in (HookSide.WORKER, HookSide.BOTH):
            assert hasattr(WorkerSide, hook.method), hook.name


class Meta(KVConnectorMetadata):
    pass


class RecordingScheduler(SchedulerSide):
    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self.seen: list[tuple[str, Any]] = []

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        self.seen.append(("match", (request.request_id, num_computed_tokens)))
        return 16, True

    def update_state_after_alloc(self, request: RequestView, block_ids: Any, num_external_tokens: int) -> None:
        self.seen.append(("alloc", (block_ids, num_external_tokens)))

    def build_connector_meta(self, step: StepView) -> Meta:
        self.seen.append(("meta", step))
        return Meta()

    def request_finished(self, request: RequestView, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self.seen.append(("finished", block_ids))
        return False, None


class RecordingWorker(WorkerSide):
    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self.seen: list[Any] = []

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.seen.append(sorted(kv_caches))

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        self.seen.append(metadata)

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        self.seen.append(metadata)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return KVConnectorTransferResults(finished_recving={"r"})


class RecordingConnector(
    facade_mixin(RecordingScheduler, RecordingWorker, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
    SupportsHMA,
):
    pass


def build(role: KVConnectorRole) -> Any:
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig("RecordingConnector", kv_role="kv_both"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, rank=0),
        model_config=SimpleNamespace(model="m", max_model_len=128),
    )
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype=torch.float32)
    return RecordingConnector(config, role, make_kv_cache_config(4, {"layer": spec}))


def test_facade_turns_host_objects_into_views() -> None:
    connector = build(KVConnectorRole.SCHEDULER)
    request = SimpleNamespace(request_id="r", all_token_ids=[1, 2], num_tokens=2)
    assert connector.get_num_new_matched_tokens(request, 0) == (16, True)
    blocks = SimpleNamespace(get_block_ids=lambda: ([3, 4],))
    connector.update_state_after_alloc(request, blocks, 16)
    connector.request_finished(request, [3, 4])
    connector.request_finished_all_groups(request, ([3, 4],))
    side = connector._scheduler_side
    assert side.seen == [
        ("match", ("r", 0)),
        ("alloc", (([3, 4],), 16)),
        ("finished", ([3, 4],)),
        ("finished", ([3, 4],)),
    ]
    assert connector.requires_kv_delivery is False
    assert connector.get_external_cache_hit_sources(request, 16) == {CacheHitSource.EXTERNAL_UNSPECIFIED: 16}


def test_step_view_reads_block_tables_from_the_host() -> None:
    connector = build(KVConnectorRole.SCHEDULER)
    output = SimpleNamespace(
        finished_req_ids={"old"},
        preempted_req_ids=None,
        num_scheduled_tokens={"new": 16, "run": 1},
        scheduled_new_reqs=[SimpleNamespace(req_id="new", num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=["run"], num_computed_tokens=[33]),
        kv_connector_block_state=SimpleNamespace(get_block_ids={"new": ([1],), "run": ([2, 3, 4],)}.__getitem__),
    )
    connector.build_connector_meta(output)
    step = connector._scheduler_side.seen[-1][1]
    assert [(s.request_id, s.num_computed_tokens, s.num_scheduled_tokens, s.block_ids) for s in step.scheduled] == [
        ("new", 0, 16, ([1],)),
        ("run", 33, 1, ([2, 3, 4],)),
    ]
    assert step.finished_req_ids == {"old"}


def test_worker_hooks_get_the_bound_metadata_and_drop_runner_kwargs() -> None:
    connector = build(KVConnectorRole.WORKER)
    meta = Meta()
    connector.bind_connector_metadata(meta)
    connector.start_load_kv(object(), scheduler_output=1, num_tokens=3)
    connector.wait_for_save()
    connector.save_kv_layer("layer", None, None, extra=1)
    assert connector._worker_side.seen == [meta, meta]
    assert connector.get_transfer_results(set()).finished_recving == {"r"}
    assert connector.get_finished(set()) == (None, {"r"})
    connector.clear_connector_metadata()
    assert not connector.has_connector_metadata()


def test_a_hook_of_the_other_role_is_refused() -> None:
    with pytest.raises(ContractError, match=r"RecordingConnector\.wait_for_layer_load is a worker hook"):
        build(KVConnectorRole.SCHEDULER).wait_for_layer_load("layer")


FACADE = facade_mixin(RecordingScheduler, RecordingWorker, None)


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook.name in vars(FACADE)], ids=lambda hook: hook.name)
def test_stack_traces_name_the_hook(hook: Hook) -> None:
    found = vars(FACADE)[hook.name]
    assert (found.fget if hook.is_property else found).__code__.co_name == hook.name
