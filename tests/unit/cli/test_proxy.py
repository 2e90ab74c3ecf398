"""What `kvferry proxy` refuses before it listens."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry.cli.main import app
from kvferry.errors import ConfigError

ENGINES = ["--prefill", "http://a:1", "--decode", "http://b:1", "--host", "no.such.host.invalid"]  # it never listens


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, ["proxy", *arguments], catch_exceptions=False)
    return str(caught.value)


@pytest.mark.parametrize("key", ["schlüssel", "a\x01b"])
def test_probe_key_that_no_header_can_carry(key: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    message = refused(*ENGINES, "--probe-key-file", str(file))
    assert f"probe_key_file='{file}' has characters that are not printable ASCII" in message
    assert key not in message
