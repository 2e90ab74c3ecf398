"""Settings of the MultiConnector, and the configurations of its children that follow from them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from kvferry.config import KVTransferConfig, parse_settings
from kvferry.contract.base import KVConnectorBase_V1
from kvferry.contract.class_hooks import ask_class
from kvferry.contract.factory import KVConnectorFactory
from kvferry.errors import ConfigError, ConnectorNotFound, did_you_mean

_EXTRA_CONFIG = "kv_connector_extra_config"
_OWN_FIELDS = ("kv_connector", "kv_connector_module_path", _EXTRA_CONFIG)


class LoadPolicy(Enum):
    """Which child's claim is taken; the order of children breaks ties."""

    FIRST = "first"  # of the first child that has any
    LONGEST = "longest"  # of the child that has most tokens


@dataclass(frozen=True)
class MultiConfig:
    """Settings in `kv_connector_extra_config`; the error for an unknown key names the nearest known key."""

    connectors: tuple[Mapping[str, Any], ...]
    """KVTransferConfigs of the children, by priority; a child inherits the fields that it does not set."""
    load_policy: str = "first"
    """Child that loads: "first" (the first child that has a hit) or "longest" (the child with the longest hit)."""
    lookup_wait_s: float = field(default=0.5, metadata={"minimum": 0})
    """Longest time, in seconds per request, that a child without an answer yet delays another child's hit."""

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> MultiConfig:
        """Read `kv_connector_extra_config`. Raises ConfigError naming key, value and remedy."""
        config = parse_settings(cls, extra_config, _EXTRA_CONFIG)
        if not config.connectors:
            raise ConfigError(f"{_EXTRA_CONFIG}.connectors is empty: list at least one connector")
        policies = [policy.value for policy in LoadPolicy]
        if config.load_policy not in policies:
            hint = did_you_mean(config.load_policy, policies)
            raise ConfigError(f"{_EXTRA_CONFIG}.load_policy={config.load_policy!r} is not a load policy{hint}")
        return config


class ChildRules:
    """What a MultiConnector's host decides of children. These are kvferry's engine's; vLLM's are in `vllm/multi.py`."""

    transfer_class: type[Any] = KVTransferConfig
    """What a child's settings are read into; a dataclass."""

    def transfer(self, values: Mapping[str, Any]) -> Any:
        """A child's configuration from all its settings, inherited ones included. Raises ConfigError."""
        return self.transfer_class(**values)

    def find_class(self, transfer: Any) -> type[Any]:
        """The child's class. Raises ConnectorNotFound."""
        return KVConnectorFactory.get_connector_class(transfer)

    def supports_hma(self, connector_class: type[Any], transfer: Any) -> bool:
        """True when the child, so configured, supports hybrid KV caches."""
        return bool(ask_class(connector_class, "supports_hma_config", transfer))


@dataclass(frozen=True, slots=True)
class ChildConfig:
    """One child as configured."""

    label: str
    """Class name, with `#2`, `#3` ... for repeats: unique among its siblings."""
    where: str
    """Path of its settings, for errors."""
    connector_class: type[KVConnectorBase_V1]
    transfer: KVTransferConfig
    """Of the host's own class."""
    rules: ChildRules

    @property
    def supports_hma(self) -> bool:
        """True when the child, so configured, supports hybrid KV caches."""
        return self.rules.supports_hma(self.connector_class, self.transfer)

    def host_config(self, vllm_config: Any) -> Any:
        """A copy of the host's configuration in which this child is the connector."""
        params = getattr(vllm_config, "__dataclass_params__", None)
        if params is not None and params.frozen:
            return replace(vllm_config, kv_transfer_config=self.transfer)
        config = copy.copy(vllm_config)  # `replace` would run checks of the host's again
        config.kv_transfer_config = self.transfer
        return config

    def error(self, err: ConfigError) -> ConfigError:
        """The same error, saying which child it is about."""
        return type(err)(f"{self.where} ({self.label}): {err}")


def child_configs(parent: KVTransferConfig, rules: ChildRules) -> list[ChildConfig]:
    """The children of a MultiConnector so configured, in order. ConfigError names what is wrong by its path."""
    children: list[ChildConfig] = []
    seen: Counter[str] = Counter()
    for i, values in enumerate(MultiConfig.parse(parent.kv_connector_extra_config).connectors):
        where = f"{_EXTRA_CONFIG}.connectors[{i}]"
        transfer = _transfer_config(parent, values, where, rules)
        try:
            connector_class = rules.find_class(transfer)
        except ConnectorNotFound as err:
            raise type(err)(f"{where}: {err}") from err
        name = connector_class.__name__
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name}#{seen[name]}"
        children.append(ChildConfig(label, where, connector_class, transfer, rules))
    return children


def _transfer_config(parent: KVTransferConfig, values: Mapping[str, Any], where: str, rules: ChildRules) -> Any:
    known = [f.name for f in fields(rules.transfer_class)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}.{key} is not a known key{did_you_mean(str(key), known)}")
    if not (isinstance(values.get("kv_connector"), str) and values["kv_connector"]):
        raise ConfigError(f"{where}.kv_connector={values.get('kv_connector')!r} must be the name of a connector")
    inherited = {name: getattr(parent, name) for name in known if name not in _OWN_FIELDS and hasattr(parent, name)}
    try:
        return rules.transfer({**inherited, **values})
    except ConfigError as err:
        raise ConfigError(f"{where}.{str(err).removeprefix('kv_transfer_config.')}") from None
