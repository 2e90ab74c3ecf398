"""Settings of the built-in LMCacheMPConnector, and whose class is asked for."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvferry.config import KVTransferConfig, transfer_config
from kvferry.contract import KVConnectorFactory
from kvferry.errors import ConfigError
from kvferry.lmcache.config import LMCacheConfig, builtin_config, implementation_asked_for
from kvferry.lmcache.wire import version_numbers

VARIABLE = "LMCACHE_USE_UPSTREAM_MP"


@pytest.mark.parametrize(
    ("extra", "url"),
    [
        ({}, "tcp://localhost:5555"),
        ({"lmcache.mp.host": "tcp://10.0.0.1", "lmcache.mp.port": 6000}, "tcp://10.0.0.1:6000"),
        ({"host": "h", "lmcache.mp.port": 6000.0}, "tcp://h:6000"),
        ({"lmcache.mp.server_urls": "tcp://h:1", "port": 2}, "tcp://h:1"),
        ({"server_urls": ["h:1"]}, "tcp://h:1"),
    ],
)
def test_where_the_server_is(extra: dict[str, Any], url: str) -> None:
    assert LMCacheConfig.parse(extra).url == url


def test_prefixed_and_plain_keys_mean_the_same() -> None:
    values = {"mq_timeout": 3, "heartbeat_interval": 0.5}
    prefixed = {f"lmcache.mp.{key}": value for key, value in values.items()}
    assert LMCacheConfig.parse(values) == LMCacheConfig.parse(prefixed) != LMCacheConfig.parse({})


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"lmcache.mp.lazy_offload": True}, r"lmcache\.mp\.lazy_offload is unknown to kvferry's own"),
        ({"lmcache.mp.staging_bytes": 1}, "lmcache.mp.staging_bytes is unknown"),
        ({"lmcache.mp.heartbeat_intervall": 1}, r"did you mean 'lmcache\.mp\.heartbeat_interval'"),
        ({"hots": "h"}, "hots is unknown .*did you mean 'host'"),
        ({"host": "h", "lmcache.mp.host": "h"}, "both host and lmcache.mp.host"),
        ({"port": 0}, "port=0 must be at least 1"),
        ({"mq_timeout": 0}, "mq_timeout=0 must be at least"),
        ({"server_urls": "tcp://a:1,tcp://b:2"}, "uses one server"),
        ({"server_urls": []}, "uses one server"),
        ({"server_urls": 3}, "uses one server"),
        ({"server_urls": "tcp://a"}, "of the form tcp://host:port"),
    ],
)
def test_mistakes(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LMCacheConfig.parse(extra)


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_the_environment_asks_for_the_built_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert implementation_asked_for({}) == ("builtin", f"environment variable {VARIABLE}")
    with pytest.raises(ConfigError, match=f"implementation='package', but the environment variable {VARIABLE}"):
        implementation_asked_for({"implementation": "package"})


@pytest.mark.parametrize("text", ["0", "false", "No", "off", ""])
def test_the_environment_asks_for_nothing(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    for asked in ("auto", "package", "builtin"):
        assert implementation_asked_for({"implementation": asked})[0] == asked


@pytest.mark.parametrize("text", ["2", "ja", " 1", "None"])
def test_other_words_in_the_environment_are_errors(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{VARIABLE}={text!r} is not one of 0, 1, false, true, no, yes, off, on"):
        builtin_config({}, "scheduler")


def test_a_module_path_beside_the_variable_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    path = "kvferry.lmcache.connector"
    transfer = KVTransferConfig("LMCacheMPConnector", kv_role="kv_both", kv_connector_module_path=path)
    with caplog.at_level(logging.WARNING):
        KVConnectorFactory.resolve(transfer)
    assert f"{VARIABLE} is set, but kv_connector_module_path='{path}' has priority" in caplog.text


def test_the_offloading_backend_means_this_connector() -> None:
    transfer = transfer_config(None, 1.0, "lmcache")
    resolved = KVConnectorFactory.resolve(transfer)
    assert resolved.name == "LMCacheMPConnector"
    assert resolved.connector_class.__name__ == "LMCacheMPConnectorUpstream"
    assert LMCacheConfig.parse(transfer.kv_connector_extra_config) == LMCacheConfig()


def test_versions_are_compared_by_their_numbers() -> None:
    ordered = ["0.4.4", "0.4.5", "0.4.5.post1", "0.4.10", "0.5.6", "1"]
    assert sorted(ordered, key=version_numbers) == ordered
    assert version_numbers("0.5.6rc1") == (0, 5, 6)
    assert version_numbers("unknown") == ()
