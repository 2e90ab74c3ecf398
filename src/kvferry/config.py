"""Settings: `KVTransferConfig` as users of vLLM know it, typed parsing of free-form settings, and the environment.

This is the only module that reads `os.environ`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from kvferry.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

GIB = 1 << 30
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|[kKMGT]i?B)")
_LONGEST_SIZE = 40
_LONGEST_SHOWN = 300
_LONGEST_TEXT = 4096  # so are paths
_SIZE_FORMS = 'a whole number of bytes, or text with a unit such as "8GB" (8 * 10^9 bytes) or "8GiB" (8 * 2^30 bytes)'
_UNITS = {"B": 1, **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")}}
_UNITS |= {f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")}
KVRole = Literal["kv_producer", "kv_consumer", "kv_both"]
_PRODUCERS = ("kv_producer", "kv_both")
_CONSUMERS = ("kv_consumer", "kv_both")
_ROLES = get_args(KVRole)
_OFFLOADING_BACKENDS = ("native", "lmcache")
_RUNNER_VARIABLES = ("KVFERRY_USE_V2_MODEL_RUNNER", "VLLM_USE_V2_MODEL_RUNNER")
_TYPE_NAMES = {NoneType: "null", str: "text", dict: "an object"}
_LISTS: dict[Any, str] = {int: "whole numbers", str: "texts"}
_TRUTH = {"0": False, "1": True, "false": False, "true": True}
_UPSTREAM_TRUTH = {**_TRUTH, "no": False, "yes": True, "off": False, "on": True, "": False}

_LARGEST = (1 << 63) - 1
_LARGEST_FLOAT = 1e9
"""Of settings that are no whole numbers; most are seconds, and clocks and sockets overflow behind this."""

C = TypeVar("C")


def cache_dir() -> Path:
    """Folder for what can be made again (converted weights, fingerprints): `$XDG_CACHE_HOME/kvferry`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvferry"


def v2_runner_environment() -> dict[str, bool]:
    """What the environment says about the second model runner: variable -> value, the one that counts first.

    `KVFERRY_USE_V2_MODEL_RUNNER` goes before vLLM's `VLLM_USE_V2_MODEL_RUNNER`. ConfigError unless 0, 1, true or false.
    """
    said = {}
    for name in _RUNNER_VARIABLES:
        if (text := os.environ.get(name)) is not None:
            if text.lower() not in _TRUTH:
                raise ConfigError(f"environment variable {name}={text!r} is not one of {', '.join(_TRUTH)}")
            said[name] = _TRUTH[text.lower()]
    return said


def environment_matching(pattern: str) -> dict[str, str]:
    """Environment variable -> text, of those whose whole name fits the regular expression."""
    return {name: text for name, text in sorted(os.environ.items()) if re.fullmatch(pattern, name)}


def api_key_environment() -> str | None:
    """The key for clients of our servers: `KVFERRY_API_KEY`, else vLLM's `VLLM_API_KEY`; None: no key."""
    return os.environ.get("KVFERRY_API_KEY") or os.environ.get("VLLM_API_KEY") or None


def lmcache_upstream_environment() -> bool:
    """`LMCACHE_USE_UPSTREAM_MP`: True asks for the built-in LMCacheMPConnector. ConfigError unless a truth value."""
    text = os.environ.get("LMCACHE_USE_UPSTREAM_MP", "")
    if text.lower() not in _UPSTREAM_TRUTH:
        known = ", ".join(filter(None, _UPSTREAM_TRUTH))
        raise ConfigError(f"environment variable LMCACHE_USE_UPSTREAM_MP={text!r} is not one of {known}, or empty")
    return _UPSTREAM_TRUTH[text.lower()]


def read_secret(path: str | Path, setting: str) -> str:
    """The one line of text in a file with a key. ConfigError, naming `setting`, when it cannot be read or is none.

    Logs a warning when every user of this machine may read it.
    """
    file, named = Path(path), f"{setting}={str(path)!r}"
    try:
        secret, mode = file.read_text().strip(), file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named} cannot be read: {error}") from error
    if not secret or len(secret.splitlines()) > 1:
        raise ConfigError(f"{named} is {'more than one line' if secret else 'empty'}: put the key there, and only that")
    if mode & 0o004:
        logger.warning("%s can be read by every user of this machine: chmod 600 it", named)
    return secret


