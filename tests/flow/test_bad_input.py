"""What users get wrong, as they meet it: an error before any work starts, naming key, value and remedy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvferry import LLM, SamplingParams
from kvferry.errors import ConfigError
from kvferry.testing.stub_model import StubModel

MiB = 1 << 20


def transfer(extra: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    settings = {"weights_version": "1", "cpu_bytes_to_use": MiB, **(extra or {})}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {name: value for name, value in settings.items() if value is not None},
        **fields,
    }


def disk(**settings: Any) -> dict[str, Any]:
    return {"secondary_tiers": [{"type": "fs", **settings}]}


CASES: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("bad JSON", lambda tmp: '{"kv_connector": "Off', ["not valid JSON", "character"]),
    ("unknown key", lambda tmp: transfer(kv_rol="x"), ["kv_transfer_config.kv_rol", "kv_role"]),
    ("no role", lambda tmp: {"kv_connector": "OffloadingConnector"}, ["kv_role", "kv_both"]),
    ("unknown connector", lambda tmp: transfer(kv_connector="OfloadingConnector"), ["OffloadingConnector"]),
    ("empty module path", lambda tmp: transfer(kv_connector_module_path=""), ["kv_connector_module_path is empty"]),
    ("no module", lambda tmp: transfer(kv_connector_module_path="nothing.here"), ["nothing"]),
    ("bad policy", lambda tmp: transfer(kv_load_failure_policy="retry"), ["'retry'", "recompute"]),
    ("unknown setting", lambda tmp: transfer({"cpu_byte_to_use": 1}), ["cpu_byte_to_use", "'cpu_bytes_to_use'"]),
    ("no host memory", lambda tmp: transfer({"cpu_bytes_to_use": None}), ["cpu_bytes_to_use", "missing"]),
    ("memory as text", lambda tmp: transfer({"cpu_bytes_to_use": "1GiB"}), ["cpu_bytes_to_use", "'1GiB'"]),
    ("memory below a chunk", lambda tmp: transfer({"cpu_bytes_to_use": 100}), ["cpu_bytes_to_use=100", "8192"]),
    ("odd chunk", lambda tmp: transfer({"chunk_tokens": 40}), ["chunk_tokens=40", "multiple of 16"]),
    ("no weights version", lambda tmp: transfer({"weights_version": None}), ["weights_version", "random"]),
    ("tiers no list", lambda tmp: transfer({"secondary_tiers": "fs"}), ["secondary_tiers", "'fs'"]),
    ("unknown tier", lambda tmp: transfer({"secondary_tiers": [{"type": "fss"}]}), ["[0].type", "'fs'"]),
    ("no path", lambda tmp: transfer(disk()), ["secondary_tiers[0].path", "missing"]),
    ("tier key", lambda tmp: transfer(disk(path=str(tmp), max_byte=1)), ["[0].max_byte", "'max_bytes'"]),
    ("quota below a chunk", lambda tmp: transfer(disk(path=str(tmp / "kv"), max_bytes=5000)), ["max_bytes", "5000"]),
    ("path is a file", lambda tmp: transfer(disk(path=str(_file(tmp)))), ["secondary_tiers[0]", "no writable folder"]),
    (
        "two tiers of one name",
        lambda tmp: transfer({"secondary_tiers": [{"type": "fs", "path": str(tmp / n)} for n in "ab"]}),
        ["name"],
    ),
]


def _file(tmp: Path) -> Path:
    (tmp / "file").write_text("")
    return tmp / "file"


def own_arenas() -> list[str]:
    """Arenas of this process; others may come and go."""
    return [name for name in os.listdir("/dev/shm") if f"-{os.getpid()}-" in name]


@pytest.mark.parametrize(("config", "texts"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_errors_name_key_value_and_remedy(config: Callable[[Path], Any], texts: list[str], tmp_path: Path) -> None:
    before = own_arenas(), threading.active_count()
    with pytest.raises(ConfigError) as caught:
        LLM(StubModel(), num_kv_blocks=32, kv_transfer_config=config(tmp_path))
    for text in texts:
        assert text in str(caught.value)
    assert (own_arenas(), threading.active_count()) == before, "something was left behind"


def test_a_folder_in_use_names_the_holder_and_is_free_after_its_end(tmp_path: Path) -> None:
    config = transfer(disk(path=str(tmp_path / "kv")))
    with LLM(StubModel(), num_kv_blocks=32, kv_transfer_config=config) as llm:
        llm.generate(list(range(100)), SamplingParams(max_tokens=2, temperature=0))
        code = (
            "from kvferry import LLM\nfrom kvferry.testing.stub_model import StubModel\n"
            f"LLM(StubModel(), num_kv_blocks=32, kv_transfer_config={config!r})"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert f"{os.getpid()}" in other.stderr
        assert "ConfigError" in other.stderr
    with LLM(StubModel(), num_kv_blocks=32, kv_transfer_config=config) as llm:
        output = llm.generate(list(range(100)), SamplingParams(max_tokens=2, temperature=0))[0]
        assert output.num_external_tokens == 64


def test_a_full_disk_costs_the_store_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transfer(disk(path=str(tmp_path / "kv")))
    tokens = list(range(300))

    def refuse(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with LLM(StubModel(), num_kv_blocks=64, kv_transfer_config=config) as llm:
        monkeypatch.setattr(os, "pwritev", refuse)
        monkeypatch.setattr(os, "writev", refuse)
        monkeypatch.setattr(os, "write", refuse)
        first = llm.generate(tokens, SamplingParams(max_tokens=4, temperature=0))[0]
        assert first.outputs[0].token_ids == StubModel().expected_tokens(tokens, 4)
        assert llm.reset_prefix_cache()
        assert llm.generate(tokens, SamplingParams(max_tokens=4, temperature=0))[0].num_external_tokens == 256
        monkeypatch.undo()
    assert list((tmp_path / "kv").rglob("*.kv")) == []
