"""kvferry's connectors for real vLLM: name this module as `kv_connector_module_path`.

Every built-in connector of kvferry is here under its name. What differs:

    FerryMultiConnector        MultiConnector for vLLM with hybrid KV caches on: all children must support them
    FerryMultiConnectorNoHMA   the same for children that do not; vLLM then switches hybrid KV caches off
    LMCacheMPConnector         the class of the installed lmcache package, else kvferry's own, as `implementation` in
                               kv_connector_extra_config and LMCACHE_USE_UPSTREAM_MP say (kvferry.vllm.lmcache)
    MultiConnector             FerryMultiConnector; where kvferry's plugin is not loaded, vLLM itself reads the children
                               of a connector of this name: each needs kv_role, and ours a kv_connector_module_path

With kvferry installed, vLLM also knows each by name alone, with "Ferry" in front (`FerryOffloadingConnector`), without
a module path. Classes are made when they are asked for, so that naming one connector imports no other. The only
package of kvferry that imports vllm.
"""

from __future__ import annotations

from typing import Any

from kvferry.contract.resolver import BUILT_INS
from kvferry.errors import did_you_mean

MULTI_CONNECTORS = {
    "MultiConnector": "FerryMultiConnector",
    "FerryMultiConnector": "FerryMultiConnector",
    "FerryMultiConnectorNoHMA": "FerryMultiConnectorNoHMA",
}
_SIDED = [target.name for target in BUILT_INS if target.name not in MULTI_CONNECTORS]
CONNECTOR_NAMES = tuple(sorted([*_SIDED, *MULTI_CONNECTORS]))
FERRY_NAMES = {f"Ferry{name}": name for name in _SIDED} | {name: name for name in set(MULTI_CONNECTORS.values())}
"""The name vLLM's registry knows -> the name here."""
__all__ = list(CONNECTOR_NAMES)


def __getattr__(name: str) -> Any:
    if name not in CONNECTOR_NAMES:
        hint = did_you_mean(name, CONNECTOR_NAMES, list_all=True)
        raise AttributeError(f"kvferry.vllm has no connector {name!r}{hint}")
    from kvferry.vllm.compat import check_vllm, log_as_vllm

    check_vllm()
    log_as_vllm()
    if name == "LMCacheMPConnector":
        from kvferry.vllm.lmcache import lmcache_connector

        return lmcache_connector()
    if name in MULTI_CONNECTORS:
        from kvferry.vllm import multi

        found = getattr(multi, MULTI_CONNECTORS[name])
    else:
        from kvferry.vllm.facade import built_in

        found = built_in(name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*globals(), *CONNECTOR_NAMES]
