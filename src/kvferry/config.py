"""Settings: `KVTransferConfig` as users of vLLM know it, typed parsing of free-form settings, and the environment.

This is the only module that reads `os.environ`.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from kvferry.errors import ConfigError, did_you_mean

KVRole = Literal["kv_producer", "kv_consumer", "kv_both"]
_PRODUCERS = ("kv_producer", "kv_both")
_CONSUMERS = ("kv_consumer", "kv_both")
_ROLES = ("kv_producer", "kv_consumer", "kv_both")
_FAILURE_POLICIES = ("recompute", "fail")

C = TypeVar("C")


def cache_dir() -> Path:
    """Folder for what can be made again (converted weights, fingerprints): `$XDG_CACHE_HOME/kvferry`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvferry"


def shared_memory_dir() -> Path:
    """Where arenas live unless told otherwise; memory-backed on Linux."""
    return Path(os.environ.get("KVFERRY_SHM_DIR", "/dev/shm"))


def _default_buffer_device() -> str:
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


@dataclass
class KVTransferConfig:
    """Which KV connector an engine uses, and how. Fields, defaults and role properties are those of vLLM 0.32.

    An empty `KVTransferConfig()` is valid and means: no connector.
    """

    kv_connector: str | None = None
    """Class name of the connector; None means no connector."""
    engine_id: str | None = None
    """Name of this engine towards peers and in file names; a random UUID unless given."""
    kv_buffer_device: str = field(default_factory=_default_buffer_device)
    """Device on which a connector buffers KV."""
    kv_role: KVRole | None = None
    """Required with `kv_connector`: does this engine produce KV for others, consume it, or both?"""
    kv_port: int = 14579
    """Base port for connectors that listen."""
    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)
    """Settings of the connector itself; each connector checks its own keys."""
    kv_connector_module_path: str | None = None
    """Module to import the connector from. Wins over a built-in of the same name; must not be empty."""
    enable_permute_local_kv: bool = False
    """Kept for compatibility with vLLM's field of that name; no kvferry connector reads it."""
    kv_load_failure_policy: Literal["recompute", "fail"] = "fail"
    """What becomes of a request whose KV failed to load: computed again, or finished with an error."""

    def __post_init__(self) -> None:
        if self.engine_id is None:
            self.engine_id = str(uuid.uuid4())
        if self.kv_role is not None and self.kv_role not in _ROLES:
            raise ConfigError(f"kv_role={self.kv_role!r} is not one of {', '.join(_ROLES)}")
        if self.kv_connector is not None and self.kv_role is None:
            raise ConfigError(
                f"kv_connector={self.kv_connector!r} is set but kv_role is not: "
                f'add "kv_role", one of {", ".join(_ROLES)}'
            )
        if self.kv_load_failure_policy not in _FAILURE_POLICIES:
            raise ConfigError(
                f"kv_load_failure_policy={self.kv_load_failure_policy!r} is not one of {', '.join(_FAILURE_POLICIES)}"
            )
        if not isinstance(self.kv_connector_extra_config, dict):
            raise ConfigError(
                f"kv_connector_extra_config={self.kv_connector_extra_config!r} must be an object of settings"
            )

    @classmethod
    def parse(cls, value: KVTransferConfig | Mapping[str, Any] | str | None) -> KVTransferConfig:
        """Accept what users pass: a config, a mapping, JSON text, or None (no connector).

        Raises ConfigError for bad JSON and for unknown keys, naming the nearest known one.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = parse_json_object(value, "kv_transfer_config")
        if not isinstance(value, Mapping):
            raise ConfigError(f"kv_transfer_config={value!r} must be an object, JSON text or a KVTransferConfig")
        known = {f.name for f in fields(cls)}
        for key in value:
            if key not in known:
                raise ConfigError(f"kv_transfer_config.{key} is not a known key{did_you_mean(str(key), known)}")
        return cls(**dict(value))

    @property
    def is_kv_transfer_instance(self) -> bool:
        """True when a connector is configured."""
        return self.kv_connector is not None and self.kv_role in _ROLES

    @property
    def is_kv_producer(self) -> bool:
        """True when this engine makes KV for others (`kv_both` counts)."""
        return self.kv_connector is not None and self.kv_role in _PRODUCERS

    @property
    def is_kv_consumer(self) -> bool:
        """True when this engine takes KV from others (`kv_both` counts)."""
        return self.kv_connector is not None and self.kv_role in _CONSUMERS

    def get_from_extra_config(self, key: str, default: Any) -> Any:
        """`kv_connector_extra_config[key]`, or `default`."""
        return self.kv_connector_extra_config.get(key, default)


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """Parse JSON text that must be an object; ConfigError says where and at which position it is wrong."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise ConfigError(f"{where} is not valid JSON at character {err.pos}: {err.msg}; got {text!r}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object, got {text!r}")
    return value


def parse_settings(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Read a free-form mapping into the frozen dataclass `cls`, whose fields are the known keys.

    Fields may be of simple types, unions of them, `tuple[Mapping, ...]` (given as a list of objects) or
    `tuple[int, ...]` (given as a list of whole numbers, none below the minimum). Whole floats
    count as int (`1e9`), strings must not be empty, `metadata={"minimum": n}` bounds numbers. Every mistake is a
    ConfigError that names it as `where.key`: unknown (with the nearest known key), missing, wrong type, too small.
    """
    known = {f.name: f for f in fields(cast("Any", cls))}
    hints = get_type_hints(cls)
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}.{key} is unknown{did_you_mean(str(key), known)}")
    settings = {}
    for name, f in known.items():
        if name in values:
            settings[name] = _checked(values[name], hints[name], f.metadata.get("minimum"), f"{where}.{name}")
        elif f.default is MISSING:
            raise ConfigError(f"{where}.{name} is missing")
    return cls(**settings)


def _checked(value: Any, hint: Any, minimum: float | None, where: str) -> Any:
    if get_origin(hint) is tuple and get_args(hint)[0] is int:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list of whole numbers, not {value!r}")
        return tuple(_checked(item, int, minimum, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise ConfigError(f"{where} must be a list of objects, not {value!r}")
        return tuple(value)
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if int in allowed and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in allowed and not (float in allowed and type(value) is int):
        names = " or ".join("null" if t is NoneType else str(t.__name__) for t in allowed)
        raise ConfigError(f"{where} must be {names}, not {value!r}")
    if value == "":
        raise ConfigError(f"{where} must not be empty")
    if minimum is not None and value is not None and value < minimum:
        raise ConfigError(f"{where}={value} must be at least {minimum}")
    return value