def _default_buffer_device() -> str:
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


@dataclass
class KVTransferConfig:
    """Which KV connector an engine uses, and how. Fields, defaults and role properties are those of vLLM 0.32,
    and `on_shadow`.

    An empty `KVTransferConfig()` is valid and means: no connector.
    """

    kv_connector: str | None = None
    """Class name of the connector, or "module:Class"; None: no connector."""
    engine_id: str | None = None
    """Name of this engine for peers and in file names; by default a random UUID."""
    kv_buffer_device: str = field(default_factory=_default_buffer_device)
    """Device on which a connector buffers KV."""
    kv_role: KVRole | None = None
    """Role of this engine, required with `kv_connector`: it produces KV, consumes KV, or both."""
    kv_port: int = field(default=14579, metadata={"minimum": 0, "maximum": 65535})
    """Base port for connectors that listen."""
    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)
    """Settings of the connector itself; each connector checks its own keys."""
    kv_connector_module_path: str | None = None
    """Module from which the connector is imported; has priority over a built-in of the same name; must not be
    empty."""
    enable_permute_local_kv: bool = False
    """Kept for compatibility with vLLM's field of that name; no kvferry connector reads it."""
    kv_load_failure_policy: Literal["recompute", "fail"] = "fail"
    """Handling of a request whose KV failed to load: the engine computes its tokens ("recompute"), or the request ends
    with an error ("fail")."""
    on_shadow: Literal["warn", "error"] = "warn"
    """Reaction to another connector of the same name: one warning ("warn"), or a ConfigError ("error"). The key is
    kvferry's own: vLLM does not know it."""

    def __post_init__(self) -> None:
        if self.engine_id is None:
            self.engine_id = str(uuid.uuid4())
        hints = get_type_hints(type(self))
        for f in fields(self):
            where = f"kv_transfer_config.{f.name}"
            value = _of_type(getattr(self, f.name), hints[f.name], where)
            if isinstance(value, str):
                _check_inside(value, where)
            setattr(self, f.name, _in_bounds(value, f.metadata, where))
        if self.kv_connector is not None and self.kv_role is None:
            raise ConfigError(
                f"kv_connector={self.kv_connector!r} is set but kv_role is not: "
                f'add "kv_role", one of {", ".join(_ROLES)}'
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
            raise ConfigError(f"kv_transfer_config={shown(value)} must be an object, JSON text or a KVTransferConfig")
        known = {f.name for f in fields(cls)}
        for key in value:
            if key not in known:
                raise ConfigError(f"kv_transfer_config.{_key(key)} is not a known key{did_you_mean(_key(key), known)}")
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


def transfer_config(
    kv_transfer_config: KVTransferConfig | Mapping[str, Any] | str | None,
    kv_offloading_size: float | str | None = None,
    kv_offloading_backend: str | None = None,
) -> KVTransferConfig:
    """The one connector that an engine's settings mean together; not one to use when they mean none.

    `kv_offloading_size` (GiB of host memory, or text with a unit such as "8GB") asks for an OffloadingConnector, or
    with the backend "lmcache" for an LMCacheMPConnector, whose server has memory of its own; other settings for it may
    stand in `kv_connector_extra_config`. Raises ConfigError when `kv_transfer_config` names a connector too, when it
    describes one that nobody names, and for a wrong size or backend.
    """
    transfer = KVTransferConfig.parse(kv_transfer_config)
    if kv_offloading_size is not None:
        return _implicit_offloading(transfer, kv_offloading_size, kv_offloading_backend or "native")
    if kv_offloading_backend is not None:
        raise ConfigError(f"kv_offloading_backend={shown(kv_offloading_backend)} needs kv_offloading_size (GiB)")
    if transfer.kv_connector is None:
        for name in ("kv_role", "kv_connector_module_path", "kv_connector_extra_config"):
            if (value := getattr(transfer, name)) not in (None, {}):
                raise ConfigError(
                    f"kv_transfer_config.{name}={shown(value)} is set but kv_connector is not: "
                    "name the connector it is for, or leave it out"
                )
    return transfer


def parse_size(value: object, where: str) -> int:
    """Bytes of a size: a whole number, or text such as "8GB" or "1.5GiB". ConfigError that names the forms."""
    if isinstance(value, str):
        text = value.strip() if len(value) <= _LONGEST_SIZE else ""
        if text.isdecimal():
            return int(text)
        if (match := _SIZE.fullmatch(text)) is not None:
            number, unit = match.groups()
            return int(Fraction(number) * _UNITS[unit[0].upper() + unit[1:]])
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    raise ConfigError(f"{where}={shown(value)} must be {_SIZE_FORMS}")


def _implicit_offloading(transfer: KVTransferConfig, size: float | str, backend: str) -> KVTransferConfig:
    where = f"kv_offloading_size={shown(size)}"
    if backend not in _OFFLOADING_BACKENDS:
        near = did_you_mean(str(backend), _OFFLOADING_BACKENDS)
        raise ConfigError(f"kv_offloading_backend={shown(backend)} is not known{near}")
    size_bytes = _offloading_bytes(size)
    if size_bytes < 1:
        raise ConfigError(f'{where} must be a number above 0 (GiB of host memory), or text with a unit such as "8GB"')
    extra = transfer.kv_connector_extra_config
    for name, value, allowed in (
        ("kv_connector", transfer.kv_connector, None),
        ("kv_connector_module_path", transfer.kv_connector_module_path, None),
        ("kv_role", transfer.kv_role or "kv_both", "kv_both"),
        ("kv_connector_extra_config.cpu_bytes_to_use", extra.get("cpu_bytes_to_use"), None),
    ):
        if value != allowed:
            raise ConfigError(
                f"kv_transfer_config.{name}={value!r} and {where} both say which connector to use: leave one of them "
                "out (the size of an OffloadingConnector is cpu_bytes_to_use in its kv_connector_extra_config)"
            )
    is_native = backend == "native"
    return replace(
        transfer,
        kv_connector="OffloadingConnector" if is_native else "LMCacheMPConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={**extra, "cpu_bytes_to_use": size_bytes} if is_native else extra,
    )


def _offloading_bytes(size: object) -> int:
    """Bytes of `kv_offloading_size`: a number is GiB, text has a unit; 0 when it is neither."""
    if isinstance(size, str) and _SIZE.fullmatch(size.strip()) is not None:
        return parse_size(size, "kv_offloading_size")
    is_number = isinstance(size, int | float) and not isinstance(size, bool) and abs(size) <= _LARGEST
    return int(size * GIB) if is_number else 0  # type: ignore[operator]


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """Parse JSON text that must be an object; ConfigError says where and at which position it is wrong.

    Keys given twice and NaN or Infinity, which Python's parser would take, are wrong as well.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{where} has the key {key!r} twice in one object; leave one out")
        return dict(pairs)

    def no_number(name: str) -> float:
        raise ConfigError(f"{where} has the value {name}, which JSON does not have; give a number")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except json.JSONDecodeError as err:
        raise ConfigError(f"{where} is not valid JSON at character {err.pos}: {err.msg}; got {shown(text)}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as err:  # a number of thousands of digits, or thousands of brackets
        raise ConfigError(f"{where} is JSON that cannot be read: {err}; got {shown(text)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object, got {shown(text)}")
    return value


def parse_settings(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Read a free-form mapping into the frozen dataclass `cls`, whose fields are the known keys.

    Fields may be of simple types, unions of them, `tuple[Mapping, ...]` (given as a list of objects),
    `tuple[int, ...]` (given as a list of whole numbers, none below the minimum) or `tuple[str, ...]`. Whole floats
    count as int (`1e9`), sizes (keys with the word "bytes") may be text with a unit (`"8GB"`, see `parse_size`),
    strings must not be empty, `metadata={"minimum": n}` bounds numbers. Every mistake is a ConfigError that names it
    as `where.key`: unknown (with the nearest known key), missing, wrong type, too small.
    """
    known = {f.name: f for f in fields(cast("Any", cls))}
    hints = get_type_hints(cls)
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}.{_key(key)} is unknown{did_you_mean(_key(key), known)}")
    settings = {}
    for name, f in known.items():
        if name in values:
            value = values[name]
            if "bytes" in name.split("_") and isinstance(value, str):
                value = parse_size(value, f"{where}.{name}")
            value = _of_type(value, hints[name], f"{where}.{name}")
            _check_inside(value, f"{where}.{name}")
            if value == "":
                raise ConfigError(f"{where}.{name} must not be empty")
            is_float = float in (hints[name], *get_args(hints[name]))
            settings[name] = _in_bounds(value, f.metadata, f"{where}.{name}", is_float=is_float)
        elif f.default is MISSING:
            raise ConfigError(f"{where}.{name} is missing")
    return cls(**settings)


