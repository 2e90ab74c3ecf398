"""MultiConnector inside vLLM: kvferry's own, with children that are vLLM connectors of whatever origin.

A child's class is looked up as vLLM does, except that a built-in of kvferry needs no module path: for vLLM's connector
of the same name, give vLLM's module. What a child does not set it takes from the parent, also in vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import ValidationError
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base

from kvferry.contract.class_hooks import ask_class
from kvferry.contract.stats import ConnectorStats
from kvferry.errors import ConfigError, ConnectorNotFound
from kvferry.multi.config import ChildRules, child_configs
from kvferry.multi.connector import MultiConnector
from kvferry.multi.messages import as_events
from kvferry.vllm import CONNECTOR_NAMES
from kvferry.vllm.compat import as_newest
from kvferry.vllm.facade import VllmAnswers
from kvferry.vllm.guarded import GuardedHooks
from kvferry.vllm.stats import FerryStats, MetricsOfAll

_PATH = "kv_connector_module_path"


class VllmChildRules(ChildRules):
    """Children are configured by vLLM's KVTransferConfig and found through vLLM's factory."""

    transfer_class = KVTransferConfig

    def transfer(self, values: Mapping[str, Any]) -> Any:
        """As ConfigError what vLLM finds wrong."""
        if values.get(_PATH) is None and values["kv_connector"] in CONNECTOR_NAMES:
            values = {**values, _PATH: "kvferry.vllm"}
        try:
            return KVTransferConfig(**values)
        except ValidationError as err:
            first = err.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{key}={first['input']!r}: {first['msg']}" if key else first["msg"]) from None

    def find_class(self, transfer: Any) -> type[Any]:
        """The class that vLLM would use; ConnectorNotFound says why there is none."""
        try:
            found: type[Any] = KVConnectorFactory.get_connector_class(transfer)
        except (ValueError, AttributeError, ImportError) as err:
            raise ConnectorNotFound(f"{transfer.kv_connector}: {err}") from err
        if not issubclass(found, vllm_base.KVConnectorBase_V1):
            raise ConnectorNotFound(
                f"{transfer.kv_connector} does not subclass vLLM's KVConnectorBase_V1: it cannot run here"
            )
        return found

    def supports_hma(self, connector_class: type[Any], transfer: Any) -> bool:
        """Composites of ours answer by their children, all others as vLLM judges them."""
        if issubclass(connector_class, MultiConnector):
            return bool(connector_class.supports_hma_config(transfer))
        return bool(KVConnectorFactory.supports_hma_config(transfer))


class _FerryMulti(VllmAnswers, MultiConnector, vllm_base.KVConnectorBase_V1):  # type: ignore[misc]
    child_rules: ClassVar[ChildRules] = VllmChildRules()

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        vllm_base.KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        super().__init__(vllm_config, role, as_newest(kv_cache_config))
        for child in self.children:
            if isinstance(child.connector, VllmAnswers):
                child.connector.has_guard = True

    def take_events(self) -> Iterable[Any]:
        """All children's events as they are: vLLM's have no place for a source."""
        return [event for child in self.children for event in child.ask("take_events", [], reads=as_events)]

    def get_kv_connector_kv_cache_events(self) -> None:
        """Nothing for vLLM, which would only hand it to the scheduler: it goes there with the worker's report."""
        super().get_kv_connector_kv_cache_events()

    def get_kv_connector_stats(self) -> FerryStats | None:
        """Every child's, and on the scheduler side what went wrong in a child's hooks."""
        is_scheduler = self.role is vllm_base.KVConnectorRole.SCHEDULER
        told = {child.label: child.stats(None, with_errors=is_scheduler) for child in self.children}
        errors = ConnectorStats(children={label: stats for label, stats in told.items() if stats is not None})
        if self._guard is not None:
            errors = self._guard.stats(lambda: errors)
        found = (self._stats.changes(errors) if is_scheduler else None) or FerryStats()
        for child in self.children:
            found.add_child(self._stats.name, child.label, child.ask("get_kv_connector_stats", None))
        return None if found.is_empty() else found

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> MetricsOfAll:
        """The rows `kvferry:connector_*`, and what children of other origin have; two of one class share theirs."""
        arguments = metric_types, labelnames, per_engine_labelvalues
        return MetricsOfAll(vllm_config, *arguments, others=_others(cls, vllm_config, arguments, {}))


def _others(multi: type[_FerryMulti], vllm_config: Any, arguments: Any, built: dict[type, Any]) -> dict[str, Any]:
    """By label, the metrics of all children below that are not ours. `built`: by class, as each may exist once."""
    found: dict[str, Any] = {}
    for child in child_configs(vllm_config.kv_transfer_config, multi.child_rules):
        kind, config = child.connector_class, child.host_config(vllm_config)
        if issubclass(kind, _FerryMulti):
            inner = _others(kind, config, arguments, built)
            found |= {f"{child.label}/{label}": metrics for label, metrics in inner.items()}
        elif not issubclass(kind, VllmAnswers):
            if kind not in built:
                built[kind] = ask_class(kind, "build_prom_metrics", config, *arguments)
            found[child.label] = built[kind]
    return {label: metrics for label, metrics in found.items() if metrics is not None}


class FerryMultiConnectorNoHMA(GuardedHooks, _FerryMulti):  # type: ignore[misc]
    """Several connectors as one, without hybrid KV caches: vLLM switches them off."""

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: Any) -> bool:
        """False, whatever the children are."""
        return False


class FerryMultiConnector(GuardedHooks, _FerryMulti, vllm_base.SupportsHMA):  # type: ignore[misc]
    """Several connectors as one; hybrid KV caches are on where all of them support these.

    kvferry's plugin answers vLLM's question by the children. Where it is not loaded, or hybrid KV caches were switched
    on explicitly, a child that does not support them is a ConfigError that names it.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        if not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            for child in child_configs(vllm_config.kv_transfer_config, self.child_rules):
                if not child.supports_hma:
                    raise ConfigError(
                        f"{child.where} ({child.label}) does not support hybrid KV caches, which are on: use "
                        "FerryMultiConnectorNoHMA, or start vLLM with --disable-hybrid-kv-cache-manager, or remove it"
                    )
        super().__init__(vllm_config, role, kv_cache_config)
