"""What both roles of a MultiConnector share: building its children, and calling all of them."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from kvferry.clock import Clock
from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole
from kvferry.contract.kv_cache import KVCacheConfig
from kvferry.errors import ConfigError
from kvferry.multi.child import Child
from kvferry.multi.config import ChildConfig, ChildRules, MultiConfig, child_configs

logger = logging.getLogger(__name__)


class MultiBase(KVConnectorBase_V1):
    """Builds the children in order. Raises ConfigError for wrong settings, those of children named by their path."""

    child_rules: ClassVar[ChildRules] = ChildRules()

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig, clock: Clock | None = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.settings = MultiConfig.parse(self._kv_transfer_config.kv_connector_extra_config)
        configs = child_configs(self._kv_transfer_config, self.child_rules)
        _check_groups(configs, len(kv_cache_config.kv_cache_groups))
        self.children = _start(configs, vllm_config, role, kv_cache_config)
        """In order of priority."""

    def _tell_all(self, hook: str, *args: Any) -> None:
        """Call a hook of the engine's start: what a child raises there ends the start."""
        for child in self.children:
            getattr(child.connector, hook)(*args)

    def shutdown(self) -> None:
        """Every child is shut down; what they raise is logged, and the last of it raised."""
        errors = [child.tell("shutdown") for child in self.children]
        for error in errors[::-1]:
            if error is not None:
                raise error


def _check_groups(configs: list[ChildConfig], num_groups: int) -> None:
    if num_groups <= 1:
        return
    for config in configs:
        if not config.supports_hma:
            raise ConfigError(
                f"{config.where} ({config.label}) does not support hybrid KV caches, but the model has {num_groups} "
                "KV cache groups: set disable_hybrid_kv_cache_manager, or remove this connector"
            )


def _start(
    configs: list[ChildConfig], vllm_config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig
) -> list[Child]:
    children: list[Child] = []
    try:
        for i, config in enumerate(configs):
            logger.info("MultiConnector: creating %s (%s)", config.label, role.name)
            connector = config.connector_class(config.host_config(vllm_config), role, kv_cache_config)
            children.append(Child(i, config.label, connector))
    except BaseException as err:
        for child in children:
            child.tell("shutdown")
        if isinstance(err, ConfigError):
            raise configs[len(children)].error(err) from err
        raise
    return children
