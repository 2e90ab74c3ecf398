"""Tier types by name, imported when first used."""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from kvferry.clock import Clock, SystemClock
from kvferry.errors import ConfigError, did_you_mean
from kvferry.offloading.store.tier import Tier, TierFactory, TierRoom
from kvferry.types import Namespace


class TierType(NamedTuple):
    """Where the class of a tier is, and what to tell when its module cannot be imported."""

    target: str  # "module:Class"
    install_hint: str = ""


TIER_TYPES: Mapping[str, TierType] = types.MappingProxyType({"fs": TierType("kvferry.offloading.tiers.disk:DiskTier")})


def create_tier(
    config: Mapping[str, Any], namespace: Namespace, clock: Clock | None = None, *, where: str = "secondary_tiers[0]"
) -> Tier:
    """Build the tier that `config` describes: `{"type": "fs", ...}`, or of somebody else's module
    `{"type": "MyTier", "tier_module_path": "my.module", ...}` (the module wins over a built-in of that name).

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
        raise ConfigError(f"{where}.type={type_name!r} must be text{did_you_mean('', TIER_TYPES)}")
    if not type_name:
        raise ConfigError(f"{where}.type is missing{did_you_mean('', TIER_TYPES)}")
    for key in sorted(_VLLMS_KEYS.keys() & settings.keys()) if module_path is None else ():
        raise ConfigError(f"{where}.{key}={settings[key]!r} is a setting of vLLM's tiers: {_VLLMS_KEYS[key]}")
    if module_path is not None:
        if not isinstance(module_path, str) or not module_path:
            raise ConfigError(f"{where}.tier_module_path must name a module, not {module_path!r}")
        tier_type = TierType(f"{module_path}:{type_name}")
    elif type_name in TIER_TYPES:
        tier_type = TIER_TYPES[type_name]
    else:
        raise ConfigError(f"{where}.type {type_name!r} is unknown{did_you_mean(type_name, TIER_TYPES)}")
    return _resolve(tier_type, where), settings


def _resolve(tier_type: TierType, where: str) -> TierFactory:
    module_name, _, class_name = tier_type.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        hint = f"; {tier_type.install_hint}" if tier_type.install_hint else ""
        raise ConfigError(f"{where}: cannot import {module_name}: {error}{hint}") from error
    found = getattr(module, class_name, None)
    if found is None or not hasattr(found, "from_config"):
        known = [name for name, value in vars(module).items() if hasattr(value, "from_config")]
        near = did_you_mean(class_name, known)
        raise ConfigError(f"{where}.type: {module_name} has no tier class {class_name!r}{near}")
    return cast("TierFactory", found)
