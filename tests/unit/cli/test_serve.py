"""What `kvferry serve` refuses before it starts anything."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kvferry.cli.main import app
from kvferry.errors import ConfigError


def test_events_that_other_machines_could_hear_are_refused() -> None:
    arguments = ["serve", "no-such-model", "--kv-events-config", '{"endpoint": "tcp://*:5557"}']
    with pytest.raises(ConfigError, match=r"kv_events_config\.endpoint"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
