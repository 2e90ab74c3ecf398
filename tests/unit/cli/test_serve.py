"""What `kvferry serve` refuses before it starts anything."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from kvferry.cli.main import app
from kvferry.errors import ConfigError


def test_events_that_other_machines_could_hear_are_refused() -> None:
    arguments = ["serve", "no-such-model", "--kv-events-config", '{"endpoint": "tcp://*:5557"}']
    with pytest.raises(ConfigError, match=r"kv_events_config\.endpoint"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_hidden_states_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("kvferry.cli.serve._run", lambda model, engine, server, num_threads: seen.append(engine))
    for arguments in ([], ["--hidden-state-layer", "3", "--hidden-state-layer", "7"]):
        assert CliRunner().invoke(app, ["serve", "any", *arguments]).exit_code == 0
    assert [list(engine["hidden_state_layers"]) for engine in seen] == [[], [3, 7]]
