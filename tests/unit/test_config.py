"""KVTransferConfig as users of vLLM know it, and errors that name key, value and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.config import KVTransferConfig
from kvferry.errors import ConfigError


def test_empty_config_is_valid_and_means_no_connector() -> None:
    config = KVTransferConfig()
    assert not config.is_kv_transfer_instance
    assert not config.is_kv_producer
    assert not config.is_kv_consumer
    assert config.kv_port == 14579
    assert config.kv_load_failure_policy == "fail"
    assert config.kv_connector_extra_config == {}
    assert config.engine_id
    assert config.engine_id != KVTransferConfig().engine_id


@pytest.mark.parametrize(
    ("role", "producer", "consumer"),
    [("kv_producer", True, False), ("kv_consumer", False, True), ("kv_both", True, True)],
)
def test_roles(role: Any, producer: bool, consumer: bool) -> None:
    config = KVTransferConfig("C", kv_role=role)
    assert config.is_kv_transfer_instance
    assert (config.is_kv_producer, config.is_kv_consumer) == (producer, consumer)


def test_parse_takes_what_users_pass() -> None:
    text = '{"kv_connector": "C", "kv_role": "kv_both", "kv_connector_extra_config": {"a": 1}}'
    config = KVTransferConfig.parse(text)
    assert config.get_from_extra_config("a", 0) == 1
    assert config.get_from_extra_config("b", 7) == 7
    assert KVTransferConfig.parse(config) is config
    assert KVTransferConfig.parse(None).kv_connector is None


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ('{"kv_connector": ', ["not valid JSON", "character"]),
        ("[1]", ["JSON object"]),
        (3, ["3"]),
        ({"kv_conector": "C"}, ["kv_transfer_config.kv_conector", "'kv_connector'"]),
        ({"kv_connector": "C"}, ["kv_role", "kv_both"]),
        ({"kv_connector": "C", "kv_role": "both"}, ["kv_role='both'", "kv_both"]),
        ({"kv_load_failure_policy": "ignore"}, ["'ignore'", "recompute"]),
        ({"kv_connector_extra_config": [1]}, ["kv_connector_extra_config=[1]"]),
    ],
)
def test_bad_values_are_named(value: Any, texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        KVTransferConfig.parse(value)
    for text in texts:
        assert text in str(caught.value)
