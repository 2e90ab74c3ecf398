"""LMCacheMPConnector, built in: KV in an LMCache multi-process server, without the lmcache package."""

from __future__ import annotations

from kvferry.connectors.lmcache_mp.scheduler import LMCacheSchedulerSide
from kvferry.connectors.lmcache_mp.worker import LMCacheWorkerSide
from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole
from kvferry.contract.facade import facade_mixin


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
