"""Sizes in settings: numbers of bytes, or text with a unit, in every setting of bytes there is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from kvferry.config import parse_settings, parse_size, transfer_config
from kvferry.errors import ConfigError
from kvferry.lmcache.config import LMCacheConfig
from kvferry.offloading.config import OffloadingConfig
from kvferry.offloading.tiers.disk import DiskSettings
from kvferry.p2p.config import P2PConfig
from kvferry.proxy.config import ProxyConfig

SETTINGS: list[Any] = [OffloadingConfig, P2PConfig, LMCacheConfig, ProxyConfig, DiskSettings]
REQUIRED: dict[Any, dict[str, Any]] = {
    OffloadingConfig: {"cpu_bytes_to_use": 1},
    ProxyConfig: {"prefill": ["http://a"], "decode": ["http://b"]},
    DiskSettings: {"path": "kv"},
}
BYTES = [(cls, f.name) for cls in SETTINGS for f in fields(cls) if "bytes" in f.name]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (8_000_000_000, 8_000_000_000),
        (8e9, 8_000_000_000),
        ("8000", 8000),
        ("8B", 8),
        ("8kB", 8000),
        ("8KB", 8000),
        ("8MB", 8_000_000),
        ("8GB", 8_000_000_000),
        ("8TB", 8_000_000_000_000),
        ("8KiB", 8192),
        ("8MiB", 8388608),
        ("8GiB", 8589934592),
        ("8TiB", 8796093022208),
        ("1.5GiB", 1610612736),
        ("0.1GB", 100_000_000),
        (" 8 GB ", 8_000_000_000),
    ],
)
def test_size(value: object, expected: int) -> None:
    assert parse_size(value, "size") == expected


@pytest.mark.parametrize(
    "value", ["8G", "8gb", "8Gb", "GB", "-8GB", "8 GB s", "1e9", "", "8GBGB", True, None, 1.5, float("inf"), [8]]
)
def test_what_is_no_size_is_refused_with_the_forms(value: object) -> None:
    with pytest.raises(ConfigError, match=r"here=.* must be a whole number of bytes, or text .*8GB.*8GiB"):
        parse_size(value, "here")


def test_there_are_settings_of_bytes() -> None:
    assert len(BYTES) >= 4


@pytest.mark.parametrize(("cls", "name"), BYTES)
def test_every_setting_of_bytes_takes_text_with_a_unit(cls: Any, name: str) -> None:
    given = {**REQUIRED.get(cls, {}), name: "3GiB"}
    assert getattr(parse_settings(cls, given, "where"), name) == 3 << 30
    with pytest.raises(ConfigError, match=rf"where\.{name}='3 Gigs' must be a whole number of bytes, or text"):
        parse_settings(cls, {**given, name: "3 Gigs"}, "where")


@pytest.mark.parametrize(("size", "expected"), [(2, 2 << 30), (0.5, 1 << 29), ("8GB", 8 * 10**9), ("2GiB", 2 << 30)])
def test_offloading_size_is_gib_unless_it_has_a_unit(size: Any, expected: int) -> None:
    assert transfer_config(None, size).kv_connector_extra_config["cpu_bytes_to_use"] == expected
