"""What the options of `kvferry serve` mean."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kvferry.cli.main import app
from kvferry.cli.serve import transfer_config
from kvferry.config import KVTransferConfig
from kvferry.errors import ConfigError


def test_offloading_size_is_an_offloading_connector() -> None:
    config = KVTransferConfig.parse(transfer_config(None, 1.5))
    assert (config.kv_connector, config.kv_role) == ("OffloadingConnector", "kv_both")
    assert config.kv_load_failure_policy == "recompute"
    assert config.kv_connector_extra_config == {"cpu_bytes_to_use": 3 << 29}
    assert not KVTransferConfig.parse(transfer_config(None, None)).is_kv_transfer_instance
    assert transfer_config('{"kv_connector": "X"}', None) == '{"kv_connector": "X"}'


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_sizes_that_are_none(size: float) -> None:
    with pytest.raises(ConfigError, match="--kv-offloading-size"):
        transfer_config(None, size)


def test_both_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="--kv-transfer-config and --kv-offloading-size"):
        transfer_config("{}", 1)


def test_events_that_other_machines_could_hear_are_refused_before_anything_starts() -> None:
    arguments = ["serve", "no-such-model", "--kv-events-config", '{"endpoint": "tcp://*:5557"}']
    with pytest.raises(ConfigError, match=r"kv_events_config\.endpoint"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
