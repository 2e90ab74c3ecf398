"""LMCacheMPConnector, built in: KV in an LMCache multi-process server, without the lmcache package."""

from __future__ import annotations

from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole
from kvferry.contract.facade import facade_mixin
from kvferry.lmcache.scheduler_side import LMCacheSchedulerSide
from kvferry.lmcache.worker_side import LMCacheWorkerSide


class LMCacheMPConnectorUpstream(
    facade_mixin(LMCacheSchedulerSide, LMCacheWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
):
    """Keeps KV in an LMCache server, for all engines on its machine; settings: `kvferry.lmcache.config.LMCacheConfig`.

    It knows one KV cache group, so it is not `SupportsHMA`.
    """

    supports_v2_model_runner = True


LMCacheMPConnector = LMCacheMPConnectorUpstream

__all__ = ["LMCacheMPConnector", "LMCacheMPConnectorUpstream", "LMCacheSchedulerSide", "LMCacheWorkerSide"]
