"""The tiered store: host arena, tiers below it, one policy over all."""

from __future__ import annotations

from kvferry.store.arena import Arena, ArenaInfo
from kvferry.store.policy import EvictionPolicy, LRUPolicy
from kvferry.store.registry import create_tier
from kvferry.store.tier import ResetReceipt, Tier, TierJob, TierResult, TierStats
from kvferry.store.tiered import HOST, StoreStats, TieredStore, TierTraffic

__all__ = [
    "HOST", "Arena", "ArenaInfo", "EvictionPolicy", "LRUPolicy", "ResetReceipt", "StoreStats", "Tier", "TierJob",
    "TierResult", "TierStats", "TierTraffic", "TieredStore", "create_tier",
]  # fmt: skip
