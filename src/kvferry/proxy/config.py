"""Settings of the proxy: its engines, its deadlines, and its policy for transfers that fail."""

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
    """Engines and policy. `parse` checks every setting."""

    prefill: tuple[str, ...]
    """URLs of engines that prefill."""
    decode: tuple[str, ...]
    """URLs of engines that decode."""
    strict: bool = True
    """True: reply with an error where the decode engine would have to compute the prompt a second time."""
    connect_timeout_s: float = _at_least(0.01, 2.0)
    """Longest time, in seconds, to connect to an engine."""
    prefill_timeout_s: float = _at_least(0.01, 120.0)
    """Longest time, in seconds, for one prefill leg."""
    decode_timeout_s: float = _at_least(0.01, 120.0)
    """Longest time, in seconds, between two events of a stream; also the longest wait for the first event."""
    answer_timeout_s: float = _at_least(0.01, 600.0)
    """Longest time, in seconds, for a decode leg that is not a stream."""
    max_attempts: int = _at_least(1, 3)
    """Largest number of tries of one request, the first included."""
    retry_deadline_s: float = _at_least(0, 60.0)
    """Age of a request, in seconds, after which the proxy does not try again."""
    hand_over_s: float = _at_least(0, 25.0)
    """Longest time, in seconds, for which the proxy keeps a finished prefill while all decode engines are full; must be
    below the prefill engines' `lease_s`."""
    probe_interval_s: float = _at_least(0, 10.0)
    """Time, in seconds, between two probes (tiny requests) of each pair of engines; 0 sends none, for engines that cost
    by the token."""
    probe_timeout_s: float = _at_least(0.01, 10.0)
    """Longest time, in seconds, for each leg of a probe."""
    failure_threshold: int = _at_least(1, 3)
    """Number of failures in a row after which an engine, or a pair of engines, goes out of use."""
    min_backoff_s: float = _at_least(0.01, 0.5)
    """Time, in seconds, for which such an engine or pair first stays out of use; each repetition doubles it."""
    max_backoff_s: float = _at_least(0.01, 30.0)
    """Longest time, in seconds, for which such an engine or pair stays out of use."""
    prefix_memory_chunks: int = _at_least(1, 100_000)
    """Number of pieces of prompts that the proxy remembers per prefill engine."""
    max_body_bytes: int = _at_least(1, 8 << 20)
    """Largest request body, in bytes."""
    max_held_body_bytes: int = _at_least(1, 512 << 20)
    """Largest total size, in bytes, of the bodies of running requests, which the proxy keeps to ask another engine;
    beyond it, new requests get 503. Parsed, a hostile body takes up to about twelve times its size."""
    max_reply_bytes: int = _at_least(1, 32 << 20)
    """Largest reply of an engine, in bytes; an event of a stream may have at most 16 MiB. A larger reply or event is a
    failure of the engine."""
    max_stops: int = _at_least(0, 64)
    """Largest number of stop strings, and of stop token ids, in one request; more are refused with 400."""
    max_connections: int | None = _at_least(1, None)
    """Largest number of connections; None: the room within the limit of file descriptors."""
    header_timeout_s: float = _at_least(0.01, 10.0)
    """Longest time, in seconds, for the headers of a request to arrive."""
    body_timeout_s: float = _at_least(0.01, 60.0)
    """Longest time, in seconds, for the body of a request to arrive."""
    host: str = "127.0.0.1"
    """Address on which the proxy listens."""
    port: int = field(default=8100, metadata={"minimum": 0, "maximum": 65535})
    """Port on which the proxy listens; 0 selects a free port."""
    drain_timeout_s: float = _at_least(0, 30.0)
    """Longest time, in seconds, for running requests to end after SIGTERM."""

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
                    raise ConfigError(
                        f"proxy.{name}={url!r} is named twice (in {seen[url]}): give each engine one role"
                    )
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
