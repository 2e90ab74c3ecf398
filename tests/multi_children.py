"""A MultiConnector in both roles over scripted children that keep their calls and answer as a test says."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from kvferry.clock import FakeClock
from kvferry.config import KVTransferConfig
from kvferry.contract import (
    FullAttentionSpec,
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
    make_kv_cache_config,
)
from kvferry.contract.hooks import HOOKS, HookSide
from kvferry.errors import ConfigError
from kvferry.multi.connector import MultiConnector

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


NO = (0, False)
LOOKING = (None, False)


def finish(pair: Pair, *delays: bool, name: str = "r") -> Any:
    for connector, delay in zip(pair.s, delays, strict=True):
        connector.answers["request_finished_all_groups"] = (delay, None)
    return pair.scheduler.request_finished(request(name), [1, 2])


def start_load(pair: Pair, owner: int, *, is_async: bool = True, name: str = "r") -> None:
    pair.claims(*((8, is_async) if i == owner else NO for i in range(len(pair.s))))
    pair.match(request(name), BLOCK)
    pair.scheduler.update_state_after_alloc(request(name), blocks(10, 11, 12, 13), 8)
