"""Settings: `KVTransferConfig` as users of vLLM know it, typed parsing of free-form settings, and the environment.

This is the only module that reads `os.environ`.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvferry.errors import ConfigError, did_you_mean

KVRole = Literal["kv_producer", "kv_consumer", "kv_both"]
_PRODUCERS = ("kv_producer", "kv_both")
_CONSUMERS = ("kv_consumer", "kv_both")
_ROLES = ("kv_producer", "kv_consumer", "kv_both")
_FAILURE_POLICIES = ("recompute", "fail")

T = TypeVar("T")


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
                f'kv_connector={self.kv_connector!r} is set but kv_role is not: '
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


class Settings:
    """Typed reading of a free-form mapping: every key must be read, an unread key is an error.

    Each `take_*` names its key, so the set of known keys is what the reader asked for; `finish()` refuses the rest
    with the nearest known name. `where` is the path shown in errors, e.g. `kv_connector_extra_config`.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self._where = where
        self._known: set[str] = set()

    def _take(self, key: str) -> Any:
        self._known.add(key)
        return self._values.get(key)

    def take_int(self, key: str, default: int | None = None, *, minimum: int | None = None) -> int | None:
        """An integer; whole floats (as in 1e9) count. None or absent gives `default`."""
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self._where}.{key}={value!r} must be a whole number")
        if minimum is not None and value < minimum:
            raise ConfigError(f"{self._where}.{key}={value} must be at least {minimum}")
        return value

    def take_float(self, key: str, default: float, *, minimum: float = 0.0) -> float:
        """A number of at least `minimum`."""
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self._where}.{key}={value!r} must be a number")
        if value < minimum:
            raise ConfigError(f"{self._where}.{key}={value} must be at least {minimum}")
        return float(value)

    def take_bool(self, key: str, default: bool) -> bool:
        """A JSON true or false; strings are refused, since "false" would count as true."""
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}.{key}={value!r} must be true or false")
        return value

    def take_str(self, key: str, default: str | None = None, *, choices: tuple[str, ...] = ()) -> str | None:
        """A non-empty string, one of `choices` when given."""
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self._where}.{key}={value!r} must be a non-empty string")
        if choices and value not in choices:
            raise ConfigError(f"{self._where}.{key}={value!r} is unknown{did_you_mean(value, choices)}")
        return value

    def take_list(self, key: str) -> list[Mapping[str, Any]]:
        """A list of objects; absent gives an empty list."""
        value = self._take(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise ConfigError(f"{self._where}.{key}={value!r} must be a list of objects")
        return value

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self._values:
            if key not in self._known:
                raise ConfigError(f"{self._where}.{key} is not a known key{did_you_mean(str(key), self._known)}")
