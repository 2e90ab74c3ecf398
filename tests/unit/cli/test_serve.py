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


@pytest.mark.parametrize(("size", "expected"), [("2000000", 2_000_000), ("2MB", 2_000_000), ("2MiB", 2 << 20)])
def test_sizes_have_units_on_the_command_line(monkeypatch: pytest.MonkeyPatch, size: str, expected: int) -> None:
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr("kvferry.cli.serve._run", lambda model, engine, server, threads: seen.append((engine, server)))
    arguments = ["serve", "any", "--kv-cache-bytes", size, "--max-body-bytes", size, "--kv-offloading-size", "3GB"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    engine, server = seen[0]
    assert (engine["kv_cache_bytes"], server["max_body_bytes"]) == (expected, expected)
    assert engine["kv_transfer_config"].kv_connector_extra_config["cpu_bytes_to_use"] == 3_000_000_000


def test_a_number_alone_is_gib_of_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("kvferry.cli.serve._run", lambda model, engine, server, threads: seen.append(engine))
    for size in ("2", "0.5"):
        assert CliRunner().invoke(app, ["serve", "any", "--kv-offloading-size", size]).exit_code == 0
    sizes = [engine["kv_transfer_config"].kv_connector_extra_config["cpu_bytes_to_use"] for engine in seen]
    assert sizes == [2 << 30, 1 << 29]
    assert [engine["kv_cache_bytes"] for engine in seen] == [None, None]


@pytest.mark.parametrize("option", ["--kv-cache-bytes", "--max-body-bytes"])
def test_a_size_of_another_form_names_option_and_forms(option: str) -> None:
    done = CliRunner().invoke(app, ["serve", "any", option, "8G"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert all(text in done.output for text in (option, "'8G'", "8GB", "8GiB"))
