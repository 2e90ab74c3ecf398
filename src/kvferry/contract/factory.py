"""From a configuration to a connector class: external module path first, then the registry."""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any, ClassVar

from kvferry.config import KVTransferConfig
from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole, supports_hma
from kvferry.contract.kv_cache import KVCacheConfig
from kvferry.errors import (
    ConfigError,
    ConnectorAttributeNotFound,
    ConnectorModuleNotFound,
    ConnectorNotFound,
    did_you_mean,
)

logger = logging.getLogger(__name__)


class KVConnectorFactory:
    """Resolves connector classes and builds connectors. Built-ins register by module string and import lazily."""

    _registry: ClassVar[dict[str, tuple[str, str]]] = {}

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Make `module_path:class_name` known as `name`; nothing is imported. A taken name is a ConfigError."""
        if name in cls._registry:
            raise ConfigError(f"connector name {name!r} is already registered as {':'.join(cls._registry[name])}")
        cls._registry[name] = (module_path, class_name)

    @classmethod
    def get_connector_class_by_name(cls, connector_name: str) -> type[KVConnectorBase_V1]:
        """The registered class of that name; ConnectorNotFound lists the known names."""
        if connector_name not in cls._registry:
            raise ConnectorNotFound(
                f"kv_connector={connector_name!r} is not registered{did_you_mean(connector_name, cls._registry)}; "
                "for a connector of your own set kv_connector_module_path"
            )
        return _load(*cls._registry[connector_name])

    @classmethod
    def get_connector_class(cls, kv_transfer_config: KVTransferConfig) -> type[KVConnectorBase_V1]:
        """The class a configuration means. A module path wins over the registry and never falls back to it."""
        name = kv_transfer_config.kv_connector
        path = kv_transfer_config.kv_connector_module_path
        if name is None:
            raise ConnectorNotFound("kv_connector is not set: name a connector class")
        if path is None:
            return cls.get_connector_class_by_name(name)
        if not path:
            raise ConnectorNotFound("kv_connector_module_path is empty: give a module, or leave the key out")
        return _load(path, name)

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """True when the configured connector supports hybrid KV caches; decided on the resolved class."""
        return supports_hma(cls.get_connector_class(kv_transfer_config))

    @classmethod
    def create_connector(cls, config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> KVConnectorBase_V1:
        """Build the connector that `config.kv_transfer_config` names, for one role.

        Raises ConfigError when no connector or no kv_cache_config is given, or when the cache has several groups
        and the connector does not support them.
        """
        transfer = config.kv_transfer_config
        if transfer is None:
            raise ConfigError("kv_transfer_config is not set: there is no connector to create")
        if kv_cache_config is None:
            raise ConfigError("kv_cache_config is None: pass the engine's KVCacheConfig")
        connector_class = cls.get_connector_class(transfer)
        if len(kv_cache_config.kv_cache_groups) > 1 and not supports_hma(connector_class):
            raise ConfigError(
                f"{connector_class.__name__} does not support hybrid KV caches, but the model has "
                f"{len(kv_cache_config.kv_cache_groups)} KV cache groups: set disable_hybrid_kv_cache_manager"
            )
        logger.info("creating %s (%s) for engine %s", connector_class.__name__, role.name, transfer.engine_id)
        return connector_class(config, role, kv_cache_config)


def _load(module_path: str, class_name: str) -> type[KVConnectorBase_V1]:
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as err:
        if err.name is not None and (module_path == err.name or module_path.startswith(err.name + ".")):
            raise ConnectorModuleNotFound(
                f"kv_connector_module_path={module_path!r}: there is no module {err.name!r}; "
                "install the package it is in, or correct the path"
            ) from err
        raise ConnectorNotFound(f"importing {module_path!r} failed: it needs the module {err.name!r}") from err
    connector_class = getattr(module, class_name, None)
    if connector_class is None:
        candidates = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ConnectorAttributeNotFound(
            f"module {module_path!r} has no class {class_name!r}{did_you_mean(class_name, candidates)}"
        )
    return _checked(connector_class, module_path, class_name)


def _checked(connector_class: Any, module_path: str, class_name: str) -> type[KVConnectorBase_V1]:
    where = f"{module_path}:{class_name}"
    if not (isinstance(connector_class, type) and issubclass(connector_class, KVConnectorBase_V1)):
        raise ConnectorNotFound(f"{where} is not a KV connector: it must subclass kvferry.KVConnectorBase_V1")
    if inspect.isabstract(connector_class):
        missing = ", ".join(sorted(connector_class.__abstractmethods__))
        raise ConnectorNotFound(f"{where} does not implement: {missing}")
    try:
        inspect.signature(connector_class).bind("vllm_config", "role", kv_cache_config="kv_cache_config")
    except TypeError as err:
        raise ConnectorNotFound(
            f"{where} must be constructible as (vllm_config, role, kv_cache_config): {err}"
        ) from None
    return connector_class


KVConnectorFactory.register_connector("OffloadingConnector", "kvferry.connectors.offloading", "OffloadingConnector")
KVConnectorFactory.register_connector(
    "LoadRecoveryExampleConnector", "kvferry.connectors.load_recovery", "LoadRecoveryExampleConnector"
)
