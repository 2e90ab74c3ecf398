"""The KV connector contract: what engines call and connectors answer."""

from kvferry.contract.base import (
    CONNECTOR_API,
    CacheHitSource,
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    LoadFailure,
    SupportsHMA,
    supports_hma,
)
from kvferry.contract.explain import PrefixRange
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
from kvferry.contract.resolver import Origin, ResolvedConnector
from kvferry.contract.stats import ConnectorStats, MediumStats

__all__ = [
    "CONNECTOR_API",
    "ConnectorStats",
    "LoadFailure",
    "MediumStats",
    "PrefixRange",
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
    "Origin",
    "ResolvedConnector",
    "SlidingWindowSpec",
    "SupportsHMA",
    "make_kv_cache_config",
    "supports_hma",
]