VllmsOwn = Mapping[str, tuple[tuple[Any, ...], str]]
"""Key of vLLM's connector of the same name -> values that say what holds here anyway, and what to do about others."""


def without_vllms_own(values: Mapping[str, Any], own: VllmsOwn, where: str, connector: str) -> dict[str, Any]:
    """The settings without those of vLLM's connector that hold here anyway. ConfigError says what to use instead."""
    settings = dict(values)
    for key, (holds, instead) in own.items():
        if key in settings and (value := settings.pop(key)) not in holds:
            raise ConfigError(f"{where}.{key}={shown(value)} is a setting of vLLM's {connector}: {instead}")
    return settings


def shown(value: object) -> str:
    """A wrong value for a message: on one line, cut where it is long, and never an error of its own."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write a number of more than 4,300 digits
        return "a number of thousands of digits" if isinstance(value, int) else f"a {type(value).__name__} too long"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def _key(key: object) -> str:
    """A key that nobody knows, for a message: as it is where it can be printed."""
    return key[:_LONGEST_SHOWN] if isinstance(key, str) and key.isprintable() else shown(key)


def _check_inside(value: Any, where: str) -> None:
    """ConfigError for what no setting may hold at any depth: numbers or texts too large, NUL, half a surrogate pair."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_inside(key, where)
            _check_inside(item, f"{where}.{_key(key)}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_inside(item, f"{where}[{i}]")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{where}={shown(value)} must be at most {_LARGEST}")
    elif isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise ConfigError(f"{where}={shown(value)} must be at most {_LONGEST_TEXT} characters long")
        if "\0" in value:
            raise ConfigError(f"{where}={shown(value)} holds a NUL character, which no name or path may: leave it out")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"{where}={shown(value)} holds half of a surrogate pair, which is no character")


