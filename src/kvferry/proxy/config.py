"""What the proxy is told: which engines, how long to wait, what to do when a transfer does not work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from kvferry.config import parse_settings
from kvferry.errors import ConfigError


def _at_least(minimum: float, default: Any) -> Any:
    return field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """Engines and policy. `parse` checks everything."""

    prefill: tuple[str, ...]
    """URLs of engines that prefill."""
    decode: tuple[str, ...]
    """URLs of engines that decode."""
    strict: bool = True
    """Answer an error rather than let the decode engine prefill a second time."""
    connect_timeout_s: float = _at_least(0.01, 2.0)
    prefill_timeout_s: float = _at_least(0.01, 120.0)
    """Longest time for one prefill leg."""
    decode_timeout_s: float = _at_least(0.01, 120.0)
    """Longest silence of a stream, its first token included."""
    answer_timeout_s: float = _at_least(0.01, 600.0)
    """Longest time for a decode leg that is not a stream."""
    max_attempts: int = _at_least(1, 3)
    """Tries of a request, the first included."""
    retry_deadline_s: float = _at_least(0, 60.0)
    """Nothing is tried again when so long has passed since the request came."""
    hand_over_s: float = _at_least(0, 25.0)
    """How long a hand-over is kept while all decode engines are full; below the prefill engines' `lease_s`."""
    probe_interval_s: float = _at_least(0, 10.0)
    """Between tiny requests through each pair of engines; 0: none, for engines that cost by the token."""
    probe_timeout_s: float = _at_least(0.01, 10.0)
    failure_threshold: int = _at_least(1, 3)
    """Failures in a row that take an engine, or a pair of them, out of rotation."""
    min_backoff_s: float = _at_least(0.01, 0.5)
    max_backoff_s: float = _at_least(0.01, 30.0)
    prefix_memory_chunks: int = _at_least(1, 100_000)
    """Pieces of prompts remembered per prefill engine."""
    max_body_bytes: int = _at_least(1, 8 << 20)
    max_held_body_bytes: int = _at_least(1, 512 << 20)
    """Of all requests under way together, which the proxy keeps to ask another engine; beyond that new ones get 503.
    Parsed, a hostile body takes up to about twelve times its size."""
    max_reply_bytes: int = _at_least(1, 32 << 20)
    """Of an engine's reply, and of an event of its streams up to 16 MiB; a larger one is a failure of the engine."""
    max_stops: int = _at_least(0, 64)
    """Stop strings of a request, and stop token ids; more are refused with 400."""
    max_connections: int | None = _at_least(1, None)
    """None: as many as there are file descriptors for."""
    header_timeout_s: float = _at_least(0.01, 10.0)
    body_timeout_s: float = _at_least(0.01, 60.0)
    """How long a request's headers, and then its body, may take to come."""
    host: str = "127.0.0.1"
    port: int = field(default=8100, metadata={"minimum": 0, "maximum": 65535})
    """0: any free one."""
    drain_timeout_s: float = _at_least(0, 30.0)
    """At SIGTERM, how long requests under way may take to end."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ProxyConfig:
        """Check settings by name; `prefill` and `decode` are lists of URLs. ConfigError names what is wrong."""
        config = parse_settings(cls, values, "proxy")
        if config.max_backoff_s < config.min_backoff_s:
            raise ConfigError(
                f"proxy.max_backoff_s={config.max_backoff_s} must be at least min_backoff_s={config.min_backoff_s}"
            )
        urls = {name: tuple(_base_url(url, name) for url in getattr(config, name)) for name in ("prefill", "decode")}
        seen: dict[str, str] = {}
        for name, named in urls.items():
            if not named:
                raise ConfigError(f"proxy.{name} is empty: name at least one engine's URL")
            for url in named:
                if url in seen:
                    raise ConfigError(f"proxy.{name}={url!r} is named twice (in {seen[url]}): one role each, once")
                seen[url] = name
        return replace(config, prefill=urls["prefill"], decode=urls["decode"])


def _base_url(text: str, name: str) -> str:
    """`http://host:port[/path]` without the `/v1` that people paste along."""
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"proxy.{name}={text!r} is no engine's URL: give it as http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")
