"""LMCacheMPConnector, built in: KV in an LMCache multi-process server, without the lmcache package."""

from __future__ import annotations

import logging

from kvferry.config import KVTransferConfig
from kvferry.connectors.lmcache_mp.scheduler import LMCacheSchedulerSide
from kvferry.connectors.lmcache_mp.worker import LMCacheWorkerSide
from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole
from kvferry.contract.facade import facade_mixin
from kvferry.errors import ConfigError
from kvferry.lmcache.config import EXTRA_CONFIG, UPSTREAM_VARIABLE, implementation_asked_for

logger = logging.getLogger(__name__)


class LMCacheMPConnectorUpstream(
    facade_mixin(LMCacheSchedulerSide, LMCacheWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
):
    """Keeps KV in an LMCache server, for all engines on its machine; settings: `kvferry.lmcache.config.LMCacheConfig`.

    It knows one KV cache group, so it is not `SupportsHMA`.
    """

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """False; the configuration is checked by the way. ConfigError when it asks for LMCache's own class."""
        if kv_transfer_config.is_kv_transfer_instance:
            _check_implementation(kv_transfer_config)
        return False


LMCacheMPConnector = LMCacheMPConnectorUpstream


def _check_implementation(transfer: KVTransferConfig) -> None:
    asked, setting = implementation_asked_for(transfer.kv_connector_extra_config)
    if asked == "package":
        raise ConfigError(
            f"{EXTRA_CONFIG}.implementation='package': the class of the lmcache package runs in vLLM only; "
            "the embedded engine has the built-in one: use 'auto' or 'builtin'"
        )
    if UPSTREAM_VARIABLE in setting and transfer.kv_connector_module_path is not None:
        path = transfer.kv_connector_module_path
        logger.warning("%s is set, and so is kv_connector_module_path=%r, which wins", UPSTREAM_VARIABLE, path)
    logger.info("LMCacheMPConnector: kvferry's built-in one (%s)", setting)


__all__ = ["LMCacheMPConnector", "LMCacheMPConnectorUpstream", "LMCacheSchedulerSide", "LMCacheWorkerSide"]
