"""`import kvferry` is quick and light; every public name is there."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from importlib.resources import files

import pytest

import kvferry

HEAVY = ("torch", "transformers", "numpy", "numba", "typer", "rich", "vllm", "lmcache")


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = _run("import sys, kvferry; print(*sys.modules)").split()
    assert "kvferry" in loaded
    assert not set(HEAVY) & set(loaded)


def test_import_takes_less_than_150_ms() -> None:
    """CPU time of the import itself, best of up to 15: other work on the machine must not fail it."""
    code = "import time; t = time.process_time(); import kvferry; print(time.process_time() - t)"
    assert any(float(_run(code)) < 0.150 for _ in range(15))


@pytest.mark.parametrize("name", kvferry.__all__)
def test_public_name_is_importable(name: str) -> None:
    home = importlib.import_module("kvferry")
    assert getattr(home, name).__name__ == name
    assert name in dir(home)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvferry.no_such_name  # type: ignore[attr-defined]


def test_command_starts_without_torch() -> None:
    started = time.monotonic()
    loaded = _run("import sys, kvferry.cli.main; print(*sys.modules)").split()
    assert not {"torch", "transformers"} & set(loaded), f"after {time.monotonic() - started:.2f} s"


def test_types_are_published() -> None:
    assert files("kvferry").joinpath("py.typed").is_file()
