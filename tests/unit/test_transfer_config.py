"""The one connector that an engine's settings mean together, also when offloading is only implied."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.config import KVTransferConfig, parse_json_object, parse_settings, transfer_config
from kvferry.errors import ConfigError
from kvferry.offloading.config import OffloadingConfig


@pytest.mark.parametrize("backend", [None, "native"])
def test_a_size_is_an_offloading_connector(backend: str | None) -> None:
    config = transfer_config(None, 1.5, backend)
    assert (config.kv_connector, config.kv_role) == ("OffloadingConnector", "kv_both")
    assert config.kv_load_failure_policy == "recompute"
    assert config.kv_connector_extra_config == {"cpu_bytes_to_use": 3 << 29}


def test_with_lmcache_the_size_only_says_that_there_is_one() -> None:
    config = transfer_config(None, 4, "lmcache")
    assert (config.kv_connector, config.kv_role) == ("LMCacheMPConnector", "kv_both")
    assert config.kv_load_failure_policy == "recompute"
    assert config.kv_connector_extra_config == {}


@pytest.mark.parametrize("empty", [None, "{}", {}, KVTransferConfig()])
def test_an_empty_config_means_no_connector_and_stands_beside_a_size(empty: Any) -> None:
    assert not transfer_config(empty).is_kv_transfer_instance
    assert transfer_config(empty, 1).kv_connector == "OffloadingConnector"


def test_further_settings_of_the_implied_connector_are_kept_and_nothing_given_is_changed() -> None:
    given = KVTransferConfig(engine_id="e", kv_connector_extra_config={"weights_version": "1"})
    config = transfer_config(given, 1)
    assert config.engine_id == "e"
    assert config.kv_connector_extra_config == {"weights_version": "1", "cpu_bytes_to_use": 1 << 30}
    assert given.kv_connector is None
    assert given.kv_connector_extra_config == {"weights_version": "1"}


def test_without_a_size_it_is_what_parse_makes_of_it() -> None:
    text = '{"kv_connector": "X", "kv_role": "kv_both"}'
    assert transfer_config(text).kv_connector == "X"


@pytest.mark.parametrize("text", ['{"a": {"b": 1, "b": 2}}', '{"a": [NaN]}', '{"a": -Infinity}', "[]", "null", "{,}"])
def test_json_that_python_would_take_or_that_is_no_object(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here "):
        parse_json_object(text, "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_settings_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=r"x\.stall_timeout_s=.* must be a finite number"):
        parse_settings(OffloadingConfig, {"cpu_bytes_to_use": 1, "stall_timeout_s": value}, "x")