def _of_type(value: Any, hint: Any, where: str) -> Any:
    """`value` if it is what the annotation says (simple types, Literal, dict, tuple[Mapping, ...], unions of them)."""
    if get_origin(hint) is tuple and (of := get_args(hint)[0]) in _LISTS:
        if not isinstance(value, list):
            raise ConfigError(f"{where}={shown(value)} must be a list of {_LISTS[of]}")
        return tuple(_of_type(item, of, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise ConfigError(f"{where}={shown(value)} must be a list of objects")
        return tuple(value)
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    types = [get_origin(part) or part for part in parts if get_origin(part) is not Literal]
    if int in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = type(value) is int and float in types
    if is_number or (isinstance(value, tuple(types)) and not (isinstance(value, bool) and bool not in types)):
        return value
    if choices:
        if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            return value
        near = did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
        raise ConfigError(
            f"{where}={shown(value)} is not one of {', '.join(map(str, choices))}{near if 'mean' in near else ''}"
        )
    names = " or ".join(_TYPE_NAMES.get(t) or str(t.__name__) for t in types)
    raise ConfigError(f"{where}={shown(value)} must be {names}")


def _in_bounds(value: Any, bounds: Mapping[str, Any], where: str, *, is_float: bool = False) -> Any:
    if isinstance(value, tuple):
        return tuple(_in_bounds(item, bounds, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={shown(value)} must be a finite number")
    if not isinstance(value, int | float):
        return value
    largest = _LARGEST_FLOAT if is_float else _LARGEST
    if abs(value) > largest:
        raise ConfigError(f"{where}={shown(value)} must be at most {largest:{'g' if is_float else 'd'}}")
    if (minimum := bounds.get("minimum")) is not None and value < minimum:
        raise ConfigError(f"{where}={shown(value)} must be at least {minimum}")
    if (maximum := bounds.get("maximum")) is not None and value > maximum:
        raise ConfigError(f"{where}={shown(value)} must be at most {maximum}")
    return value
