"""For tests of connectors, tiers and engines: shipped, public.

Names load on first use: the stub model needs torch, the rest does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvferry.contract.kv_cache import make_kv_cache_config
    from kvferry.testing.stub_model import StubModel
    from kvferry.testing.tier_checks import TierChecks
    from kvferry.testing.transport_checks import TransportChecks

__all__ = ["StubModel", "TierChecks", "TransportChecks", "make_kv_cache_config"]

_HOMES = {
    "StubModel": "kvferry.testing.stub_model",
    "TierChecks": "kvferry.testing.tier_checks",
    "TransportChecks": "kvferry.testing.transport_checks",
    "make_kv_cache_config": "kvferry.contract.kv_cache",
}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from its home now."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvferry.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
