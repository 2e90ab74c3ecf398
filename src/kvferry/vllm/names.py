"""Whose connector vLLM would load for a name, without loading it. Imports vllm only to look a name of its own up."""

from __future__ import annotations

import importlib
from typing import Any

from kvferry.config import KVTransferConfig
from kvferry.contract.resolver import built_in_meant
from kvferry.errors import ConfigError, did_you_mean
from kvferry.vllm import CONNECTOR_NAMES, FERRY_NAMES
from kvferry.vllm.compat import installed_vllm

_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"


def is_vllms_own(transfer: KVTransferConfig) -> bool:
    """True when vLLM looks the name up among its own connectors. ConfigError when vLLM would find no connector."""
    name, path = transfer.kv_connector, transfer.kv_connector_module_path
    if name is None:
        return False
    if transfer.on_shadow != "warn":
        raise ConfigError(f"kv_transfer_config.on_shadow={transfer.on_shadow!r}: vLLM has no such key, leave it out")
    if path is None and ":" in name:
        raise ConfigError(
            f"kv_connector={name!r}: vLLM takes a class name here; give its module as kv_connector_module_path"
        )
    if path is not None or built_in_meant(name, path) is not None:
        return False
    ours = f"for kvferry's own set kv_connector_module_path='kvferry.vllm'{did_you_mean(name, CONNECTOR_NAMES)}"
    if installed_vllm() is not None:
        factory: Any = importlib.import_module(_FACTORY).KVConnectorFactory
        if name not in factory._registry:
            near = did_you_mean(name, [*FERRY_NAMES, *factory._registry])
            raise ConfigError(f"kv_connector={name!r} is not registered with vLLM{near}; {ours}")
    elif name not in CONNECTOR_NAMES:
        raise ConfigError(f"kv_connector={name!r} is no connector of kvferry's; {ours}")
    return True
