"""`KVConnectorFactory`, with the names that callers of vLLM's factory know. What they mean `resolver` decides."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from kvferry.config import KVTransferConfig
from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole, supports_hma
from kvferry.contract.kv_cache import KVCacheConfig
from kvferry.contract.resolver import BUILT_INS, ConnectorResolver, KnownConnector, ResolvedConnector
from kvferry.errors import ConfigError

logger = logging.getLogger(__name__)


class KVConnectorFactory:
    """Resolves connector classes and builds connectors. Built-ins register by module string and import lazily."""

    _resolver: ClassVar[ConnectorResolver] = ConnectorResolver(BUILT_INS)

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Make `module_path:class_name` known as `name`; nothing is imported. A taken name is a ConfigError."""
        cls._resolver.register(name, module_path, class_name)

    @classmethod
    def get_connector_class_by_name(cls, connector_name: str) -> type[KVConnectorBase_V1]:
        """The registered class of that name, or an entry point's; ConnectorNotFound lists the known names."""
        return cls._resolver.find_class_by_name(connector_name)

    @classmethod
    def get_connector_class(cls, kv_transfer_config: KVTransferConfig) -> type[KVConnectorBase_V1]:
        """The class a configuration means. A module path wins over the registry and never falls back to it.

        Raises ConnectorNotFound when no connector is configured, or when there is no usable class.
        """
        return cls._resolver.find_class(kv_transfer_config)

    @classmethod
    def resolve(cls, kv_transfer_config: KVTransferConfig) -> ResolvedConnector:
        """The class a configuration means, where it came from and what it can do. Raises as `get_connector_class`."""
        return cls._resolver.resolve(kv_transfer_config)

    @classmethod
    def known_connectors(cls) -> list[KnownConnector]:
        """Every connector that may be named: built-in, registered, entry point; with what keeps it from being used."""
        return cls._resolver.known()

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """True when no connector stands in the way of hybrid KV caches: the resolved class decides; none never does."""
        if not kv_transfer_config.is_kv_transfer_instance:
            return True
        return bool(cls.resolve(kv_transfer_config).capabilities.supports_hma)

    @classmethod
    def create_connector(cls, config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> KVConnectorBase_V1:
        """Build the connector that `config.kv_transfer_config` names, for one role.

        Raises ConfigError when no connector is configured (hosts ask `is_kv_transfer_instance` first, for both roles),
        when there is no kv_cache_config, or when the cache has several groups and the connector, as configured, does
        not support them; then no connector is left running.
        """
        transfer = config.kv_transfer_config
        if transfer is None or not transfer.is_kv_transfer_instance:
            raise ConfigError(
                f"kv_transfer_config names no connector, so there is none to create for the {role.name}: set "
                "kv_connector and kv_role, or create connectors only when is_kv_transfer_instance is true"
            )
        if kv_cache_config is None:
            raise ConfigError("kv_cache_config is None: pass the engine's KVCacheConfig")
        resolved = cls.resolve(transfer)
        connector_class, num_groups = resolved.connector_class, len(kv_cache_config.kv_cache_groups)
        is_refused = num_groups > 1 and not resolved.capabilities.supports_hma
        if is_refused and not supports_hma(connector_class):
            raise _no_hma(resolved, num_groups)
        origin = f"{resolved.origin.value}, {resolved.file}"
        logger.info("creating %s (%s) for engine %s: %s", resolved.name, role.name, transfer.engine_id, origin)
        connector = connector_class(config, role, kv_cache_config=kv_cache_config)
        if is_refused:  # a composite knows which part is to blame and should have said so
            connector.shutdown()
            raise _no_hma(resolved, num_groups)
        return connector


def _no_hma(resolved: ResolvedConnector, num_groups: int) -> ConfigError:
    return ConfigError(
        f"{resolved.name}, as configured, does not support hybrid KV caches, but the model has {num_groups} KV cache "
        "groups: set disable_hybrid_kv_cache_manager, or use a connector that supports them"
    )
