"""Entry point `vllm.general_plugins`: makes kvferry's connectors known to vLLM by name, without a module path."""

from __future__ import annotations

import logging
from typing import Any

from kvferry.errors import ConfigError
from kvferry.vllm import FERRY_NAMES

logger = logging.getLogger(__name__)

_ORIGINAL = "_kvferry_get_connector_class"


def register() -> None:
    """Register every `Ferry...` name with vLLM's factory; nothing of a connector is imported before it is used.

    vLLM calls this in each of its processes, maybe repeatedly: a name that is taken stays as it is. Never raises: vLLM
    must start without us, too.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    except Exception as err:  # another vLLM than we know: it must start all the same
        logger.warning("kvferry's connectors are not registered: vLLM's KVConnectorFactory cannot be imported: %s", err)
        return
    for name, own_name in FERRY_NAMES.items():
        try:
            KVConnectorFactory.register_connector(name, "kvferry.vllm", own_name)
        except ValueError:
            logger.debug("vLLM knows a connector %s already", name)
        except Exception as err:  # as above
            logger.warning("kvferry's connector %s is not registered: %s: %s", name, type(err).__name__, err)
    if not hasattr(KVConnectorFactory, _ORIGINAL) and hasattr(KVConnectorFactory, "get_connector_class"):
        _choose_by_configuration(KVConnectorFactory)
        if hasattr(KVConnectorFactory, "supports_hma_config"):
            _ask_children(KVConnectorFactory)


def _choose_by_configuration(factory: Any) -> None:
    """vLLM's factory does not tell a module what it is configured for. The LMCacheMPConnector must know: it is one of
    two classes, of which one supports hybrid KV caches."""
    original = factory.get_connector_class
    setattr(factory, _ORIGINAL, original)

    def get_connector_class(_: Any, kv_transfer_config: Any) -> type[Any]:
        named = kv_transfer_config.kv_connector_module_path, kv_transfer_config.kv_connector
        if named in (("kvferry.vllm", "LMCacheMPConnector"), (None, "FerryLMCacheMPConnector")):
            from kvferry.vllm.lmcache import lmcache_connector

            return lmcache_connector(kv_transfer_config)
        found: type[Any] = original(kv_transfer_config)
        return found

    factory.get_connector_class = classmethod(get_connector_class)


def _ask_children(factory: Any) -> None:
    """vLLM judges a composite by its class alone, or, of the name MultiConnector, by children that it looks up itself
    with what each one sets. Ours answers by its children, as it finds them and with what they inherit, so that vLLM
    switches hybrid KV caches off where one of them does not support them, as it does for its own."""
    original = factory.supports_hma_config

    def supports_hma_config(_: Any, kv_transfer_config: Any) -> bool:
        found = factory.get_connector_class(kv_transfer_config)
        if not found.__module__.startswith("kvferry.vllm") or not hasattr(found, "supports_hma_config"):
            return bool(original(kv_transfer_config))
        try:
            return bool(found.supports_hma_config(kv_transfer_config))
        except ConfigError:
            return True  # its constructor says what is wrong

    factory.supports_hma_config = classmethod(supports_hma_config)
