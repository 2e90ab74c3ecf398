"""What `kvferry proxy` refuses before it listens."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry.cli.main import app
from kvferry.cli.proxy import proxy
from kvferry.errors import ConfigError
from kvferry.proxy.config import ProxyConfig

ENGINES = ["--prefill", "http://a:1", "--decode", "http://b:1", "--host", "no.such.host.invalid"]  # it never listens


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, ["proxy", *arguments], catch_exceptions=False)
    return str(caught.value)


def test_peers_that_nobody_signs_are_a_mistake() -> None:
    message = refused(*ENGINES, "--allowed-peers", "10.0.0.0/8")
    assert "--allowed-peers is for what the proxy signs: give --shared-key-file too" in message


@pytest.mark.parametrize("key", ["schlüssel", "a\x01b"])
def test_probe_key_that_no_header_can_carry(key: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    message = refused(*ENGINES, "--probe-key-file", str(file))
    assert f"probe_key_file='{file}' has characters that are not printable ASCII" in message
    assert key not in message


def test_defaults_are_those_of_the_settings() -> None:
    options = {name: parameter.default for name, parameter in inspect.signature(proxy).parameters.items()}
    defaults = {f.name: f.default for f in fields(ProxyConfig)}
    assert {name: options.get(name, "missing") for name in defaults} == {
        name: inspect.Parameter.empty if default is MISSING else default for name, default in defaults.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-attempts", "0"], "--max-attempts: proxy.max_attempts=0 must be at least 1"),
        (["--prefill", "a:1"], "--prefill: proxy.prefill='a:1' is no engine's URL: give it as http://HOST:PORT"),
        (["--prefill", ""], "--prefill: proxy.prefill='' is no engine's URL: give it as http://HOST:PORT"),
        (["--max-backoff-s", "0.1"], "--max-backoff-s: proxy.max_backoff_s=0.1 must be at least min_backoff_s=0.5"),
        (["--prefill-timeout-s", "inf"], "--prefill-timeout-s: proxy.prefill_timeout_s=inf must be a finite number"),
    ],
)
def test_wrong_setting_is_named_as_the_option_too(arguments: list[str], message: str) -> None:
    assert refused(*ENGINES, *arguments) == message
    assert refused(*ENGINES, "--host", "") == "--host: proxy.host must not be empty"
