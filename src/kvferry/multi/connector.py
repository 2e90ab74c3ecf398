"""MultiConnector: several connectors as one. Each hook's method says how the children's answers become one.

    load    one child per request: the first, or the longest, claim (`load_policy`)
    save    every child saves what it wants; blocks stay until each child that promised to report has reported
    errors  a child's exception or bad answer is logged, counted, and costs only that child; five exceptions switch it
            off. Where it is loading, the exception also reaches the host, so that the load counts as failed.

Settings: `config.MultiConfig`. What scheduler and workers tell each other: `messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvferry.config import KVTransferConfig
from kvferry.contract.base import KVConnectorRole, SupportsHMA
from kvferry.contract.class_hooks import ask_class
from kvferry.contract.stats import ConnectorStats, MediumStats
from kvferry.errors import ConfigError
from kvferry.multi.config import child_configs
from kvferry.multi.scheduler_side import MultiSchedulerHooks
from kvferry.multi.worker_side import MultiWorkerHooks

_SAME_LAYOUT = {"HND": "LBHNC", "NHD": "LBNHC"}


class MultiConnector(MultiSchedulerHooks, MultiWorkerHooks, SupportsHMA):
    """Several connectors as one; may be nested. Its configuration decides whether it supports hybrid KV caches.

    Raises ConfigError for wrong settings, and for several KV cache groups with a child that supports only one.
    """

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """By child; the scheduler instance adds what went wrong in a child's hooks, on all sides. None: nothing."""
        is_scheduler = self.role.name == KVConnectorRole.SCHEDULER.name  # hosts have enums of their own
        children = {}
        for child in self.children:
            stats = child.stats(child.ask("get_kv_connector_stats", None), with_errors=is_scheduler)
            if stats is not None:
                children[child.label] = stats
        return ConnectorStats(children=children) if children else None

    # ---- asked of the class, before there is an instance ------------------------------------------------------

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """True when every child supports hybrid KV caches."""
        return all(child.supports_hma for child in child_configs(kv_transfer_config, cls.child_rules))

    @classmethod
    def supports_v2_model_runner_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """True when every child supports the second model runner."""
        children = child_configs(kv_transfer_config, cls.child_rules)
        return all(
            ask_class(child.connector_class, "supports_v2_model_runner_config", child.transfer) for child in children
        )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """The layout that the children insist on; ConfigError when they differ."""
        wanted: dict[str, str] = {}
        for child in child_configs(vllm_config.kv_transfer_config, cls.child_rules):
            layout = ask_class(child.connector_class, "get_required_kvcache_layout", child.host_config(vllm_config))
            if layout is not None:
                wanted[child.label] = layout
        if len({_SAME_LAYOUT.get(layout, layout) for layout in wanted.values()}) > 1:
            demands = " and ".join(f"{label} needs KV layout {layout}" for label, layout in wanted.items())
            raise ConfigError(f"{demands}: an engine has one layout, so they cannot be used together")
        return next(iter(wanted.values()), None)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True when any child requires it."""
        parent = KVTransferConfig(cls.__name__, kv_role="kv_both", kv_connector_extra_config=extra_config)
        return any(
            ask_class(
                child.connector_class, "requires_piecewise_for_cudagraph", child.transfer.kv_connector_extra_config
            )
            for child in child_configs(parent, cls.child_rules)
        )

    @classmethod
    def build_kv_connector_stats(cls, data: Mapping[str, Any] | None = None) -> ConnectorStats | None:
        """A ConnectorStats from its `dataclasses.asdict`; children's statistics are of that one kind."""
        if data is None:
            return None
        values = dict(data)
        values["media"] = {name: MediumStats(**medium) for name, medium in values.get("media", {}).items()}
        children = values.get("children", {})
        values["children"] = {label: cls.build_kv_connector_stats(child) for label, child in children.items()}
        return ConnectorStats(**values)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> MultiPromMetrics | None:
        """Those of the children that have any, or None."""
        metrics: dict[str, Any] = {}
        for child in child_configs(vllm_config.kv_transfer_config, cls.child_rules):
            arguments = child.host_config(vllm_config), metric_types, labelnames, per_engine_labelvalues
            own = ask_class(child.connector_class, "build_prom_metrics", *arguments)
            if own is not None:
                metrics[child.label] = own
        return MultiPromMetrics(metrics) if metrics else None


class MultiPromMetrics:
    """The children's Prometheus metrics by label; statistics of children without metrics are passed over."""

    def __init__(self, children: dict[str, Any]) -> None:
        self.children = children

    def observe(self, stats: ConnectorStats, engine_idx: int = 0) -> None:
        """Hand each child's metrics its own statistics."""
        for label, metrics in self.children.items():
            if label in stats.children:
                metrics.observe(stats.children[label], engine_idx)
