"""Tier types by name, imported when first used, and the checking of their configuration."""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from kvferry.clock import Clock, SystemClock
from kvferry.errors import ConfigError, did_you_mean
from kvferry.store.tier import Tier, TierFactory
from kvferry.types import Namespace

C = TypeVar("C")


class TierType(NamedTuple):
    """Where the class of a tier is, and what to tell when its module cannot be imported."""

    target: str  # "module:Class"
    install_hint: str = ""


TIER_TYPES: Mapping[str, TierType] = types.MappingProxyType({"fs": TierType("kvferry.store.disk:DiskTier")})


def create_tier(
    config: Mapping[str, Any], namespace: Namespace, clock: Clock | None = None, *, where: str = "secondary_tiers[0]"
) -> Tier:
    """Build the tier that `config` describes: `{"type": "fs", ...}`, or of somebody else's module
    `{"type": "MyTier", "tier_module_path": "my.module", ...}` (the module wins over a built-in of that name).

    May block (opens, scans). `where` is the place of `config` in the user's configuration, for messages.
    ConfigError: unknown type or key (with the nearest known name), wrong value, module missing, medium unusable.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where} must be an object like {{'type': 'fs', 'path': ...}}, not {config!r}")
    settings = dict(config)
    type_name = settings.pop("type", None)
    module_path = settings.pop("tier_module_path", None)
    if not isinstance(type_name, str) or not type_name:
        raise ConfigError(f"{where}.type is missing{did_you_mean('', TIER_TYPES)}")
    if module_path is not None:
        if not isinstance(module_path, str) or not module_path:
            raise ConfigError(f"{where}.tier_module_path must name a module, not {module_path!r}")
        tier_type = TierType(f"{module_path}:{type_name}")
    elif type_name in TIER_TYPES:
        tier_type = TIER_TYPES[type_name]
    else:
        raise ConfigError(f"{where}.type {type_name!r} is unknown{did_you_mean(type_name, TIER_TYPES)}")
    factory = _resolve(tier_type, where)
    return factory.from_config(settings, namespace, clock if clock is not None else SystemClock(), where)


def parse_settings(cls: type[C], config: Mapping[str, Any], where: str) -> C:
    """`config` as the frozen dataclass `cls`, whose fields are the known keys. Simple types and unions of them only.

    ConfigError: unknown key (with the nearest known), missing key, wrong type; each named as `where.key`.
    """
    fields = {f.name: f for f in dataclasses.fields(cast("Any", cls))}
    for key in config:
        if key not in fields:
            raise ConfigError(f"{where}.{key} is unknown{did_you_mean(str(key), fields)}")
    hints = get_type_hints(cls)
    for name, f in fields.items():
        if name in config:
            _check_type(config[name], hints[name], f"{where}.{name}")
        elif f.default is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name} is missing")
    return cls(**config)


def _check_type(value: object, hint: object, where: str) -> None:
    allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if float in allowed:
        allowed = (*allowed, int)
    if type(value) not in allowed:
        names = " or ".join("null" if t is types.NoneType else str(getattr(t, "__name__", t)) for t in allowed)
        raise ConfigError(f"{where} must be {names}, not {value!r}")


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
