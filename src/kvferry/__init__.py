"""kvferry moves KV caches between an LLM inference engine and memory, disks and other engines.

Names load on first use, so that `import kvferry` is quick and brings in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvferry.config import KVTransferConfig
    from kvferry.contract import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        KVConnectorBase_V1,
        KVConnectorFactory,
        KVConnectorMetadata,
        KVConnectorOutput,
        KVConnectorRole,
        SlidingWindowSpec,
        SupportsHMA,
        supports_hma,
    )
    from kvferry.engine import LLM, RequestOutput, SamplingParams
    from kvferry.errors import ConfigError, KVFerryError
    from kvferry.lmcache.connector import LMCacheMPConnectorUpstream

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ConfigError",
    "FullAttentionSpec",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "KVCacheTensor",
    "KVConnectorBase_V1",
    "KVConnectorFactory",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorRole",
    "KVFerryError",
    "KVTransferConfig",
    "LMCacheMPConnectorUpstream",
    "RequestOutput",
    "SamplingParams",
    "SlidingWindowSpec",
    "SupportsHMA",
    "supports_hma",
]

_HOMES = {
    "kvferry.config": {"KVTransferConfig"},
    "kvferry.lmcache.connector": {"LMCacheMPConnectorUpstream"},
    "kvferry.engine": {"LLM", "RequestOutput", "SamplingParams"},
    "kvferry.errors": {"ConfigError", "KVFerryError"},
}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from its home now."""
    if name not in __all__:
        raise AttributeError(f"module 'kvferry' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "kvferry.contract")
    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as err:
        if home != "kvferry.engine" or err.name is None or err.name.partition(".")[0] == "kvferry":
            raise
        hint = importlib.import_module("kvferry.errors").install_hint("engine")
        raise ModuleNotFoundError(
            f"kvferry.{name} needs {err.name}, which is not installed: {hint}", name=err.name
        ) from err
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
