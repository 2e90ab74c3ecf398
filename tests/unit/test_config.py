"""KVTransferConfig as users of vLLM know it, and errors that name key, value and remedy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from kvferry.config import KVTransferConfig, read_secret
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
        ({"on_shadow": "ignore"}, ["on_shadow='ignore'", "warn, error"]),
        ({"kv_connector": 3, "kv_role": "kv_both"}, ["kv_connector=3", "text"]),
        ({"kv_connector_module_path": ["m"]}, ["kv_connector_module_path=['m']", "text"]),
        ({"kv_connector_extra_config": [1]}, ["kv_connector_extra_config=[1]"]),
    ],
)
def test_bad_values_are_named(value: Any, texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        KVTransferConfig.parse(value)
    for text in texts:
        assert text in str(caught.value)


def test_secret_is_the_only_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "key"
    file.write_text("  the secret \n\n")
    file.chmod(0o640)
    assert read_secret(file, "key_file") == "the secret"
    assert not caplog.records
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert read_secret(str(file), "key_file") == "the secret"
    assert f"key_file='{file}' can be read by every user of this machine: chmod 600 it" in caplog.text
    assert "the secret" not in caplog.text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"), (b" \n", "is empty"), (b"one\ntwo", "is more than one line"), (b"\xff\xfe", "cannot be"),
        (None, "cannot be read"),
    ],
)  # fmt: skip
def test_file_that_holds_no_secret(tmp_path: Path, content: bytes | None, text: str) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    for path in (file, tmp_path):  # a folder is no file
        with pytest.raises(ConfigError, match=f"shared_key_file='{path}' (cannot be read|{text})") as caught:
            read_secret(path, "shared_key_file")
    assert "two" not in str(caught.value)
