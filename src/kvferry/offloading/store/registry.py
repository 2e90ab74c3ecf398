"""Tier types by name: kvferry's own, and those that installed packages offer as entry points of `kvferry.tiers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from kvferry.clock import Clock, SystemClock
from kvferry.contract.plugins import Registry, load_factory
from kvferry.errors import ConfigError, did_you_mean
from kvferry.offloading.store.tier import Tier, TierFactory, TierRoom
from kvferry.types import Namespace

TIER_TYPES = Registry("kvferry.tiers", "tier", {"fs": "kvferry.offloading.tiers.disk:DiskTier"})


def create_tier(
    config: Mapping[str, Any], namespace: Namespace, clock: Clock | None = None, *, where: str = "secondary_tiers[0]"
) -> Tier:
    """Build the tier that `config` describes.

    `{"type": NAME, ...}` is a built-in tier or one of an installed package, `{"type": "MyTier", "tier_module_path":
    "my.module", ...}` that class of that module, whatever else has its name.

    May block (opens, scans). `where` is the place of `config` in the user's configuration, for messages.
    ConfigError: unknown type or key (with the nearest known name), wrong value, module missing, medium unusable.
    """
    factory, settings = _find(config, where)
    return factory.from_config(settings, namespace, clock if clock is not None else SystemClock(), where)


def tier_room(config: Mapping[str, Any], payload_bytes: int, *, where: str) -> TierRoom:
    """What a tier so configured would hold of chunks of that size. Opens nothing. ConfigError as `create_tier`'s."""
    factory, settings = _find(config, where)
    if hasattr(factory, "room"):
        return cast("TierRoom", factory.room(settings, payload_bytes, where))
    name = str(settings.get("name", config["type"]))
    return TierRoom(name, None, f"tiers of type {config['type']!r} do not tell before they are opened")


_VLLMS_KEYS = {
    "root_dir": "write path",
    "n_read_threads": "write num_threads, which counts readers and writers together",
    "n_write_threads": "write num_threads, which counts readers and writers together",
    "enable_kv_events": "kvferry sends events of every tier where KV events are on; leave the key out",
    "locality": "leave the key out",
    "module_path": "write tier_module_path",
}
"""What vLLM's TieringOffloadingSpec calls settings of a tier -> what to write here."""


def _find(config: Mapping[str, Any], where: str) -> tuple[TierFactory, dict[str, Any]]:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where} must be an object like {{'type': 'fs', 'path': ...}}, not {config!r}")
    settings = dict(config)
    type_name = settings.pop("type", None)
    module_path = settings.pop("tier_module_path", None)
    if type_name is not None and not isinstance(type_name, str):
        raise ConfigError(f"{where}.type={type_name!r} must be text{did_you_mean('', TIER_TYPES.names())}")
    if not type_name:
        raise ConfigError(f"{where}.type is missing{did_you_mean('', TIER_TYPES.names())}")
    is_built_in = module_path is None and (type_name in TIER_TYPES.built_ins or type_name not in TIER_TYPES.names())
    for key in sorted(_VLLMS_KEYS.keys() & settings.keys()) if is_built_in else ():
        raise ConfigError(f"{where}.{key}={settings[key]!r} is a setting of vLLM's tiers: {_VLLMS_KEYS[key]}")
    if module_path is not None:
        if not isinstance(module_path, str) or not module_path:
            raise ConfigError(f"{where}.tier_module_path must name a module, not {module_path!r}")
        return cast("TierFactory", load_factory(module_path, type_name, f"{where}.type", "tier")), settings
    return cast("TierFactory", TIER_TYPES.find(type_name, f"{where}.type")), settings
