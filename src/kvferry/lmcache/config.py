"""Settings of the built-in LMCacheMPConnector, and which implementation of that name is meant."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kvferry.config import GIB, lmcache_upstream_environment, parse_settings
from kvferry.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

EXTRA_CONFIG = "kv_connector_extra_config"
UPSTREAM_VARIABLE = "LMCACHE_USE_UPSTREAM_MP"
_PREFIX = "lmcache.mp."
_PREFIXED = ("host", "port", "server_urls", "mq_timeout", "heartbeat_interval")

Implementation = Literal["auto", "package", "builtin"]


@dataclass(frozen=True, slots=True)
class LMCacheConfig:
    """Settings of the user; the first five also as `lmcache.mp.<key>`, the names of LMCache's own connector."""

    host: str = "localhost"
    """Host of the LMCache server, with or without "tcp://"; the server must share /dev/shm with the workers."""
    port: int = field(default=5555, metadata={"minimum": 1, "maximum": 65535})
    """ZMQ port of the LMCache server."""
    server_urls: str | None = None
    """"tcp://host:port" of the LMCache server (text, or a list of one), in place of `host` and `port`."""
    mq_timeout: float = field(default=10.0, metadata={"minimum": 0.001})
    """Longest time, in seconds, for the answer to a store or a retrieve; without an answer the operation has failed."""
    heartbeat_interval: float = field(default=10.0, metadata={"minimum": 0.001})
    """Time, in seconds, between two signs of life; the server forgets a worker that sends none."""
    lookup_timeout_s: float = field(default=2.0, metadata={"minimum": 0.001})
    """Longest time, in seconds, that a request waits for the server's answer to its lookup."""
    http_port: int | None = field(default=None, metadata={"minimum": 1, "maximum": 65535})
    """HTTP port of the LMCache server, at which kvferry checks the server's version at the start."""
    staging_bytes: int = field(default=GIB // 4, metadata={"minimum": 1})
    """Shared memory of each worker, in bytes, through which KV goes to and from the server."""
    weights_version: str | None = None
    """Name of the weights in keys, instead of a fingerprint of their files; required for random weights."""
    implementation: Implementation = "auto"
    """Implementation of LMCacheMPConnector: see `implementation_asked_for`."""

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> LMCacheConfig:
        """Read `kv_connector_extra_config`. Raises ConfigError naming key, value and remedy."""
        values: dict[str, Any] = {}
        for key, value in extra_config.items():
            name = key.removeprefix(_PREFIX)
            if name != key and name not in _PREFIXED:
                known = [f"{_PREFIX}{known}" for known in _PREFIXED]
                raise ConfigError(
                    f"{EXTRA_CONFIG}.{key} is unknown to kvferry's own LMCacheMPConnector{did_you_mean(key, known)}"
                )
            if name in values:
                raise ConfigError(f"{EXTRA_CONFIG} has both {name} and {_PREFIX}{name}: leave one out")
            values[name] = value
        if "server_urls" in values:
            values["server_urls"] = _only_url(values["server_urls"])
        return parse_settings(cls, values, EXTRA_CONFIG)

    @property
    def url(self) -> str:
        """Of the server, as ZMQ wants it."""
        return self.server_urls or f"tcp://{self.host.removeprefix('tcp://')}:{self.port}"


def _only_url(value: Any) -> str:
    urls = value.split(",") if isinstance(value, str) else value
    if not isinstance(urls, list) or len(urls) != 1 or not isinstance(urls[0], str):
        raise ConfigError(f"{EXTRA_CONFIG}.server_urls={value!r}: the built-in LMCacheMPConnector uses one server")
    url = urls[0].strip()
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{EXTRA_CONFIG}.server_urls={value!r} must be of the form tcp://host:port")
    return f"tcp://{host}:{port}"


def implementation_asked_for(extra_config: Mapping[str, Any]) -> tuple[Implementation, str]:
    """Whose LMCacheMPConnector is asked for, and by which setting.

    "package" is the class of the installed lmcache, "builtin" is kvferry's; "auto" takes the package's where host and
    installation allow. LMCACHE_USE_UPSTREAM_MP=1 means "builtin". ConfigError for other values, and for a variable
    that contradicts the configuration.
    """
    value = extra_config.get("implementation", "auto")
    choices: tuple[Implementation, ...] = get_args(Implementation)
    if value not in choices:
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{EXTRA_CONFIG}.implementation={value!r} is not one of {', '.join(choices)}{near}")
    asked: Implementation = value
    if not lmcache_upstream_environment():
        return asked, f"implementation={asked}"
    if asked == "package":
        raise ConfigError(
            f"{EXTRA_CONFIG}.implementation='package', but the environment variable {UPSTREAM_VARIABLE} asks for the "
            "built-in: unset one of them"
        )
    return "builtin", f"environment variable {UPSTREAM_VARIABLE}"


def builtin_config(extra_config: Mapping[str, Any], side: str) -> LMCacheConfig:
    """The settings of one side of the built-in connector, which says so. ConfigError when another one is asked for."""
    setting = check_builtin(extra_config)
    version = sys.modules["kvferry"].__version__  # an import of the top package would point upwards
    logger.info("LMCacheMPConnector (%s): the built-in one of kvferry %s (%s)", side, version, setting)
    return LMCacheConfig.parse(extra_config)


def check_builtin(extra_config: Mapping[str, Any]) -> str:
    """Which setting leads to the built-in connector. ConfigError when the configuration asks for the package's."""
    asked, setting = implementation_asked_for(extra_config)
    if asked == "package":
        raise ConfigError(
            f"{EXTRA_CONFIG}.implementation='package': the class of the lmcache package runs in vLLM only, by the name "
            "LMCacheMPConnector; this is kvferry's built-in one: use 'auto' or 'builtin'"
        )
    return setting
