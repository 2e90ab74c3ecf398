"""kvferry's connectors for real vLLM: name this module as `kv_connector_module_path`.

Every name is resolved when it is asked for, so that naming one connector imports no other. The only package of
kvferry that imports vllm.
"""

from __future__ import annotations

import importlib
from typing import Any

_CONNECTORS = {"OffloadingConnector": "kvferry.vllm.offloading"}

__all__ = ["OffloadingConnector"]


def __getattr__(name: str) -> Any:
    module = _CONNECTORS.get(name)
    if module is None:
        raise AttributeError(f"kvferry.vllm has no connector {name!r} (known: {', '.join(sorted(_CONNECTORS))})")
    return getattr(importlib.import_module(module), name)
