"""KV from engine to engine: prefill here, decode there. One pair of sides under the names that users know."""

from __future__ import annotations

from typing import Any, ClassVar

from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from kvferry.contract.facade import facade_mixin
from kvferry.p2p.scheduler_side import P2PSchedulerSide
from kvferry.p2p.worker_side import P2PWorkerSide


def _facade(**variant: Any) -> Any:
    """The facade over both sides, with these settings by default; a `mode` cannot be set to another."""

    class SchedulerVariant(P2PSchedulerSide):
        pass

    class WorkerVariant(P2PWorkerSide):
        pass

    SchedulerVariant.variant = WorkerVariant.variant = variant
    return facade_mixin(SchedulerVariant, WorkerVariant, KVConnectorRole.SCHEDULER)


class P2PConnector(_facade(), KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Moves KV between two engines, over shared memory where they are on one machine, else over NIXL.

    Settings stand in `kv_connector_extra_config`: see `kvferry.p2p.config.P2PConfig`.
    """

    supports_v2_model_runner: ClassVar[bool] = True


class NixlConnector(_facade(transport="nixl"), KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Moves KV between two engines over NIXL; the decode engine reads, unless `transport` or `mode` says otherwise."""

    supports_v2_model_runner: ClassVar[bool] = True


class NixlPullConnector(_facade(transport="nixl", mode="pull"), KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Moves KV between two engines over NIXL, unless `transport` says otherwise; the decode engine reads."""

    supports_v2_model_runner: ClassVar[bool] = True


class NixlPushConnector(_facade(transport="nixl", mode="push"), KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Moves KV between two engines over NIXL, unless `transport` says otherwise; the prefill engine writes."""

    supports_v2_model_runner: ClassVar[bool] = True


__all__ = ["NixlConnector", "NixlPullConnector", "NixlPushConnector", "P2PConnector"]
