"""The KV connector contract: what engines call and connectors answer."""

from kvferry.contract.base import (
    CacheHitSource,
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
    supports_hma,
)
from kvferry.contract.factory import KVConnectorFactory
from kvferry.contract.kv_cache import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    KVConnectorOutput,
    SlidingWindowSpec,
    make_kv_cache_config,
)

__all__ = [
    "AttentionSpec",
    "CacheHitSource",
    "FullAttentionSpec",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "KVCacheSpec",
    "KVCacheTensor",
    "KVConnectorBase_V1",
    "KVConnectorFactory",
    "KVConnectorHandshakeMetadata",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorRole",
    "KVConnectorTransferResults",
    "KVConnectorWorkerMetadata",
    "SlidingWindowSpec",
    "SupportsHMA",
    "make_kv_cache_config",
    "supports_hma",
]
